"""The engine of a run: steps that go wrong, memory that runs out, warm-up, and what a device can do."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import tiny_arguments, tiny_run, write_config
from safetensors.torch import load_file

from tessera.training import attention_tier, compiling
from tessera.training.attention_tier import Needs, choose_attention, needs_of
from tessera.training.engine import checkpoint_layers
from tessera.training.guards import OutOfRows, SkippedSteps, smaller_parts
from tessera.training.parallel import choose_layout
from tessera.training.precision import choose_precision
from tessera.training.prefetch import Prefetcher
from tessera.training.pretrain import Run
from tessera.training.step import StepRunner, gradient_norm, take_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def break_steps(run: Run, places: set[int], loss: float = math.nan) -> list[int]:
    """Makes gradients and losses of the rows at some places no numbers; returns the places that are seen."""
    seen, accumulate, get = [], run.engine.runner.accumulate, run.engine.rows.get

    def noted(step):
        seen.append(run.skipped.place_of(step))
        return get(step)

    def broken(data, sync=True):
        total = accumulate(data, sync)
        if seen[-1] not in places:
            return total
        for p in run.model.parameters():
            p.grad.fill_(math.nan)
        return total * loss

    run.engine.rows.get, run.engine.runner.accumulate = noted, broken
    return seen


# ---- steps that go wrong ----


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny"])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(preset, loss, tmp_path, capsys):
    config = {"scoring_func": "sigmoid", "router_correction_bias": True} if "gpt" in preset else {}
    run = Run(tiny_arguments(tmp_path, config=write_config(tmp_path, preset, **config), steps=4))
    break_steps(run, {2}, loss)
    states, step = [], run.engine.step
    run.engine.step = lambda *given: states.append(state_of(run)) or step(*given)
    run.run()
    assert_same(states[2], states[3])
    assert any(not torch.equal(states[1][name], value) for name, value in states[2].items())
    assert any(not torch.equal(states[3][name], value) for name, value in state_of(run).items())
    said = capsys.readouterr().out
    what = "the gradient's norm is nan" if loss == 1.0 else f"the loss is {loss}"
    assert said.count("is skipped") == 1 and f"step 3 is skipped: {what}" in said


def test_bad_steps_in_a_row_go_back_to_the_last_checkpoint_and_past_their_rows(tmp_path, capsys):
    given = {"steps": 9, "checkpoint_steps": 2, "bad_steps": 2, "accumulation": 2}
    run = Run(tiny_arguments(tmp_path, **given))
    seen = break_steps(run, {5, 6})
    result = run.run()
    # Steps are saved after the 2nd and the 4th; the 6th and the 7th are bad.
    assert seen == [0, 1, 2, 3, 4, 5, 6, 4, 7, 8, 9, 10]
    said = capsys.readouterr().out
    assert "2 bad steps in a row: back to " in said and "step-000004, without their rows" in said
    assert result.tokens == 9 * 4 * 32
    # A run that never had these rows ends the same, whatever came between.
    (other := tmp_path / "other").mkdir()
    run = Run(tiny_arguments(other, **given))
    run.skipped.places = [5, 6]
    assert_same(
        load_file(run.run().final / "model.safetensors"), load_file(result.final / "model.safetensors")
    )


def test_a_resumed_run_passes_over_the_same_rows(tmp_path):
    run = Run(tiny_arguments(tmp_path, steps=7, checkpoint_steps=2, bad_steps=1))
    break_steps(run, {3})
    run.run()
    more = Run(tiny_arguments(tmp_path, steps=9), resume=True)
    seen = break_steps(more, set())
    more.run()
    assert more.skipped.places == [3] and seen == [8, 9]


def test_a_run_that_going_back_does_not_help_saves_the_rows_and_names_them(tmp_path):
    run = Run(
        tiny_arguments(tmp_path, steps=20, checkpoint_steps=1, bad_steps=1, rollbacks=2, accumulation=2)
    )
    break_steps(run, set(range(4, 20)))
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 5, after 2 times back; .*lower the"
    ):
        run.run()
    (file,) = (tmp_path / "run").glob("bad-batch-*.safetensors")
    assert file.name == "bad-batch-step-000004-rank-0.safetensors"
    place = run.skipped.place_of(4)
    batches = [batch["input_ids"] for batch in run.feed.micro_batches(place, CPU)]
    assert place == 6 and torch.equal(load_file(file)["input_ids"], torch.cat(batches))
    assert not (tmp_path / "run" / "final").exists()


def test_skipped_places_move_later_steps():
    skipped = SkippedSteps([5, 2, 3])
    assert [skipped.place_of(step) for step in range(6)] == [0, 1, 4, 6, 7, 8]


# ---- memory ----


def run_out(monkeypatch, fits: int, times: int = 100) -> None:
    """Memory suffices for micro-batches of so many rows, or runs out so many times."""
    accumulate, left = StepRunner.accumulate, [times]

    def limited(self, data, sync=True):
        if left[0] and any(len(batch["input_ids"]) > fits for batch in data.batches):
            left[0] -= 1
            accumulate(self, data, sync)  # gradients of a part are there already
            raise torch.OutOfMemoryError("injected")
        return accumulate(self, data, sync)

    monkeypatch.setattr(StepRunner, "accumulate", limited)


@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny"])
def test_memory_that_runs_out_halves_micro_batches_and_nothing_else(preset, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, preset, router_aux_loss_coef=0.0)
    given = {"config": config, "optimizer": "adamw", "learning_rate": 1e-4, "batch_size": 6}
    (tmp_path / "small").mkdir()
    whole = weights(tiny_run(tmp_path, **given).final)
    run_out(monkeypatch, fits=2)
    run = Run(tiny_arguments(tmp_path / "small", **given))
    result = run.run()
    said = capsys.readouterr().out
    assert said.count("memory ran out") == 2 and "micro-batches of 3 rows instead of 6" in said
    assert run.feed.accumulation == 3
    for name, tensor in weights(result.final).items():
        torch.testing.assert_close(tensor, whole[name], atol=2e-5, rtol=0, msg=name)


def test_a_row_that_does_not_fit_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    run_out(monkeypatch, fits=0)
    with pytest.raises(OutOfRows, match="one row of 32 tokens does not fit .*; take a shorter"):
        tiny_run(tmp_path)


def test_memory_that_runs_out_while_warming_up_halves_micro_batches_before_the_first_step(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(compiling, "choose_compile", lambda *given: compiling.CompileChoice(True, False))
    monkeypatch.setattr(compiling, "compile_whole", lambda model, choice: model)
    run_out(monkeypatch, fits=2)
    run = Run(tiny_arguments(tmp_path, batch_size=8))
    run.engine.warm_up(0)
    assert run.feed.accumulation == 4


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [(8, 1, 2), (8, 2, 4), (6, 1, 2), (6, 2, 3), (7, 1, 2), (12, 4, 6), (3, 3, None)],
)
def test_micro_batches_are_halved_evenly_where_that_can_be(rows, parts, expected):
    assert smaller_parts(rows, parts) == expected


# ---- compiling ----


def compiles(monkeypatch, backend) -> None:
    choice = compiling.CompileChoice(True, False, "a test", backend)
    monkeypatch.setattr(compiling, "choose_compile", lambda *given: choice)
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", ["gpt2-tiny", pytest.param("bytegpt-tiny", marks=pytest.mark.slow)])
def test_a_warm_up_changes_no_bit_of_what_follows(preset, tmp_path, monkeypatch):
    """gpt2-tiny has dropout; the biases of bytegpt-tiny's routers move with every step."""
    moves = {"scoring_func": "sigmoid", "router_correction_bias": True, "router_bias_update_speed": 0.01}
    config = write_config(tmp_path, preset, **(moves if "byte" in preset else {"num_hidden_layers": 1}))
    finals = []
    for warm in (True, False):
        compiles(monkeypatch, "eager")
        (folder := tmp_path / str(warm)).mkdir()
        run = Run(tiny_arguments(folder, config=config, steps=3, batch_size=5, accumulation=2))
        before, chance = state_of(run), torch.get_rng_state()
        if warm:
            run.engine.warm_up(0)
        run.engine.warm_up = lambda *_: None
        assert_same(state_of(run), before)
        assert torch.equal(torch.get_rng_state(), chance) and not run.optimizer.state
        assert all(not router.tally.any() for router in compiling.routers_of(run.model))
        assert all(p.grad is None for p in run.model.parameters())
        finals.append(weights(run.run().final))
    assert_same(*finals)


def test_each_shape_is_compiled_once_before_the_first_step(tmp_path, monkeypatch):
    """Neither another number of counted tokens nor an evaluation compiles anything."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiles(monkeypatch, counting)
    config = write_config(tmp_path, num_hidden_layers=1)
    run = Run(tiny_arguments(tmp_path, config=config, steps=4, batch_size=5, accumulation=2, evaluations=2))
    run.engine.warm_up(0)
    warm = len(graphs)
    counted, given = iter([160, 150, 140, 130]), []
    monkeypatch.setattr(run.feed, "counted", lambda step: given.append(next(counted)) or given[-1])
    run.run()
    assert warm >= 2 and len(graphs) == warm and len(given) == 4


def test_a_compiler_that_fails_is_told_and_done_without(tmp_path, monkeypatch, capsys):
    def failing(graph, inputs):
        raise RuntimeError("no kernels today")

    compiles(monkeypatch, failing)
    run = Run(tiny_arguments(tmp_path, config=write_config(tmp_path, num_hidden_layers=1), steps=2))
    result = run.run()
    said = capsys.readouterr().out
    assert "compiling failed, going on without" in said and "no kernels today" in said
    assert not run.engine.compiles.on and result.after.nats < result.before.nats


def test_why_nothing_is_compiled_is_told(monkeypatch):
    assert str(compiling.choose_compile("auto", CPU)) == "not compiled (CPU: it pays on a GPU)"
    assert not compiling.choose_compile("off", CUDA).on
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in compiling.choose_compile("auto", CUDA).why
    with pytest.raises(ValueError, match="compile=on: Triton is not installed"):
        compiling.choose_compile("on", CUDA)
    with pytest.raises(ValueError, match="compile must be 'auto', 'on' or 'off', got 'yes'"):
        compiling.choose_compile("yes", CPU)


# ---- rows ahead ----


def test_rows_that_are_read_ahead_are_those_that_are_not(tmp_path):
    run = Run(tiny_arguments(tmp_path, batch_size=6, accumulation=2))
    skipped = SkippedSteps([2])
    ahead, plain = (Prefetcher(run.feed, CPU, skipped.place_of, ahead=ahead) for ahead in (True, False))
    for step in (0, 1, 2, 0, 3):
        if step == 3:
            run.feed.accumulation = 3
            ahead.forget()
        ours, theirs = ahead.get(step), plain.get(step)
        assert ours.counted == theirs.counted and len(ours.batches) == len(theirs.batches)
        for a, b in zip(ours.batches, theirs.batches, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert "position_ids" not in ours.batches[0], "plain rows would get a mask"
    ahead.close()


# ---- numbers ----


def gpu(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize(
    ("card", "capability", "given", "expected"),
    [
        ("H200", (9, 0), ("auto", "fp32"), ("bf16", "bf16", torch.float32)),
        ("H200", (9, 0), ("auto", "split"), ("bf16", "no", torch.bfloat16)),
        ("H200", (9, 0), ("fp32", "fp32"), ("fp32", "no", torch.float32)),
        ("Tesla T4", (7, 5), ("auto", "fp32"), ("fp16", "fp16", torch.float32)),
        ("Tesla P100", (6, 0), ("auto", "fp32"), ("fp16", "fp16", torch.float32)),
        (None, None, ("auto", "fp32"), ("fp32", "no", torch.float32)),
        (None, None, ("bf16", "fp32"), ("bf16", "bf16", torch.float32)),
        (None, None, ("auto", "bf16"), ("bf16", "no", torch.bfloat16)),
    ],
)
def test_a_run_computes_in_what_its_device_has(card, capability, given, expected, monkeypatch):
    if card:
        gpu(monkeypatch, card, capability)
    chosen = choose_precision(*given, CUDA if card else CPU)
    assert (chosen.compute, chosen.mixed_precision, chosen.weight_dtype) == expected


@pytest.mark.parametrize(
    ("card", "given", "sentence"),
    [
        (None, ("fp16", "fp32"), "precision=fp16 scales gradients for a CUDA GPU, and this is a CPU"),
        ("Tesla T4", ("bf16", "fp32"), "precision=bf16: Tesla T4 has no bf16 products; take precision=fp16"),
        ("Tesla T4", ("auto", "bf16"), "Tesla T4 has no bf16 products"),
        (
            None,
            ("fp32", "split"),
            "weights=split are kept in bf16 and need precision=bf16",
        ),
        (None, ("fp8", "fp32"), "precision must be 'auto', 'bf16', 'fp16' or 'fp32', got 'fp8'"),
        (None, ("auto", "fp8"), "weights must be 'fp32', 'bf16' or 'split', got 'fp8'"),
    ],
)
def test_what_a_device_cannot_compute_in_is_refused(card, given, sentence, monkeypatch):
    if card:
        gpu(monkeypatch, card, (7, 5))
    with pytest.raises(ValueError, match=sentence):
        choose_precision(*given, CUDA if card else CPU)


@pytest.mark.parametrize("given", [{"precision": "bf16"}, {"weights": "bf16"}])
def test_bf16_trains_on_a_cpu_too(given, tmp_path):
    run = Run(tiny_arguments(tmp_path, steps=20, **given))
    result = run.run()
    assert result.after.nats < 0.9 * result.before.nats
    narrow = "weights" in given
    assert run.model.lm_head.weight.dtype == (torch.bfloat16 if narrow else torch.float32)


# ---- kernels ----

PLAIN = Needs(windows=False, documents=False, dropout=False, softcap=False, latent=False, half=True)


def needs(**given) -> Needs:
    return Needs(**{**vars(PLAIN), **given})


@pytest.mark.parametrize(
    ("installed", "capability", "asked", "chosen"),
    [
        (("triton",), (9, 0), PLAIN, "sdpa"),
        (("triton", "flash_attn_interface"), (9, 0), PLAIN, "flash3"),
        (("triton", "flash_attn_interface"), (9, 0), needs(documents=True), "sdpa"),
        (("triton", "flash_attn_interface"), (10, 0), PLAIN, "sdpa"),
        (("triton", "flash_attn_interface", "flash_attn.cute"), (9, 0), PLAIN, "flash4"),
        (("triton", "flash_attn_interface"), (9, 0), needs(half=False), "sdpa"),
        (("triton",), (9, 0), needs(windows=True), "sdpa"),
        (("triton",), (9, 0), needs(softcap=True), "flex"),
        ((), (9, 0), needs(softcap=True), "eager"),
    ],
)
def test_the_best_kernel_that_is_there_is_taken(installed, capability, asked, chosen, monkeypatch):
    gpu(monkeypatch, "a card", capability)
    monkeypatch.setattr(attention_tier.importlib.util, "find_spec", lambda name: name in installed or None)
    tier = choose_attention("auto", asked, CUDA)
    assert tier.name == chosen
    slow = "triton" not in installed and (asked.masked or asked.softcap)
    assert (tier.warning is not None) == slow


def test_windows_without_flex_attention_are_told_to_be_slow(monkeypatch):
    gpu(monkeypatch, "a card", (9, 0))
    monkeypatch.setattr(attention_tier.importlib.util, "find_spec", lambda name: None)
    assert "without Triton" in choose_attention("auto", needs(windows=True), CUDA).warning
    assert "T x T" in choose_attention("eager", PLAIN, CUDA).warning


@pytest.mark.parametrize(
    ("tier", "asked", "device", "sentence"),
    [
        ("flash3", PLAIN, CUDA, "flash_attn_interface is not installed .pip install flash-attn-3"),
        ("cudnn", needs(windows=True), CUDA, "it knows causal order alone"),
        ("cudnn", needs(half=False), CUDA, "is for bf16 and fp16"),
        ("flex", needs(dropout=True), CUDA, "flex attention has no attention dropout"),
        ("flash2", PLAIN, CPU, "it is for CUDA GPUs, and this is a CPU"),
        ("fast", PLAIN, CPU, "attention must be one of auto, flash4, .*got 'fast'"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(tier, asked, device, sentence, monkeypatch):
    gpu(monkeypatch, "a card", (9, 0))
    monkeypatch.setattr(attention_tier.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with pytest.raises(ValueError, match=sentence):
        choose_attention(tier, asked, device)


def test_what_a_model_needs_of_attention_is_read_from_it(tmp_path):
    run = Run(tiny_arguments(tmp_path, attention="eager", steps=1))
    assert run.model.config._attn_implementation == "eager"
    assert needs_of(run.model.config, 32, False, True) == PLAIN
    config = run.model.config
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 16
    assert needs_of(config, 32, False, True).windows and not needs_of(config, 16, False, True).windows


# ---- layouts ----


@pytest.mark.parametrize(
    ("processes", "given", "sentence"),
    [
        (1, {"tensor_parallel": 2}, r"tensor_parallel=2 does not divide the 1 process"),
        (
            4,
            {"tensor_parallel": 2},
            "tensor_parallel beside data parallelism is parallel=fsdp",
        ),
        (3, {"parallel": "hsdp", "shard_size": 2}, "shard_size=2 does not divide the 3 processes"),
        (4, {"parallel": "hsdp"}, "parallel=hsdp needs shard_size"),
        (4, {"shard_size": 2}, "shard_size=2 is for parallel=hsdp, got parallel=ddp"),
        (4, {"parallel": "zero"}, "parallel must be 'ddp', 'fsdp' or 'hsdp', got 'zero'"),
        (4, {"parallel": "fsdp", "expert_parallel": 3}, "expert_parallel=3 must divide the 4 process"),
        (2, {"context_parallel": 2}, "context_parallel=2: .*take shorter rows"),
        (2, {"expert_parallel": 0}, "expert_parallel must be at least 1, got 0"),
    ],
)
def test_what_processes_cannot_share_is_refused(processes, given, sentence):
    args = {"parallel": "ddp", "shard_size": None, "tensor_parallel": 1, "expert_parallel": 1}
    args = SimpleNamespace(**{**args, "context_parallel": 1, **given})
    with pytest.raises(ValueError, match=sentence):
        choose_layout(args, processes, 0)


def test_neighbours_share_tensors_and_see_the_same_rows():
    args = SimpleNamespace(
        parallel="fsdp", shard_size=None, tensor_parallel=2, expert_parallel=1, context_parallel=1
    )
    layouts = [choose_layout(args, 4, rank) for rank in range(4)]
    assert [layout.data_rank for layout in layouts] == [0, 0, 1, 1]
    assert {layout.data_size for layout in layouts} == {2} and layouts[0].shard_size == 2


# ---- single parts ----


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_layer_is_recomputed(every, tmp_path):
    run = Run(
        tiny_arguments(
            tmp_path,
            config=write_config(tmp_path, num_hidden_layers=4),
            gradient_checkpointing=True,
            gradient_checkpointing_every=every,
        )
    )
    recomputed = [layer.gradient_checkpointing for layer in run.model.model.layers]
    assert recomputed == [i % every == 0 for i in range(4)]


def test_an_older_library_recomputes_every_nth_layer_too(tmp_path):
    model = Run(tiny_arguments(tmp_path, config=write_config(tmp_path, num_hidden_layers=4))).model
    old = SimpleNamespace(
        base_model=model.model, gradient_checkpointing_enable=model.gradient_checkpointing_enable
    )
    checkpoint_layers(old, 3)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, False, True]


def test_the_norm_is_that_of_all_gradients_together():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    parameters += [torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 2.0)
    assert gradient_norm(parameters).item() == pytest.approx(5.0)


@pytest.mark.parametrize("knows", [True, False])
def test_an_optimizer_takes_no_step_where_it_is_told_not_to(knows):
    """Those of torch without the attribute are not called at all."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], fused=True)
    if knows:
        optimizer.found_inf = None
    for found, moved in ((1.0, False), (0.0, True)):
        p.grad = torch.ones(2)
        take_step(optimizer, torch.tensor(found))
        assert (p != 1).all().item() is moved
    assert getattr(optimizer, "found_inf", None) is None


def test_the_start_of_a_run_says_what_it_computes_with(tmp_path, capsys):
    Run(tiny_arguments(tmp_path, steps=1, optimizer="muon")).run()
    said = capsys.readouterr().out
    assert "precision: fp32 (CPU" in said and "attention: sdpa" in said and "not compiled" in said
    assert "optimizer: embeddings 12.3k adamw 0.003 | matrices " in said


def test_a_place_to_write_is_not_needed_to_make_a_run(tmp_path):
    Run(tiny_arguments(tmp_path))
    assert not Path(tmp_path / "run").exists()

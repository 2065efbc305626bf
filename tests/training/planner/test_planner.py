"""Plans: what they count, that what they advise fits, and what they refuse."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from tessera import TesseraConfig
from tessera.cli import app
from tessera.configs.presets import preset_names
from tessera.modeling.accounting import count_costs
from tessera.training.planner import make_plan, peak
from tessera.training.planner.cards import CARDS, find_card
from tessera.training.planner.memory import Setup, estimate_memory, take_inventory
from tessera.training.planner.report import report
from tessera.training.planner.request import plan_run
from tessera.training.planner.throughput import estimate_times, rates_of
from tessera.training.pretrain_arguments import gather_arguments

GIB = 2**30


@pytest.fixture(scope="module")
def llama():
    return TesseraConfig.from_preset("llama-100m")


@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "bytegpt-tiny", "gpt2-tiny"])
def test_inventory_and_costs_agree(name):
    config = TesseraConfig.from_preset(name)
    inventory, costs = take_inventory(config), count_costs(config)
    assert inventory.parameters == costs.parameters
    assert inventory.tables == costs.embedding
    dense = sum(rows * columns * count for (rows, columns), count in inventory.linears.items())
    experts = sum(rows * columns * count for (rows, columns), count in inventory.experts.items())
    assert dense + experts * (config.n_routed_experts or 0) == inventory.multiplied


def test_costs_of_short_rows_leave_out_what_they_do_not_see(llama):
    whole, short = count_costs(llama), count_costs(llama, 512)
    seen = 2 * llama.num_attention_heads * 2 * llama.head_dim * (2048 - 512) / 2
    assert whole.training_flops - short.training_flops == pytest.approx(3 * 14 * seen, rel=1e-6)


L135 = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32768}  # fmt: skip
L1100 = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
}
M688 = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 1,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "attention_type": "latent", "kv_lora_rank": 256,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "scoring_func": "sigmoid",
        "mlp_layer_types": ["dense"] + ["sparse"] * 11}  # fmt: skip
BF16 = {"weights": "bf16", "narrow_moments": True}
NO_DROPOUT = {"embd_pdrop": 0.0, "resid_pdrop": 0.0}  # as the preset was when it was measured


def model_of(preset, fields) -> TesseraConfig:
    return TesseraConfig.from_preset(preset, **fields) if preset else TesseraConfig(**fields)


# NVIDIA H200, torch 2.11.0, transformers 5.17.0, 2026-11-30, compiled; in GiB. The first two by
# `benchmarks/planner.py` and `training_step.py`, the next two by the latter on 2026-12-01, the others by the
# trainer, to a tenth.
@pytest.mark.parametrize(
    ("preset", "fields", "how", "measured"),
    [
        ("llama-100m", {}, Setup(None, 16, 32, 2048, "adamw"), 11.17),
        ("llama-100m", L135, Setup(None, 32, 32, 2048, "adamw", "bf16", narrow_moments=True), 19.54),
        (None, M688, Setup(None, 8, 8, 2048, "adamw", **BF16), 13.4),
        ("nanochat-d12", {}, Setup(None, 32, 32, 2048, "muon", "split"), 25.8),
        ("speedrun", NO_DROPOUT, Setup(None, 32, 32, 1024), 9.5),
        ("speedrun", NO_DROPOUT, Setup(None, 16, 32, 2048), 10.0),
        ("speedrun", NO_DROPOUT | {"depth": 8}, Setup(None, 32, 32, 1024), 6.2),
        ("speedrun", NO_DROPOUT | {"depth": 8}, Setup(None, 16, 32, 2048), 6.5),
    ],
)  # fmt: skip
def test_peak_memory_is_that_of_an_h200(preset, fields, how, measured):
    setup = dataclasses.replace(how, config=model_of(preset, fields))
    assert estimate_memory(setup).peak / GIB == pytest.approx(measured, rel=0.02)


# Tokens per second on an H200, torch 2.11.0: the first by `benchmarks/planner.py`, from whose kernels some
# constants come; the others by `benchmarks/training_step.py`, as in docs/causal_path.md.
@pytest.mark.parametrize(
    ("preset", "fields", "how", "measured"),
    [
        ("llama-100m", {}, Setup(None, 16, 32, 2048, "adamw"), 600_423),
        ("llama-100m", L135, Setup(None, 32, 32, 2048, "adamw", **BF16), 564_514),
        ("llama-100m", L1100, Setup(None, 4, 4, 4096, "adamw", **BF16), 76_398),
        (None, M688, Setup(None, 8, 8, 2048, "adamw", **BF16), 270_316),
        ("nanochat-d12", {}, Setup(None, 32, 32, 2048, "muon", "split"), 564_195),
    ],
)  # fmt: skip
def test_speed_is_that_of_an_h200(preset, fields, how, measured):
    config = model_of(preset, fields)
    setup = dataclasses.replace(how, config=config)
    times = estimate_times(setup, take_inventory(config), rates_of(CARDS["h200"], "bf16"))
    assert setup.tokens * setup.accumulation / times.step == pytest.approx(measured, rel=0.06)


def test_a_small_step_takes_as_long_as_the_host_launches():
    config, rates = TesseraConfig.from_preset("shakespeare"), rates_of(CARDS["h200"], "bf16")

    def parts_of(**how) -> dict[str, float]:
        return estimate_times(Setup(config, 1, 4, 64, **how), take_inventory(config), rates).parts

    recorded, launched, eager = parts_of(), parts_of(gpus=2), parts_of(compiled=False)
    waits = [parts["waiting for launches"] for parts in (recorded, launched, eager)]
    assert 0 < waits[0] < waits[1] < waits[2]
    busy = Setup(config, 4096, 4096, 256, compiled=False)
    assert "waiting for launches" not in estimate_times(busy, take_inventory(config), rates).parts


def test_more_of_anything_takes_more(llama):
    inventory = take_inventory(llama)
    base = Setup(llama, 4, 32, 1024, "adamw")

    def peak_of(**changes) -> float:
        return estimate_memory(dataclasses.replace(base, **changes), inventory).peak

    assert peak_of() < peak_of(micro_batch_size=8) < peak_of(micro_batch_size=16)
    assert peak_of() < peak_of(sequence_length=2048)
    assert peak_of() < peak_of(compiled=False)
    every = [peak_of(checkpoint_every=n) for n in (1, 2, 4, 0)]
    assert every == sorted(every)
    assert peak_of(weights="split") < peak_of()
    assert peak_of(optimizer="adamw-8bit") < peak_of()
    assert peak_of(gpus=4, sharded=True) < peak_of(gpus=2, sharded=True) < peak_of(gpus=2)
    rates = rates_of(CARDS["h200"], "bf16")
    seconds = [
        estimate_times(dataclasses.replace(base, sequence_length=n), inventory, rates).step
        for n in (256, 512, 1024, 2048)
    ]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("gpu", ["4090", "h100"])
def test_what_is_advised_fits(gpu):
    config = TesseraConfig.from_preset("verse-7b")
    plan = make_plan("verse-7b", config, gpu, batch_size=64, sequence_length=2048, optimizer="adamw")
    assert not plan.fits and plan.changes
    assert any(change.fits for change in plan.changes)
    for change in plan.changes:
        memory = estimate_memory(change.setup)
        assert change.fits == (memory.needed <= CARDS[gpu].memory)
        assert memory.needed < plan.memory.needed
    assert "what to change" in report(plan)


def test_a_smaller_micro_batch_is_advised_first(llama):
    plan = make_plan("llama-100m", llama, "t4", batch_size=64, micro_batch_size=64, sequence_length=2048)
    assert not plan.fits
    assert plan.changes[0].flags.startswith("--micro-batch-size") and plan.changes[0].fits


@pytest.mark.parametrize("name", sorted(set(preset_names()) - {"verse-70b", "nanochat-d20", "nanochat-d24"}))
def test_every_preset_has_a_plan(name):
    config = TesseraConfig.from_preset(name)
    text = report(make_plan(name, config, "a100-40gb", sequence_length=256))
    assert "GiB at the peak" in text and "tokens/s" in text


@pytest.mark.parametrize("gpu", sorted(CARDS))
def test_every_card_has_a_plan(gpu):
    plan = plan_run("llama-tiny", gpu=gpu, price=2.0).plan
    assert plan.hours > 0 and plan.fits
    assert plan.setup.precision == ("bf16" if "bf16" in CARDS[gpu].peaks else "fp16")
    assert f"${plan.hours * 2:,.2f}" in report(plan)


def test_a_recipe_is_planned_as_it_stands():
    told = gather_arguments({"data_file": "-"}, "gpt2-124m")
    plan = plan_run(None, "gpt2-124m", gpu="h200").plan
    for name in ("batch_size", "micro_batch_size", "sequence_length", "optimizer"):
        assert getattr(plan.setup, name) == getattr(told, name)
    assert plan_run(None, "gpt2-124m", gpu="h200", batch_size=64).plan.setup.batch_size == 64


def test_a_preset_alone_is_planned_in_half_a_million_tokens_a_step_and_the_flags_are_named():
    run = plan_run("llama-100m", gpu="h200")
    assert run.plan.step_tokens == 2**19 and run.plan.setup.sequence_length == 2048
    assert run.notes == (
        "chosen here: --batch-size 256 --sequence-length 2048; otherwise `tessera pretrain` takes 8 and 1024",
    )
    assert not plan_run("llama-100m", gpu="h200", batch_size=16, sequence_length=512).notes


def test_a_schedule_of_batches_is_counted_with_its_batches(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "config: llama-tiny\nsteps: 100\nbatch_schedule: {0: 8, 0.5: 24}\nsequence_length: 256\n"
    )
    run = plan_run(None, str(recipe), gpu="h200")
    assert run.plan.setup.batch_size == 24 and run.steps == 100
    assert run.plan.tokens == 100 * 16 * 256
    text = report(run.plan, run.steps, run.notes)
    assert "410k tokens, 100 steps" in text and "note    memory and speed are those of the schedule's" in text


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ({"parallel": "hsdp"}, "hsdp is planned as fsdp over all 4 cards"),
        ({"tensor_parallel": 2}, "tensor_parallel is not planned"),
        ({"epochs": 2, "tokens": None}, "20 tokens for each parameter are planned"),
        ({"length_schedule": "0:128,0.5:256", "steps": 9}, "as long as the longest, 256"),
    ],
)
def test_a_plan_says_what_it_plans_otherwise_than_it_would_be_run(recipe, note, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps({"config": "llama-tiny", "tokens": 10**6, **recipe}))
    (said,) = plan_run(None, str(tmp_path / "recipe.yaml"), gpu="h200", gpus=4).notes
    assert note in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["llamma-tiny"], "did you mean 'llama-tiny'"),
        (["llama-tiny", "--gpu", "h300"], "did you mean"),
        (["llama-tiny", "--gpu", "v100", "--precision", "bf16"], "has no bf16; take fp16 or fp32"),
        (["llama-tiny", "--tokens", "-3"], "tokens must be positive"),
        (["llama-tiny", "--sequence-length", "4096"], "longer than the model's context"),
        (["llama-tiny", "--optimizer", "sgd"], "optimizer must be"),
        (["llama-tiny", "--gpus", "3", "--batch-size", "8"], "does not divide"),
        (["llama-tiny", "--weights", "bf16", "--precision", "fp32", "--gpu", "h200"], "need precision bf16"),
        ([], "name a preset or --recipe"),
    ],
)
def test_wrong_input_gets_a_sentence(arguments, sentence):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ValueError)
    assert sentence in str(result.exception)


def test_figures_for_a_program():
    result = CliRunner().invoke(app, ["plan", "llama-tiny", "--gpu", "l4", "--json", "--price", "1"])
    figures = json.loads(result.stdout)
    assert figures["peak_bytes"] == pytest.approx(sum(figures["memory"].values()))
    assert figures["hours"] * 3600 * figures["tokens_per_second"] == pytest.approx(figures["tokens"])
    assert figures["cost"] == pytest.approx(figures["hours"])


def test_cards_are_found_however_they_are_spelled():
    assert find_card("NVIDIA H200").name == "h200"
    assert find_card("RTX 4090").name == "4090"
    assert find_card("Tesla T4").name == "t4"
    assert find_card("dgx spark").name == "gb10"


def test_the_peak_of_a_processor_is_measured_once():
    first = peak.measured_peak("cpu", torch.float32)
    assert first > 1e8
    assert peak.measured_peak(torch.device("cpu"), torch.float32) == first
    assert peak.measured_peak("meta", torch.float32) is None

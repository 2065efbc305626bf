"""Experts balanced by their bias: what is counted, when the bias moves, and in which loops."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_config
from helpers.weights import randomize
from transformers import Trainer, TrainingArguments

from tessera import TesseraForCausalLM
from tessera.modeling.balancing import router_statistics, update_router_biases
from tessera.modeling.feed_forward import TesseraRouter

MOE = "latent-sliding-lowrank-sigmoid"
SPEED = 0.125  # exact in binary, so that sums of steps are too


def live_model(seed: int = 0, **overrides) -> TesseraForCausalLM:
    config = tiny_config(MOE, router_bias_update_speed=SPEED, **overrides)
    return randomize(TesseraForCausalLM(config), seed).train()


def routers(model) -> list[TesseraRouter]:
    return [module for module in model.modules() if isinstance(module, TesseraRouter)]


def biases(model) -> torch.Tensor:
    return torch.stack([router.e_score_correction_bias for router in routers(model)]).clone()


def tokens(rows: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(250, (rows, length), generator=torch.Generator().manual_seed(seed))


def chosen(model, batches: list[dict]) -> torch.Tensor:
    """Choices of each expert [routers, E] over batches, padding left out: by listening to the routers."""
    counts = torch.zeros(len(routers(model)), model.config.n_routed_experts)
    keep = None

    def listen(i):
        def hook(router, args, output):
            one_hot = F.one_hot(output[2], router.num_experts).sum(1)
            counts[i] += (one_hot * keep.flatten()[:, None]).sum(0)

        return hook

    handles = [router.register_forward_hook(listen(i)) for i, router in enumerate(routers(model))]
    with torch.no_grad():
        for batch in batches:
            keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def train_on(model, optimizer, batches: list[dict]) -> None:
    for batch in batches:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_after_a_step_of_several_batches_the_bias_moves_towards_an_even_load():
    model = live_model()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    batches = [{"input_ids": tokens(3)}, {"input_ids": tokens(2, seed=1), "attention_mask": mask}]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        load, before = chosen(model, batches), biases(model)
        train_on(model, optimizer, batches)
        assert load.sum(1).tolist() == [2 * (36 + 19)] * 2
        torch.testing.assert_close(biases(model), before + SPEED * torch.sign(load.mean(1)[:, None] - load))


def test_only_what_is_trained_on_counts():
    model = live_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": tokens(2)}
    load, before = chosen(model, [batch]), biases(model)
    other = tokens(4, seed=5)
    with torch.no_grad():
        model(other)  # as reinforcement scores completions: in training mode
        model.generate(other[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.eval()
    model(other, labels=other).loss.backward()
    model.train()
    train_on(model, optimizer, [batch])
    torch.testing.assert_close(biases(model), before + SPEED * torch.sign(load.mean(1)[:, None] - load))


def test_frozen_routers_stay_as_they_are_unless_asked():
    model = live_model()
    for router in routers(model):
        router.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = {"input_ids": tokens(2)}
    load, before = chosen(model, [batch]), biases(model)
    train_on(model, optimizer, [batch])
    assert torch.equal(biases(model), before)
    update_router_biases(model)
    torch.testing.assert_close(biases(model), before + SPEED * torch.sign(load.mean(1)[:, None] - load))


def test_a_speed_of_zero_leaves_the_bias_alone():
    model = live_model()
    model.config.router_bias_update_speed = 0.0
    before = biases(model)
    train_on(model, torch.optim.SGD(model.parameters(), lr=0.1), [{"input_ids": tokens(2)}])
    assert torch.equal(biases(model), before)
    assert model.router_statistics()


def test_each_model_moves_with_its_own_optimizer():
    policy = live_model()
    reference, thawed = copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))
    batch = {"input_ids": tokens(2)}
    start = biases(policy)
    for model in (policy, reference, thawed):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert torch.equal(biases(policy), start) and torch.equal(biases(thawed), start)
    assert not torch.equal(biases(reference), start)
    torch.optim.SGD(thawed.parameters(), lr=0.1).step()
    assert torch.equal(biases(policy), start) and torch.equal(biases(thawed), biases(reference))


def test_a_step_that_the_gradient_scaler_skips_moves_nothing():
    model = live_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = biases(model)
    for broken in (True, False):
        loss = model(tokens(2), labels=tokens(2), use_cache=False).loss
        scaler.scale(loss * float("inf") if broken else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(biases(model), before) == broken


def test_the_bias_keeps_its_precision_in_a_model_of_half_the_precision():
    model = live_model().to(torch.bfloat16)
    expected = torch.tensor([0.3, 0.30001, -1.0, 2.0])
    router = routers(model)[0]
    router.e_score_correction_bias.copy_(expected)
    model.half().bfloat16()
    assert torch.equal(router.e_score_correction_bias, expected)
    assert "e_score_correction_bias" in dict(router.named_buffers()) and router.weight.dtype == torch.bfloat16


def test_choices_under_autocast_are_those_of_fp32():
    router = routers(live_model())[0]
    with torch.no_grad():
        # Scores so close that bf16 cannot tell them apart.
        router.weight.copy_(router.weight[:1] + 1e-4 * router.weight)
        router.e_score_correction_bias.zero_()
    x = torch.randn(64, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    scores = F.linear(x.double(), router.weight.double()).sigmoid()
    grouped = scores.view(64, 2, 2).sum(-1).argmax(-1)
    expected = torch.stack([2 * grouped, 2 * grouped + 1], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, indices = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(indices.sort(-1).values, expected)


def test_statistics_are_those_of_the_last_step():
    model = live_model()
    assert model.router_statistics() == []
    batch = {"input_ids": tokens(3)}
    load = chosen(model, [batch])
    router, logits = routers(model)[0], []
    handle = router.register_forward_hook(lambda module, args, output: logits.append(output[0].detach()))
    train_on(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch])
    handle.remove()
    first, second = router_statistics(model)
    assert first["name"] == "model.layers.1.mlp.gate" and second["name"] == "model.layers.3.mlp.gate"
    torch.testing.assert_close(torch.stack([first["load"], second["load"]]), load / load.sum(1, keepdim=True))
    assert first["max_violation"] == pytest.approx((load[0].max() / load[0].mean() - 1).item())
    shares = logits[0].sigmoid() / logits[0].sigmoid().sum(-1, keepdim=True)
    entropy = torch.distributions.Categorical(probs=shares).entropy().mean()
    assert first["entropy"] == pytest.approx(entropy.item(), rel=1e-5)


def test_an_uneven_load_becomes_even():
    model = live_model(router_aux_loss_coef=0.0)
    model.config.router_bias_update_speed = 0.02
    with torch.no_grad():
        for router in routers(model):
            router.e_score_correction_bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    violations = []
    for step in range(60):
        train_on(model, optimizer, [{"input_ids": tokens(4, length=16, seed=step)}])
        violations.append(max(layer["max_violation"] for layer in model.router_statistics()))
    assert violations[0] == 1.0  # two of four experts take everything
    assert sum(violations[-10:]) / 10 < 0.5


def trainer(model, folder, **given) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, seed=3)]
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **given,
    }
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=rows)


def test_the_stock_trainer_moves_biases_and_resumes_bit_for_bit(tmp_path):
    model = live_model()
    start = biases(model)
    trainer(model, tmp_path).train()
    moved = ((biases(model) - start) / SPEED).round()
    # Three steps up or down, and not six, one for each micro-batch.
    assert set(moved.abs().flatten().tolist()) <= {1, 3}
    resumed = live_model(seed=9)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_move_biases_by_the_load_of_both(kind):
    """Each process sees half the rows, in two micro-batches; the result is that of one process with all."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *launch, str(tests / "helpers" / "balanced_processes.py"), kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2

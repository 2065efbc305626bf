"""bf16 weights that learn as fp32 ones do, and AdamW's moments in eight bits."""

import math

import pytest
import torch
from helpers.models import tiny_model
from torch import nn

from tessera.training.optimizers import adamw, build_optimizer, low_precision
from tessera.training.optimizers.low_precision import join, key_of, random_bits, round_by_chance, split
from tessera.training.optimizers.mixed import MuonAdamW


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(count: int, step: int = 0, first: int = 0, name: str = "w") -> torch.Tensor:
    return random_bits(count, key_of(0, name), step, first, torch.device("cpu"))


def test_chance_is_uniform_and_its_own_for_each_step_parameter_and_place():
    drawn = bits(2**18)
    assert drawn.min() >= 0 and drawn.max() < 2**16
    # Chi-squared of 256 bins: mean 255, deviation sqrt(510).
    counts = torch.bincount(drawn >> 8, minlength=256).double()
    assert abs(((counts - 1024) ** 2 / 1024).sum() - 255) < 5 * 510**0.5
    others = [bits(2**18, step=1), bits(2**18, name="v"), bits(2**18, first=1), drawn.roll(1)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]).double())[0, 1])) < 0.01
    assert torch.equal(bits(100, first=2**18 - 100), drawn[-100:])


def test_rounding_by_chance_is_right_on_average():
    """Mean of 1024 roundings within four of its standard deviations, of numbers of all sizes."""
    values = random(64) * torch.logspace(-20, 20, 64)
    rounded = torch.stack([round_by_chance(values, bits(64, step=step)).double() for step in range(1024)])
    spacing = rounded.amax(0) - rounded.amin(0)
    assert (spacing > 0).all()
    assert ((rounded.mean(0) - values.double()).abs() <= 4 * 0.5 * spacing / math.sqrt(1024)).all()
    exact = values.bfloat16().float()
    assert torch.equal(round_by_chance(exact, bits(64)).float(), exact)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    assert torch.equal(round_by_chance(odd, bits(4)).nan_to_num(7), odd.bfloat16().nan_to_num(7))


def test_a_split_number_is_the_nearest_one_and_what_is_missing():
    values = torch.cat([random(10_000) * torch.logspace(-38, 38, 10_000), torch.zeros(3), torch.ones(3)])
    high, low = split(values)
    assert low.dtype is torch.int16 and torch.equal(join(high, low), values)
    nearest = values.bfloat16()
    assert ((high.double() - values.double()).abs() <= (nearest.double() - values.double()).abs()).all()


def train(weights: str, steps: int = 20, moments=torch.float32, kind: str = "adamw", **group):
    params = [nn.Parameter(random(48, 96).bfloat16()), nn.Parameter(random(65, seed=1).bfloat16())]
    groups = [{"params": params, "lr": 3e-3, "weight_decay": 0.1, "kind": kind, **group}]
    optimizer = MuonAdamW(groups, weights, moments)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=10 * step + i).bfloat16()
        optimizer.step()
    return params, optimizer


def test_split_weights_equal_those_of_an_fp32_master_to_the_bit():
    params, optimizer = train("split", betas=(0.9, 0.99))
    masters = [nn.Parameter(random(48, 96).bfloat16().float())]
    masters.append(nn.Parameter(random(65, seed=1).bfloat16().float()))
    theirs = torch.optim.AdamW(masters, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.99), fused=True)
    for step in range(20):
        for i, p in enumerate(masters):
            p.grad = random(*p.shape, seed=10 * step + i).bfloat16().float()
        theirs.step()
    for p, master in zip(params, masters, strict=True):
        assert torch.equal(join(p.detach(), optimizer.state[p]["remainder"]), master.detach())


def test_split_weights_under_muon_equal_those_in_fp32_to_the_bit():
    runs = []
    for weights in ("split", "fp32"):
        p = nn.Parameter(random(48, 96).bfloat16())
        if weights == "fp32":
            p = nn.Parameter(p.detach().float())
        optimizer = MuonAdamW([{"params": [p], "kind": "muon", "lr": 0.02, "weight_decay": 0.1}], weights)
        for step in range(10):
            p.grad = random(48, 96, seed=step).bfloat16().to(p.dtype)
            optimizer.step()
        runs.append(p.detach() if weights == "fp32" else join(p.detach(), optimizer.state[p]["remainder"]))
    torch.testing.assert_close(*runs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_tiny_updates_move_weights_by_chance_as_far_as_fp32_ones(kind):
    """Each step is a tenth of what bf16 can say or less; rounded to the nearest, nothing would move."""
    moved = {}
    for weights in ("fp32", "bf16", "nearest"):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.float32 if weights == "fp32" else torch.bfloat16))
        group = {"params": [p], "kind": kind, "lr": 2e-4 if kind == "adamw" else 1e-3}
        optimizer = MuonAdamW([group], "bf16" if weights == "bf16" else "fp32")
        direction = random(64, 64).sign() if kind == "adamw" else torch.linalg.qr(random(64, 64))[0]
        for _ in range(400):
            p.grad = direction.to(p.dtype)
            optimizer.step()
        moved[weights] = float(((p.detach().float() - 1) * direction).sum())
    assert moved["bf16"] == pytest.approx(moved["fp32"], rel=0.02)
    assert abs(moved["nearest"]) < 0.6 * abs(moved["fp32"])


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["bf16", "split"])
def test_the_program_for_the_gpu_does_what_the_reference_does(weights, moments):
    """`narrow_program`, run as it is, against torch's fused kernel between widening and narrowing. Products
    are rounded in another order, so a few numbers in a thousand fall on the other side."""
    group = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (random(5000).bfloat16() for _ in range(2))
    states = [{}, {}]
    for weight, state in zip((ours, theirs), states, strict=True):
        adamw.start_state(weight, state, weights, moments)
    key = key_of(0, "w")
    for step in range(5):
        grad = random(5000, seed=step).bfloat16()
        adamw.update_narrow(theirs, grad, states[1], group, None, key, 10)
        states[0]["step"] += 1
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        adamw.narrow_program(
            ours,
            grad,
            states[0]["exp_avg"],
            states[0]["exp_avg_sq"],
            states[0].get("remainder"),
            states[0]["step"],
            *map(torch.tensor, numbers),
            None,
            torch.tensor(key, dtype=torch.int32),
            torch.tensor(10, dtype=torch.int32),
        )
    values = [low_precision.load(w, s.get("remainder")) for w, s in zip((ours, theirs), states, strict=True)]
    if weights == "split":
        torch.testing.assert_close(*values, atol=2e-6 if moments is torch.float32 else 1e-3, rtol=2e-6)
    else:
        assert (values[0] != values[1]).float().mean() < 0.01
    torch.testing.assert_close(states[0]["exp_avg"], states[1]["exp_avg"], atol=1e-6, rtol=1e-2)


def test_chance_comes_out_the_same_when_a_run_is_resumed_and_otherwise_not():
    (first, _), (again, _) = train("bf16"), train("bf16")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    params = [nn.Parameter(random(48, 96).bfloat16()), nn.Parameter(random(65, seed=1).bfloat16())]
    optimizer = MuonAdamW([{"params": params, "lr": 3e-3, "weight_decay": 0.1}], "bf16", seed=1)
    for step in range(20):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=10 * step + i).bfloat16()
        optimizer.step()
    assert not torch.equal(params[0], first[0])


def test_a_model_is_made_narrow_but_for_its_buffers():
    model = tiny_model("latent-sliding-lowrank-sigmoid")
    optimizer = build_optimizer(model, weights="split")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.float32 in {buffer.dtype for buffer in model.buffers()}
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    for given in ({"weights": "int8"}, {"moments": "fp8"}):
        with pytest.raises(ValueError, match="must be"):
            build_optimizer(model, **given)


def test_moments_in_eight_bits_train_as_whole_ones_do():
    """A regression that AdamW solves; bitsandbytes keeps two bytes of state for a number instead of eight."""
    inputs, answer = random(512, 64), random(64, 128, seed=1)
    losses, sizes = {}, {}
    for kind in ("adamw", "adamw-8bit"):
        p = nn.Parameter(torch.zeros(64, 128))
        bias = nn.Parameter(torch.zeros(128))
        optimizer = MuonAdamW([{"params": [p, bias], "kind": kind, "lr": 0.03}])
        for _ in range(150):
            loss = (inputs @ p + bias - inputs @ answer - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = float(loss.detach())
        sizes[kind] = sum(value.nbytes for value in optimizer.state[p].values())
        assert optimizer.state[bias]["exp_avg"].dtype is torch.float32
    assert losses["adamw-8bit"] < 0.05 and losses["adamw"] < 0.05
    assert sizes["adamw-8bit"] < 0.3 * sizes["adamw"]


def test_the_missing_library_of_eight_bits_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        build_optimizer(tiny_model("llama-tiny"), "adamw-8bit")


@pytest.mark.parametrize(("kind", "weights"), [("muon", "fp32"), ("adamw-8bit", "bf16")])
def test_bf16_moments_are_refused_where_they_would_not_be_taken(kind, weights):
    with pytest.raises(ValueError, match=f"got weights '{weights}' and optimizer '{kind}'"):
        build_optimizer(tiny_model("llama-tiny"), kind, weights=weights, moments="bf16")

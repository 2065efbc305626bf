"""Muon and AdamW against their definitions and against torch."""

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_model
from torch import nn

from tessera.training.optimizers import POLAR_EXPRESS, MuonAdamW, build_optimizer, orthogonalize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 64, 128), (2, 128, 64), (2, 3, 32, 96), (1, 48, 48)])
def test_orthogonalized_matrices_are_near_the_polar_factor(shape):
    """U V^T of the SVD in fp64, as far as five steps get: all singular values that were not tiny come near
    one."""
    matrices = random(*shape)
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    result = orthogonalize(matrices).double()
    assert result.shape == matrices.shape
    values = torch.diagonal(u.mT @ result @ vt.mT, dim1=-2, dim2=-1)
    large = s > 0.05 * s.amax(-1, keepdim=True)
    assert (values - 1).abs()[large].max() < 0.15
    # Singular vectors stay: nothing off the diagonal.
    torch.testing.assert_close(u.mT @ result @ vt.mT, torch.diag_embed(values), atol=1e-4, rtol=0)


def reference_muon(weight, grads, lr, momentum, weight_decay):
    """One matrix at a time in fp64, with the iteration written out."""
    weight, buffer = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        x = momentum * buffer + (1 - momentum) * grad.double()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (1.01 * x.norm() + 1e-7)
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        x = x.T if tall else x
        weight *= 1 - lr * weight_decay
        weight -= lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x
    return weight


@pytest.mark.parametrize("parts", [1, 2])
def test_muon_equals_its_definition_for_single_stacked_and_fused_matrices(parts):
    shapes = [(64, 32), (64, 32), (32, 64), (3, 64, 32)]
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    start = [p.detach().clone() for p in params]
    optimizer = MuonAdamW(
        [{"params": params, "kind": "muon", "lr": 0.02, "parts": parts, "weight_decay": 0.1}]
    )
    grads = [[random(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)] for step in range(3)]
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    for i, p in enumerate(params):
        history = [step[i] for step in grads]
        expected = torch.empty_like(p)
        for index in range(p.shape[0]) if p.ndim == 3 else [...]:
            halves = zip(
                start[i][index].chunk(parts),
                zip(*(grad[index].chunk(parts) for grad in history), strict=True),
                strict=True,
            )
            expected[index] = torch.cat(
                [reference_muon(w, list(g), 0.02, 0.95, 0.1) for w, g in halves]
            ).float()
        torch.testing.assert_close(p.detach(), expected, atol=2e-5, rtol=1e-4)


def test_muon_moves_as_torch_muon_does():
    """torch iterates other coefficients in bf16, so the updates agree in direction and not in each digit."""
    ours, theirs = (nn.Parameter(random(64, 128)) for _ in range(2))
    start = ours.detach().clone()
    optimizers = (
        MuonAdamW([{"params": [ours], "kind": "muon", "lr": 0.02}]),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0),
    )
    for step in range(4):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = random(64, 128, seed=step)
            optimizer.step()
    a, b = (ours.detach() - start).flatten(), (theirs.detach() - start).flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.97
    assert 0.8 < a.norm() / b.norm() < 1.25


def test_adamw_equals_torch_adamw():
    shapes = [(8, 4), (5,), ()]
    ours, theirs = (
        [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2)
    )
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    optimizers = MuonAdamW([{"params": ours, **settings}]), torch.optim.AdamW(theirs, **settings)
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * step + i)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_parameter_is_in_one_group(name, kind):
    model = tiny_model(name)
    grouped = [p for group in build_optimizer(model, kind).param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_muon_takes_the_matrices_of_the_layers_and_nothing_else(name):
    model = tiny_model(name)
    taken = {p for g in build_optimizer(model).param_groups if g["kind"] == "muon" for p in g["params"]}
    projections = (
        "_proj.weight",
        "kv_a_proj_with_mqa.weight",
        ".gate_up_proj",
        ".experts.down_proj",
        ".experts.up_proj",
    )
    expected = {p for n, p in model.named_parameters() if n.endswith(projections)}
    assert taken == expected
    fused = {p for g in build_optimizer(model).param_groups if g.get("parts") == 2 for p in g["params"]}
    assert fused == {p for n, p in model.named_parameters() if n.endswith("gate_up_proj")}


def test_one_learning_rate_scales_all_groups():
    model = tiny_model("nanochat-tiny")
    default = {g["name"]: g["lr"] for g in build_optimizer(model).param_groups}
    doubled = {g["name"]: g["lr"] for g in build_optimizer(model, learning_rate=0.04).param_groups}
    assert default["matrices"] == 0.02
    assert doubled == pytest.approx({name: 2 * rate for name, rate in default.items()})


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="must be 'muon' or 'adamw', got 'sgd'"):
        build_optimizer(tiny_model("llama-tiny"), "sgd")


def test_a_model_with_nanochats_start_learns_at_nanochats_rates():
    """The table in nanochat's setup_optimizer, for the width that its rates are given for."""
    groups = {g["name"]: g for g in build_optimizer(tiny_model("nanochat-tiny")).param_groups}
    rates = {name: groups[name]["lr"] for name in ("matrices", "embeddings", "value embeddings", "head")}
    assert rates == {"matrices": 0.02, "embeddings": 0.3, "value embeddings": 0.15, "head": 0.008}
    assert groups["embeddings"]["betas"] == (0.8, 0.95)

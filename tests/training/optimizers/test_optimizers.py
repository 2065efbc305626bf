"""Muon and AdamW against their definitions and against torch."""

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessera.training.optimizers import MuonAdamW, build_optimizer
from tessera.training.optimizers.muon import FEATURES, POLAR_EXPRESS, orthogonalize


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


def reference_muon(weight, grads, lr, momentum, weight_decay, features=FEATURES, beta2=0.9):
    """One matrix at a time in fp64, from the papers' formulas."""
    weight, buffer = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    m, n = weight.shape
    second = torch.zeros(m if m >= n else n, dtype=torch.float64)
    for grad in grads:
        grad = grad.double()
        buffer = momentum * buffer + (1 - momentum) * grad
        x = momentum * buffer + (1 - momentum) * grad
        if "equilibrate" in features:  # D^-1 X with D the rows' norms
            x = torch.diag(1 / x.norm(dim=1)) @ x
        x = x / (1.01 * x.norm())
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        if "renormalize" in features:
            x = x * min(m, n) ** 0.5 / x.norm()
        if "normuon" in features:  # of each neuron, or each input of a wide matrix
            squares = (x**2).mean(1) if m >= n else (x**2).mean(0)
            second = beta2 * second + (1 - beta2) * squares
            evened = x / (second.sqrt()[:, None] if m >= n else second.sqrt()[None])
            x = evened * x.norm() / evened.norm()
        rate = lr * max(1, m / n) ** 0.5
        decayed = weight * (x * weight >= 0) if "cautious" in features else weight
        weight = weight - rate * x - rate * weight_decay * decayed
    return weight


def updated_by_reference(start, history, parts, **settings):
    """A parameter, perhaps a stack, of which each matrix holds `parts` that share its rows."""
    matrices, grads = start.reshape(-1, *start.shape[-2:]), [g.reshape(-1, *g.shape[-2:]) for g in history]
    done = []
    for i, matrix in enumerate(matrices):
        halves = [
            reference_muon(half, [g[i].chunk(parts)[k] for g in grads], **settings)
            for k, half in enumerate(matrix.chunk(parts))
        ]
        done.append(torch.cat(halves))
    return torch.stack(done).view_as(start)


FEATURE_SETS = [FEATURES, (), *[tuple(f for f in FEATURES if f != left) for left in FEATURES]]


@pytest.mark.parametrize("features", FEATURE_SETS, ids=lambda features: "+".join(features) or "none")
@pytest.mark.parametrize("parts", [1, 2])
def test_muon_equals_its_definition_for_single_stacked_and_fused_matrices(parts, features):
    shapes = [(64, 32), (64, 32), (32, 64), (3, 64, 32)]
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    start = [p.detach().clone() for p in params]
    group = {"params": params, "kind": "muon", "lr": 0.02, "parts": parts, "weight_decay": 0.1}
    optimizer = MuonAdamW([group | {"features": features}])
    grads = [[random(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)] for step in range(3)]
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "features": features}
    for i, p in enumerate(params):
        expected = updated_by_reference(start[i], [step[i] for step in grads], parts, **settings)
        torch.testing.assert_close(p.detach().double(), expected, atol=2e-5, rtol=1e-4)


def test_the_momentum_of_a_group_counts_step_by_step():
    """Schedules set it; a step with momentum 0 follows the gradient alone."""
    moved = []
    for momenta in ((0.95, 0.95), (0.95, 0.0)):
        p = nn.Parameter(random(32, 48))
        optimizer = MuonAdamW([{"params": [p], "kind": "muon", "lr": 0.02}])
        for seed, momentum in enumerate(momenta):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = random(32, 48, seed=seed)
            before = p.detach().clone()
            optimizer.step()
        moved.append(before - p.detach())
    alone = reference_muon(torch.zeros(32, 48), [random(32, 48, seed=1)], 0.02, 0.0, 0.0, features=())
    agreement = [float(torch.cosine_similarity(-alone.flatten(), m.double().flatten(), dim=0)) for m in moved]
    assert agreement[1] > 0.98 > agreement[0]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "split"])
def test_where_a_gradient_is_infinite_nothing_changes(weights, compiled):
    """Neither weights nor state, and the steps after it go on as if it had not been; on a GPU without a wait,
    which is what happens here when the optimizer is not let see that the number lies on the CPU."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    runs = []
    for bad_step in (None, 1):
        params = [nn.Parameter(random(48, 32).to(dtype)), nn.Parameter(random(700).to(dtype))]
        groups = [
            {"params": params[:1], "kind": "muon", "lr": 0.02, "weight_decay": 0.1},
            {"params": params[1:], "lr": 0.01, "weight_decay": 0.1},
        ]
        optimizer = MuonAdamW(groups, weights, compiled=compiled)
        seeds = [0, 1, 2] if bad_step is None else [0, None, 1, 2]
        for seed in seeds:
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * (seed or 0) + i).to(dtype)
                if seed is None:
                    p.grad[0] = float("inf")
            optimizer.found_inf = OnTheDevice(torch.tensor(float(seed is None)))
            optimizer.step()
        state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]
        runs.append(([p.detach() for p in params], state))
    torch.testing.assert_close(*runs, atol=0, rtol=0)


def test_the_host_does_not_wait_for_the_device():
    """No operator takes a tensor of the host beside those of a device, or reads one: torch would copy it and
    wait for all that is queued. Programs are compiled for numbers on the host and left out here."""
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(shape)) for shape in ((48, 32), (48, 32), (64, 32), (700,))]
    groups = [
        {"params": params[:3], "kind": "muon", "lr": 0.02, "weight_decay": 0.1},
        {"params": params[3:], "lr": 0.01, "weight_decay": 0.1},
    ]
    optimizer = MuonAdamW(groups, compiled=True)
    called = []
    optimizer.program = lambda function, *_: lambda *_, **__: called.append(function.__name__)
    for found_inf in (None, torch.zeros((), device="meta")):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.found_inf = found_inf
        with Apart() as seen:
            optimizer.step()
        assert seen.operators
    assert called == ["_update"] * 4  # two shapes, twice


class Apart(TorchDispatchMode):
    """Counts operators, and refuses those that wait."""

    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) < 2 and "_local_scalar" not in str(function), function
        self.operators += 1
        return function(*args, **kwargs or {})


class OnTheDevice(torch.Tensor):
    """A number on the CPU that says it lies elsewhere."""

    @staticmethod
    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    @property
    def device(self):
        return torch.device("meta")

    def __gt__(self, other):
        return self.as_subclass(torch.Tensor) > other


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
    with pytest.raises(ValueError, match="must be 'muon', 'adamw' or 'adamw-8bit', got 'sgd'"):
        build_optimizer(tiny_model("llama-tiny"), "sgd")


def test_a_model_with_nanochats_start_learns_at_nanochats_rates():
    """The table in nanochat's setup_optimizer, for the width that its rates are given for."""
    groups = {g["name"]: g for g in build_optimizer(tiny_model("nanochat-tiny")).param_groups}
    rates = {name: groups[name]["lr"] for name in ("matrices", "embeddings", "value embeddings", "head")}
    assert rates == {"matrices": 0.02, "embeddings": 0.3, "value embeddings": 0.15, "head": 0.008}
    settings = {
        name: (group["betas"], group["weight_decay"])
        for name, group in groups.items()
        if name in rates and name != "matrices"
    }
    assert settings == {
        "embeddings": ((0.8, 0.995), 0.001),
        "value embeddings": ((0.8, 0.995), 0.01),
        "head": ((0.8, 0.96), 0.01),
    }


def test_tables_decay_as_told():
    def decays(**how):
        groups = build_optimizer(tiny_model("nanochat-tiny"), "muon", 0.02, 0.1, **how).param_groups
        return {group["name"]: group["weight_decay"] for group in groups}

    usual, told = decays(), decays(table_decay=0.5)
    assert (usual["value embeddings"], usual["embeddings"]) == (0.01, 0.001)
    assert (told["value embeddings"], told["embeddings"]) == (0.5, 0.05)
    for name in ("matrices", "head", "scalars"):
        assert told[name] == usual[name]
    with pytest.raises(ValueError, match="table_decay is of the tables beside muon; optimizer 'adamw'"):
        build_optimizer(tiny_model("nanochat-tiny"), "adamw", table_decay=0.5)

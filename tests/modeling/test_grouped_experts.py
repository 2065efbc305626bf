"""Grouped products over sorted tokens against the loop over experts, with every gradient."""

import pytest
import torch
from helpers.models import tiny_model

from tessera.modeling.feed_forward import TesseraExperts, TesseraUngatedExperts
from tessera.modeling.grouped_experts import grouped_experts, takes_grouped_products


def problem(name: str, dtype: torch.dtype = torch.float32):
    """Experts of a tiny model with random weights, tokens, and two choices a token; expert 1 gets none."""
    model = tiny_model(name)
    experts = next(m for m in model.modules() if isinstance(m, (TesseraExperts, TesseraUngatedExperts)))
    experts = experts.to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    x = torch.randn(40, experts.hidden_dim, generator=generator).to(dtype).requires_grad_()
    choices = torch.tensor([e for e in range(experts.num_experts) if e != 1])
    rows = [choices[torch.randperm(len(choices), generator=generator)[:2]] for _ in range(40)]
    weights = torch.rand(40, 2, generator=generator).requires_grad_()
    return experts, x, torch.stack(rows), weights


@pytest.mark.parametrize("name", ["bytegpt-tiny", "nanochat-moe-smear-gqa"])
def test_outputs_and_gradients_are_those_of_the_loop(name):
    experts, x, indices, weights = problem(name)
    inputs = (x, weights, *experts.parameters())
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    expected = experts._loop(x, indices, weights)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    found = grouped_experts(experts, x, indices, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, upstream), wanted, rtol=1e-5, atol=2e-5)


def test_autocast_makes_the_products_in_bf16_and_the_gradients_in_fp32():
    experts, x, indices, weights = problem("bytegpt-tiny")
    inputs = (x, weights, *experts.parameters())
    wanted = torch.autograd.grad(experts._loop(x, indices, weights).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_experts(experts, x, indices, weights)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert out.dtype == torch.float32 and all(g.dtype == torch.float32 for g in found)
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).norm() < 0.02 * w.norm()


def test_it_compiles_as_one_graph():
    experts, x, indices, weights = problem("bytegpt-tiny", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    out = compiled(experts, x, indices, weights)
    expected = experts._loop(x, indices, weights)
    assert (out - expected).float().norm() < 0.01 * expected.float().norm()
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in experts.parameters())


def test_a_cpu_and_other_implementations_are_the_librarys():
    experts, x, *_ = problem("bytegpt-tiny", torch.bfloat16)
    assert not takes_grouped_products(experts, x)

"""What runs on a GPU alone in a training step, against float64 and against the library's own path."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_model

from tessera.modeling.feed_forward import TesseraExperts
from tessera.modeling.grouped_experts import grouped_experts, takes_grouped_products
from tessera.modeling.loss import linear_cross_entropy
from tessera.modeling.loss_kernel import HAS_TRITON, logits_to_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not HAS_TRITON, reason="needs a GPU and Triton"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [37, 4096, 9001, 32768])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (15.0, 0.0), (None, 1e-2), (15.0, 1e-2)])
def test_the_kernel_of_the_loss_equals_float64(dtype, vocabulary, softcap, z_loss):
    torch.manual_seed(0)
    logits = (4 * torch.randn(50, vocabulary, device="cuda")).to(dtype)
    targets = torch.randint(0, vocabulary, (50,), device="cuda")
    targets[::7] = -100
    exact = logits.double().requires_grad_()
    scores = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    nats = F.cross_entropy(scores, targets, reduction="none")
    expected = nats + z_loss * torch.where(targets == -100, 0.0, scores.logsumexp(1) ** 2)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    losses = torch.empty(50, device="cuda")
    logits_to_gradient(logits, targets, losses, softcap, z_loss, -100)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(logits.double(), wanted, rtol=rounding, atol=1e-6)


def test_an_id_beyond_the_vocabulary_makes_the_loss_nan():
    losses = torch.empty(2, device="cuda")
    targets = torch.tensor([3, 64], device="cuda")
    logits_to_gradient(torch.randn(2, 64, device="cuda"), targets, losses, None, 0.0, -100)
    assert losses[0].isfinite() and losses[1].isnan()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_loss_and_gradients_in_bf16_are_near_those_in_float64(softcap, large, monkeypatch):
    monkeypatch.setattr("tessera.modeling.loss.LARGE_HEAD", 1 if large else 2**40)
    monkeypatch.setattr("tessera.modeling.loss.FEWEST_TOKENS", 256)
    monkeypatch.setattr("tessera.modeling.loss.LOGITS_AT_A_TIME", 1)
    torch.manual_seed(0)
    hidden = torch.randn(1000, 128, device="cuda").bfloat16().requires_grad_()
    # Logits of about one: bf16 cannot say larger ones to better than a few percent of a probability.
    weight = (0.1 * torch.randn(3000, 128, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(0, 3000, (1000,), device="cuda")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    scores = exact[0] @ exact[1].t()
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = F.cross_entropy(scores, targets, reduction="sum")
    wanted = torch.autograd.grad(expected, exact)
    found = linear_cross_entropy(hidden, weight, targets, softcap)
    assert abs(found.item() / expected.item() - 1) < 2e-3
    for f, w in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert (f.double() - w).norm() < 1e-2 * w.norm()


def test_grouped_experts_equal_the_loop_and_are_taken():
    model = tiny_model("bytegpt-tiny").cuda().bfloat16()
    experts = next(m for m in model.modules() if isinstance(m, TesseraExperts))
    torch.manual_seed(0)
    x = torch.randn(300, experts.hidden_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.rand(300, experts.num_experts, device="cuda").topk(2).indices
    weights = torch.rand(300, 2, device="cuda", requires_grad=True)
    inputs = (x, weights, *experts.parameters())
    assert takes_grouped_products(experts, x)
    double = [p.detach().double().requires_grad_() for p in inputs]
    exact = _looped(experts, *double[:1], chosen, *double[1:])
    upstream = torch.randn_like(x)
    wanted = torch.autograd.grad(exact, double, upstream.double())
    found = grouped_experts(experts, x, chosen, weights)
    assert (found.double() - exact).norm() < 1e-2 * exact.norm()
    for f, w in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert (f.double() - w).norm() < 2e-2 * w.norm()


def _looped(experts, x, chosen, weights, *parameters):
    """The mixture written out for each expert, with the parameters in the order of the module."""
    named = dict(zip([name for name, _ in experts.named_parameters()], parameters, strict=True))
    out = torch.zeros_like(x)
    for expert in range(experts.num_experts):
        token, slot = torch.where(chosen == expert)
        hidden = experts.activate(x[token] @ named["gate_up_proj"][expert].t())
        y = hidden @ named["down_proj"][expert].t() * weights[token, slot, None]
        out = out.index_add(0, token, y)
    return out

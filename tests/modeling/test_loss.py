"""Head and cross entropy in chunks against torch's own over whole logits, alone and as the model's loss."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import EVERY_MODEL, tiny_model
from torch import nn

from tessera.modeling import loss as loss_module
from tessera.modeling.loss import linear_cross_entropy


def problem(dtype=torch.float64, tokens=50, width=16, vocabulary=37):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference(hidden, weight, targets, softcap, z_loss=0.0):
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    normalizers = torch.log(logits.exp().sum(1))[targets != -100]
    nats = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    return nats + z_loss * (normalizers**2).sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("fewest", [1, 8, 512])
def test_loss_and_gradients_equal_those_of_whole_logits(softcap, fewest, z_loss, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", 1)
    monkeypatch.setattr(loss_module, "FEWEST_TOKENS", fewest)
    hidden, weight, targets = problem()
    expected = reference(hidden, weight, targets, softcap, z_loss)
    wanted = torch.autograd.grad(expected / 5, (hidden, weight))
    found = linear_cross_entropy(hidden, weight, targets, softcap, z_loss=z_loss)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found / 5, (hidden, weight)), wanted)


def test_bf16_gradients_are_as_close_as_those_of_whole_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", 1)
    monkeypatch.setattr(loss_module, "FEWEST_TOKENS", 16)
    exact = problem(torch.float64, tokens=400, width=64, vocabulary=200)
    exact[0].data, exact[1].data = exact[0].data.bfloat16().double(), exact[1].data.bfloat16().double()
    wanted = torch.autograd.grad(reference(*exact, None), exact[:2])
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in exact[:2])

    def error(loss):
        found = torch.autograd.grad(loss, (hidden, weight))
        return [((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]

    whole = error(reference(hidden, weight, exact[2], None))
    chunked = error(linear_cross_entropy(hidden, weight, exact[2]))
    assert all(c < max(1.2 * w, 4e-3) for c, w in zip(chunked, whole, strict=True)), (chunked, whole)


def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient():
    hidden, weight, targets = problem()
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert weight.grad is not None


def test_nothing_to_predict_is_zero_with_zero_gradients():
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", 64 * 512)
    hidden, weight, targets = problem(torch.float32, tokens=4096, vocabulary=512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest <= 512 * 512 < 4096 * 512


def test_backward_makes_no_second_gradient_unless_it_may_be_called_again():
    hidden, weight, targets = problem()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **(kwargs or {}))

    loss = linear_cross_entropy(hidden, weight, targets) / 8
    with Watch():
        torch.autograd.grad(loss, (hidden, weight))
    assert torch.ops.aten.mul.Tensor not in made and torch.ops.aten.mul_.Tensor in made

    loss = linear_cross_entropy(hidden, weight, targets) / 8
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_targets_of_another_shape_are_refused():
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="targets have the shape"):
        linear_cross_entropy(hidden, weight, targets[1:])


def loss_and_gradients(model, **arguments):
    model.zero_grad()
    out = model(**arguments)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_training_without_logits_gives_the_loss_and_gradients_of_training_with_them(name):
    model = tiny_model(name).train()
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(91)}, {"shift_labels": shifted}):
        arguments = {"input_ids": ids, "labels": labels, **extra}
        whole, wanted = loss_and_gradients(model, skip_logits=False, **arguments)
        skipped, found = loss_and_gradients(model, **arguments)
        assert skipped.logits is None and whole.logits.shape == (2, 24, model.config.vocab_size)
        torch.testing.assert_close(skipped.loss, whole.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_autocast_makes_the_products_in_bf16():
    model = tiny_model("llama-tiny").train()
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, wanted = loss_and_gradients(model, input_ids=ids, labels=ids, skip_logits=False)
        skipped, found = loss_and_gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(skipped.loss, whole.loss, rtol=2e-3, atol=2e-3)
    head = found["lm_head.weight"]
    assert head.dtype == torch.float32
    torch.testing.assert_close(head, wanted["lm_head.weight"], rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny"])
def test_z_loss_is_the_mean_square_of_the_normalizers_logarithm(name):
    model = tiny_model(name).train()
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = -100
    without, _ = loss_and_gradients(model, input_ids=ids, labels=labels, skip_logits=False)
    normalizers = without.logits[:, :-1].double().logsumexp(-1)[labels[:, 1:] != -100]
    expected = without.loss + 0.1 * (normalizers**2).mean()
    for skip_logits in (True, False):
        arguments = {"input_ids": ids, "labels": labels, "z_loss": 0.1, "skip_logits": skip_logits}
        found, _ = loss_and_gradients(model, **arguments)
        torch.testing.assert_close(found.loss.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_evaluation_keeps_its_logits():
    model = tiny_model("llama-tiny").eval()
    ids = torch.randint(0, 250, (2, 24))
    assert model(ids, labels=ids).logits is not None


class CountingHead(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_a_head_that_must_be_called_and_a_loss_of_the_users_are_called():
    model = tiny_model("llama-tiny").train()
    ids = torch.randint(0, 250, (2, 24))
    head = CountingHead(model.config.hidden_size, model.config.padded_vocab_size, bias=False)
    plain, model.lm_head = model.lm_head, head
    assert model(ids, labels=ids).logits is not None and CountingHead.calls == 1
    with pytest.raises(ValueError, match="skip_logits=True needs"):
        model(ids, labels=ids, skip_logits=True)
    model.lm_head = plain
    model.loss_function = lambda logits, **_: logits.sum() * 0 + 5
    assert model(ids, labels=ids).loss.item() == 5

"""Updates in the backward pass: as those after it, with few gradients alive at a time."""

import pytest
import torch
from helpers.models import tiny_model

from tessera.training.optimizers import build_optimizer, muon
from tessera.training.optimizers.in_backward import InBackward


def trained(preset: str, kind: str, inside: bool, weights: str = "fp32", steps: int = 3):
    """A model after some steps, and the most gradients that were there at once.

    Without what turns a difference in the last bit into a step: decay by the sign of an update, and AdamW's
    eps of 1e-10 beside Muon.
    """
    model = tiny_model(preset, tie_word_embeddings=True).train()
    smooth = [feature for feature in muon.FEATURES if feature != "cautious"]
    optimizer = build_optimizer(model, kind, weight_decay=0.1, weights=weights, muon_features=smooth)
    for group in optimizer.param_groups:
        group["eps"] = max(group["eps"], 1e-6)
    if inside:
        InBackward(optimizer)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    for seed in range(steps):
        ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, max(alive)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("preset", ["llama-tiny", "moe-qknorm-softcap"])
def test_updates_in_the_backward_pass_equal_those_after_it(preset, kind):
    """The embedding is tied: its gradient comes from both ends and is used once. The gradients of one
    layer's normalisation or matrices may wait, and never those of the model."""
    after, optimizer, all_at_once = trained(preset, kind, inside=False)
    inside, own, few = trained(preset, kind, inside=True)
    atol = 2e-6 if kind == "adamw" else 2e-5  # one matrix and a batch are rounded otherwise
    for (name, p), q in zip(after.named_parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    steps = [{float(s["step"]) for s in o.state.values() if "step" in s} for o in (optimizer, own)]
    assert steps == [{3.0}, {3.0}]
    assert all_at_once == len(list(after.parameters())) and few <= 1


def test_split_weights_learn_in_the_backward_pass_too():
    after, _, _ = trained("llama-tiny", "adamw", inside=False, weights="split")
    inside, _, _ = trained("llama-tiny", "adamw", inside=True, weights="split")
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), inside.parameters(), strict=True))


def test_gradients_are_clipped_by_the_norm_of_the_step_before():
    """Against SGD-like arithmetic: with AdamW's first moment, after two steps of known gradients."""
    p, q = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    from tessera.training.optimizers.mixed import MuonAdamW

    optimizer = MuonAdamW([{"params": [p, q], "lr": 0.1, "betas": (0.5, 0.5)}])
    updates = InBackward(optimizer, clip=1.0)
    for size in (3.0, 2.0, 0.1):
        (size * p.sum() + size * q.sum()).backward()
        assert p.grad is None and q.grad is None
        optimizer.step()
        assert float(updates.norm) == pytest.approx(size * 8**0.5)
    # The first is taken whole, the second divided by the first's norm, the third by the second's.
    expected = 0.5**3 * 3.0 + 0.5**2 * 2.0 / (3 * 8**0.5) + 0.5 * 0.1 / (2 * 8**0.5)
    torch.testing.assert_close(
        optimizer.state[p]["exp_avg"], torch.full((4,), expected), atol=1e-5, rtol=1e-5
    )


def test_a_gradient_that_is_not_finite_leaves_its_parameter():
    p, q = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    from tessera.training.optimizers.mixed import MuonAdamW

    optimizer = MuonAdamW([{"params": [p], "kind": "muon", "lr": 0.1}, {"params": [q], "lr": 0.1}])
    updates = InBackward(optimizer, clip=1.0)
    (p.sum() * float("inf") + q.sum()).backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(8, 8)) and not updates.norm.isfinite()
    assert (q.detach() < 1).all()
    # What listens to steps, as routers do, is told.
    assert optimizer.found_inf > 0
    before = q.detach().clone()
    (p.sum() + q.sum()).backward()
    optimizer.step()
    assert (q.detach() < before).all() and q.detach().isfinite().all() and (p.detach() != 1).any()
    assert optimizer.found_inf == 0


def test_what_cannot_be_updated_in_the_backward_pass_is_refused():
    optimizer = build_optimizer(tiny_model("llama-tiny"))
    with pytest.raises(ValueError, match="accumulation 4 adds up several"):
        InBackward(optimizer, accumulation=4)

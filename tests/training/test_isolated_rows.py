"""Packed rows with the model: isolated documents do not see one another, and cost what they cost alone."""

import numpy as np
import pytest
import torch
from helpers.models import DIALECTS, MIXTURES, tiny_model

from tessera.data.text import Tokens
from tessera.data.training_rows import IGNORED, RowSequence, make_rows

LENGTH = 32
VOCABULARY = 200


def draw_corpus(generator: np.random.Generator) -> Tokens:
    """Random documents, shorter than a row and longer, each ended by token 0."""
    sizes = generator.integers(1, int(generator.integers(4, 60)), 25)
    starts = np.concatenate([[0], sizes.cumsum()])
    ids = generator.integers(1, VOCABULARY, starts[-1])
    ids[starts[1:] - 1] = 0
    return Tokens(ids.astype(np.uint16), len(ids), starts)


def read(tokens: Tokens, packing: str, count: int = 4) -> dict[str, torch.Tensor]:
    rows = make_rows(tokens, LENGTH, packing, isolate=True)
    batch = RowSequence([rows], isolate=True).batch(range(count))
    return {name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "targets", "position_ids")}


def documents(positions: torch.Tensor) -> list[tuple[int, int, int]]:
    """Row, first position and end of each document in rows [B, T]."""
    found = []
    for row, numbers in enumerate(positions):
        edges = [*torch.nonzero(numbers == 0).flatten().tolist(), len(numbers)]
        found += [(row, start, end) for start, end in zip(edges, edges[1:], strict=False)]
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*DIALECTS, *MIXTURES])
def test_a_changed_document_alters_no_other_ones_logits(name):
    model = tiny_model(name)
    generator = np.random.default_rng(len(name))
    for packing in ("best-fit", "contiguous"):
        rows = read(draw_corpus(generator), packing)
        ids, positions = rows["input_ids"], rows["position_ids"]
        before = model(ids, position_ids=positions).logits
        found = documents(positions)
        assert len(found) > 4, "rows of one document each prove nothing"
        changed_rows = {row for row, *_ in found}
        # every second document of each row at once: the others must not move, and these must
        second = [found[i] for i in range(0, len(found), 2)]
        changed = ids.clone()
        kept = torch.ones_like(ids, dtype=torch.bool)
        for row, start, end in second:
            changed[row, start:end] = (ids[row, start:end] + 1) % VOCABULARY
            kept[row, start:end] = False
        after = model(changed, position_ids=positions).logits
        assert kept.any() and changed_rows
        torch.testing.assert_close(after[kept], before[kept], atol=1e-5, rtol=1e-5)
        assert (after[~kept] - before[~kept]).abs().max() > 0.1
        moved = (model(changed).logits - model(ids).logits)[kept].abs().max()
        assert moved > 0.01, "the model looks at nothing before it, isolated or not"


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("packing", ["best-fit", "contiguous"])
def test_the_loss_of_packed_rows_is_that_of_their_documents_alone(name, packing):
    """Loss and gradients, summed over documents that the model is given one by one."""
    model = tiny_model(name, router_aux_loss_coef=0.0).train()
    rows = read(draw_corpus(np.random.default_rng(7)), packing)
    ids, targets, positions = rows["input_ids"], rows["targets"], rows["position_ids"]
    count = int((targets != IGNORED).sum())
    packed = model(
        ids,
        labels=ids,
        shift_labels=targets,
        position_ids=positions,
        num_items_in_batch=count,
        use_cache=False,
    ).loss
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = 0.0
    for row, start, end in documents(positions):
        piece, wanted = ids[row : row + 1, start:end], targets[row, start:end]
        logits = model(piece, use_cache=False).logits[0].float()
        loss = (
            torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED) / count
        )
        loss.backward()
        alone += loss.item()
    assert packed.item() == pytest.approx(alone, rel=1e-5)
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)

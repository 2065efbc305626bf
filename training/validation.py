"""The held-out text of a run, scored on the way and at its end.

What belongs here: how much of it is scored, and in what batches; the likelihood itself is
`evaluation/bits_per_byte.py`.
"""

import math
from collections.abc import Sequence

from accelerate import Accelerator

from tessera.evaluation.bits_per_byte import TextLoss, text_loss
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .feed import Feed
from .inputs import Corpus

LOGITS_AT_A_TIME = 2**26  # of a validation batch; 256 MiB in fp32


def score_held_out(
    model: TesseraForCausalLM,
    feed: Feed,
    corpora: Sequence[Corpus],
    accelerator: Accelerator,
    groups: tuple[int, int] | None,
    most_tokens: int | None = None,
) -> tuple[TextLoss, dict[str, float]]:
    """Scores the held-out text of each corpus; all processes call it.

    Args:
        model: unwrapped.
        feed: which mixes the corpora.
        corpora: of the run.
        accelerator: of the run.
        groups: for a split model, see `Layout.groups`.
        most_tokens: to score, evenly spread; None for all.

    Returns:
        The loss of the mixture, and what to log of each corpus, where there are several.
    """
    tokens = sum(len(one.val.ids) for one in corpora)
    every = 1 if most_tokens is None else math.ceil(tokens / most_tokens)
    batch_size = LOGITS_AT_A_TIME // (feed.length * model.config.padded_vocab_size)
    batch_size = max(1, min(16, batch_size))
    losses, of_each = [], {}
    for one in corpora:
        ids, num_bytes = one.val.ids, one.val.num_bytes
        loss = text_loss(model, ids, num_bytes, feed.length, batch_size, accelerator, every, groups)
        losses.append(loss)
        if len(corpora) > 1:
            of_each[f"val_loss/{one.name}"] = loss.nats
            of_each[f"val_bits_per_byte/{one.name}"] = loss.bits_per_byte
    return feed.mixed(losses), of_each


def bits_of_a_nat(feed: Feed, corpora: Sequence[Corpus]) -> float:
    """What a nat per token is in bits per byte, by tokens and bytes of the held-out text."""
    return feed.mixed([TextLoss(1.0, len(one.val.ids), one.val.num_bytes) for one in corpora]).bits_per_byte


def describe(loss: TextLoss) -> str:
    """A score, in words."""
    return f"validation {loss.nats:.4f} nats per token, {loss.bits_per_byte:.4f} bits per byte"

"""Perplexity of documents, with a sliding window.

What belongs here: likelihood of documents under a model where a token is given what stands before it, as far
as the context reaches. A window's inputs are at most `context` tokens; the next one ends `stride` tokens
later and scores only those. So every token is scored once; those of the first window are given all of the
document before them, others at least `context - stride` tokens. A stride of the whole context is what
lm-evaluation-harness does (`loglikelihood_rolling`); shorter ones cost more and waste less context.

The perplexities are lm-evaluation-harness's: exp of the summed loss over the tokens, words or UTF-8 bytes of
the documents. Those of words and bytes do not depend on the tokenizer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .bits_per_byte import stderr_of_rate
from .documents import Document, start_token


@dataclass(frozen=True)
class Perplexity:
    """Loss of documents: `nats` in all, its standard error, and what there was to predict.

    `stderr` takes windows as independent draws; None for a single window.
    """

    nats: float
    stderr: float | None
    tokens: int
    words: int
    num_bytes: int
    windows: int

    def per(self, unit: str) -> tuple[float, float | None]:
        """Perplexity per `tokens`, `words` or `num_bytes`, and its standard error."""
        units = getattr(self, unit)
        value = _exp(self.nats / units)
        return value, None if self.stderr is None else value * self.stderr / units

    @property
    def bits_per_byte(self) -> tuple[float, float | None]:
        """The logarithm of byte perplexity to base 2, and its standard error."""
        bits = self.num_bytes * math.log(2)
        return self.nats / bits, None if self.stderr is None else self.stderr / bits


def sliding_windows(
    ids: np.ndarray, start: int, context: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts a document into windows.

    Args:
        ids: token ids [N].
        start: token that stands before the first one and is not scored.
        context: input tokens of a window, at most.
        stride: tokens that a window but the first scores, at most `context`.

    Yields:
        Inputs and the last target, [context + 1] or fewer, and how many targets at its end are scored.
    """
    stream = np.concatenate([[start], ids])
    done = 0
    while done < len(ids):
        scored = min(stride if done else context, len(ids) - done)
        done += scored
        yield stream[max(done - context, 0) : done + 1], scored


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer,
    documents: Sequence[Document],
    context: int,
    stride: int,
    batch_size: int = 8,
) -> Perplexity:
    """Scores every token of every document once.

    Args:
        model: a causal language model in eval mode.
        tokenizer: of the documents.
        documents: what is scored, each on its own.
        context: input tokens that the model is given at most.
        stride: tokens by which the window moves.
        batch_size: windows at a time.

    Raises:
        ValueError: if the documents hold fewer than two tokens, or if the stride is not within the context.
    """
    tokens = sum(len(document.ids) for document in documents)
    if tokens < 2:
        raise ValueError(f"a perplexity needs two tokens or more, got {tokens}")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must be between 1 and the context of {context} tokens, got {stride}: a longer one would "
            "leave tokens out"
        )
    start = start_token(tokenizer)
    windows = [window for d in documents for window in sliding_windows(d.ids, start, context, stride)]
    # Of like lengths together; what does not fit into memory fails at once.
    windows.sort(key=lambda window: -len(window[0]))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    # Nobody watches a bar in a file.
    nats = np.concatenate([_score(model, batch) for batch in tqdm(batches, "perplexity", disable=None)])
    total = float(nats.sum())
    deviations = nats - total / tokens * np.array([scored for _, scored in windows])
    spread = stderr_of_rate(float((deviations**2).sum()), len(windows), tokens)
    return Perplexity(
        total,
        None if spread is None else spread * tokens,
        tokens,
        sum(document.words for document in documents),
        sum(document.num_bytes for document in documents),
        len(windows),
    )


def _score(model: nn.Module, windows: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Summed loss of each window's scored targets [B]."""
    device = next(model.parameters()).device
    longest = max(len(row) for row, _ in windows) - 1
    # Padding comes after what is scored, where a causal model cannot look.
    inputs = np.zeros((len(windows), longest), dtype=np.int64)
    for i, (row, _) in enumerate(windows):
        inputs[i, : len(row) - 1] = row[:-1]
    first = min(len(row) - 1 - scored for row, scored in windows)
    logits = model(
        input_ids=torch.from_numpy(inputs).to(device), logits_to_keep=longest - first, use_cache=False
    ).logits
    losses = []
    for row, scored, predicted in zip(*zip(*windows, strict=True), logits, strict=True):
        targets = torch.from_numpy(row[-scored:].astype(np.int64)).to(device)
        end = len(row) - 1 - first
        loss = nn.functional.cross_entropy(predicted[end - scored : end].float(), targets, reduction="none")
        losses.append(loss.cpu().double().sum().item())
    return np.array(losses)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

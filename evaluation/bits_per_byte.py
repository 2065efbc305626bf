"""Validation loss in nats per token and in bits per byte, which does not depend on the tokenizer.

What belongs here: likelihood of a stream of tokens under a model, in windows that do not overlap. Bits per
byte is the summed loss of all target tokens, over ln 2 and over the bytes that the text has. Windows that
overlap are in `perplexity.py`.
"""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class TextLoss:
    """Loss of a text: `nats` per token, over `tokens` targets that stand for `num_bytes` bytes.

    `stderr` is the standard error of `nats`, windows taken as independent draws; None for a single window.
    """

    nats: float
    tokens: int
    num_bytes: float
    stderr: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for one byte of the text."""
        return self.nats * self._bits_of_a_nat

    @property
    def bits_per_byte_stderr(self) -> float | None:
        """Its standard error."""
        return None if self.stderr is None else self.stderr * self._bits_of_a_nat

    @property
    def _bits_of_a_nat(self) -> float:
        return self.tokens / self.num_bytes / math.log(2)


@torch.no_grad()
def text_loss(
    model: nn.Module,
    ids: np.ndarray,
    num_bytes: float,
    length: int,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    every: int = 1,
    groups: tuple[int, int] | None = None,
) -> TextLoss:
    """Mean loss over every token of a stream but the first, in non-overlapping windows.

    Each window starts without context, so the figure is that of a model that is given `length` tokens at a
    time. Processes share the windows.

    Args:
        model: a causal language model that returns logits; its mode is restored.
        ids: token ids [N].
        num_bytes: bytes of text that the ids stand for.
        length: positions in a window.
        batch_size: windows at a time.
        accelerator: of the run, for its precision and its other processes; without it the model's own dtype.
        every: score only each n-th window, so that a sample comes from the whole text.
        groups: for a model that is split over processes: which group of them sees rows of its own, and how
            many groups there are. All processes then call the model equally often, together.

    Raises:
        ValueError: if there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"a loss needs two tokens or more, got {len(ids)}")
    # One made here would have the precision of whatever trained in this process before.
    autocast = accelerator.autocast if accelerator else contextlib.nullcontext
    accelerator = accelerator or Accelerator()
    # Without the wrapper: where a model has buffers, its forward waits for processes that have fewer batches.
    model = accelerator.unwrap_model(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    whole = (len(ids) - 1) // length
    rows = [ids[i * length : (i + 1) * length + 1] for i in range(0, whole, every)]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if (len(ids) - 1) % length and (every == 1 or not rows):
        batches.append([ids[whole * length :]])
    nats, lengths = [], []
    rank, processes = groups or (accelerator.process_index, accelerator.num_processes)
    mine = batches[rank::processes]
    if groups is not None and len(mine) < -(-len(batches) // processes):
        mine.append(None)  # nothing to score any more, but the others wait for this part of the model
    for batch in mine:
        counts, batch = batch is not None, batch or batches[0]
        tokens = torch.from_numpy(np.stack(batch).astype(np.int64)).to(device)
        with autocast():
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        if not counts:
            continue
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        nats.append(losses.cpu().double().view(len(batch), -1).sum(1))
        lengths += [len(row) - 1 for row in batch]
    model.train(was_training)
    # [windows of this process]
    nats = torch.cat(nats) if nats else torch.zeros(0, dtype=torch.float64)
    windows = sum(map(len, batches))
    count = sum((len(row) - 1) for batch in batches for row in batch)
    alike = accelerator.num_processes // processes  # processes of a group, that have the same sums
    mean = _sum_over_processes(nats, accelerator, device) / alike / count
    deviations = nats - mean * torch.tensor(lengths, dtype=torch.float64)
    squares = _sum_over_processes(deviations**2, accelerator, device) / alike
    return TextLoss(mean, count, num_bytes * count / len(ids), stderr_of_rate(squares, windows, count))


def stderr_of_rate(squares: float, windows: int, units: float) -> float | None:
    """Standard error of total loss over total units, by linearization (Cochran, Sampling Techniques, 6.4).

    Args:
        squares: sum over windows of (loss - rate * units of the window) squared.
        windows: how many there are.
        units: of all windows.

    Returns:
        The error, or None where one window shows no spread.
    """
    return math.sqrt(squares * windows / (windows - 1)) / units if windows > 1 else None


def _sum_over_processes(values: torch.Tensor, accelerator: Accelerator, device: torch.device) -> float:
    # In fp32 for devices that know no doubles; the sum of a few processes loses nothing that shows.
    return accelerator.reduce(values.sum().float().to(device), "sum").item()

"""One optimizer step: micro-batches, their gradients, the update.

The loss is divided by the tokens of the whole step, so neither accumulation nor the number of processes
changes it. What belongs here: what happens between two steps' data.
"""

import math
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from .feed import Feed


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    step: int,
    clip: float,
) -> tuple[float, float]:
    """Trains on the rows of a step.

    Args:
        accelerator: of the run.
        model: as accelerate wrapped it.
        optimizer: likewise, with the learning rates of this step.
        feed: the rows.
        step: which.
        clip: largest gradient norm; 0 for none.

    Returns:
        The loss in nats per token over all processes, and the gradient's norm before clipping (NaN without).
    """
    count = feed.counted(step)
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(feed.micro_batches(step, accelerator.device), start=1):
        last = i == feed.accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
            # Processes average their gradients; the loss is already divided by the tokens of all.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), clip) if clip else math.nan
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum").item(), float(norm)

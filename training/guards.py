"""What a run does about steps that go wrong: a loss or gradient that is no number, memory that runs out.

A bad step is skipped on the device, so nothing that is not a number reaches the weights (`step.py`). Several
of them in a row are taken for a bad stretch of the run or of the data: it goes back to its last good
checkpoint and passes those rows over. If that does not help either it stops, and the rows are saved. Memory
that runs out halves the micro-batches and leaves the step as it is. What belongs here: those decisions. What
is loaded and saved is the loop's business.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from .step import Outcome


@dataclass
class BadSteps:
    """Counts bad steps, and says when to go back and when to give up.

    Attributes:
        in_a_row: bad steps after which the run goes back.
        rollbacks: how often it may.
        bad: the latest ones, in a row.
        gone_back: how often it did.
    """

    in_a_row: int
    rollbacks: int
    bad: list[Outcome] = field(default_factory=list)
    gone_back: int = 0

    def note(self, outcome: Outcome) -> str:
        """Takes a bad step into account.

        Returns:
            "skipped" if it is passed over, "back" if the run is to go back to its last good checkpoint, or
            "stop".
        """
        self.bad.append(outcome)
        if len(self.bad) < self.in_a_row:
            return "skipped"
        if self.gone_back >= self.rollbacks:
            return "stop"
        self.gone_back += 1
        return "back"

    def good(self) -> None:
        """A step that is not bad, or another start: none are in a row."""
        self.bad.clear()


class SkippedSteps:
    """The steps' worth of rows that a run passes over, so that what broke it does not come again.

    Without any, step n has the rows of place n. Each place that is skipped moves all later steps by one.

    Args:
        places: those skipped.
    """

    def __init__(self, places: list[int] | None = None):
        self.places = sorted(places or [])

    def place_of(self, step: int) -> int:
        """Where the rows of a step are."""
        place = step
        # Skipped places before it move it on, and may bring further ones before it.
        while True:
            moved = step + bisect.bisect_right(self.places, place)
            if moved == place:
                return place
            place = moved


def smaller_parts(rows: int, parts: int) -> int | None:
    """Parts of a step for micro-batches of half the size, even ones where that can be.

    Args:
        rows: of a step on a process.
        parts: so far.

    Returns:
        How many, or None where a micro-batch has one row already.
    """
    largest = -(-rows // parts)
    if largest == 1:
        return None
    least = -(-rows // (-(-largest // 2)))
    even = (count for count in range(least, min(rows, 2 * least) + 1) if rows % count == 0)
    return next(even, least)


def no_memory_left(rows_of: str, device: torch.device) -> str:
    """The sentence for a model of which not one row fits."""
    free = ""
    if device.type == "cuda":
        left, whole = torch.cuda.mem_get_info(device)
        free = f" ({left / 2**30:.1f} of {whole / 2**30:.1f} GiB are free)"
    return (
        f"{rows_of} does not fit into the memory of {device}{free}; take a shorter sequence_length, "
        "gradient_checkpointing, weights=bf16, or parallel=fsdp on several GPUs"
    )


def save_bad_batch(folder: Path, step: int, rank: int, batches: list[dict[str, torch.Tensor]]) -> Path:
    """Writes the rows of a step as safetensors, and returns the file.

    Args:
        folder: run directory.
        step: whose rows they are.
        rank: of this process, which has rows of its own.
        batches: its micro-batches.
    """
    tensors = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    # Targets may be there under two names.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    path = folder / f"bad-batch-step-{step:06d}-rank-{rank}.safetensors"
    save_file(tensors, path)
    return path


def halve(feed, rows: int, say: Callable[[str], None], device: torch.device) -> None:
    """Halves the micro-batches of a run and says so; the rows of a step stay as they are.

    Args:
        feed: whose `accumulation` is changed.
        rows: of a step on this process.
        say: for the sentence.
        device: whose memory ran out.

    Raises:
        OutOfRows: if a micro-batch has one row already.
    """
    parts = smaller_parts(rows, feed.accumulation)
    if parts is None:
        raise OutOfRows(no_memory_left(f"a micro-batch of one row of {feed.length} tokens", device))
    before, after = -(-rows // feed.accumulation), -(-rows // parts)
    say(
        f"memory ran out: micro-batches of {after} rows instead of {before} from here on, "
        f"{parts} of them in a step; the batch stays as it is"
    )
    feed.accumulation = parts


class OutOfRows(MemoryError):
    """Not one row fits into memory."""

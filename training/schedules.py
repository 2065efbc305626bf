"""What changes over a run, as pure functions of its progress or step: rates, momentum, weight decay, stages.

What belongs here: numbers. Progress is the share of the run that is done, 0 to 1. The loop applies factors to
the base values of each parameter group; which rows a stage reads is `feed.py`. Nothing here imports torch.
"""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "constant", "wsd")
DECAY_SCHEDULES = ("constant", "linear", "cosine")
WSD_DECAY = 0.4  # between what pretraining runs take (0.1 to 0.2) and short races (0.45 to 0.65)


def cosine_with_warmup(progress: float, warmup: float = 0.02, floor: float = 0.0) -> float:
    """Factor on the learning rate: a linear rise, then half a cosine (Loshchilov and Hutter, 2017).

    Args:
        progress: share of the run that is done, 0 to 1.
        warmup: share of the run over which the rate rises; the first step is not quite zero.
        floor: factor at the end.
    """
    if progress < warmup:
        return max(progress / warmup, 0.01)
    rest = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))


@dataclass(frozen=True)
class Stage:
    """From a share of the run on, a size: windows in a step, or tokens in a window."""

    start: float
    size: int


def read_stages(given: list[str], name: str) -> list[Stage]:
    """The stages of a schedule in steps.

    Args:
        given: each `share:size`, from share 0 on, shares rising.
        name: named in errors.

    Raises:
        ValueError: for another form or order.
    """
    stages = []
    for text in given:
        share, _, size = text.partition(":")
        try:
            stages.append(Stage(float(share), int(size)))
        except ValueError:
            raise ValueError(
                f"{name}: '{text}' is not a share of the run and a size, such as 0.5:64"
            ) from None
    if not stages:
        raise ValueError(f"{name} is an empty list; give stages such as 0:32,0.5:64, or leave it out")
    starts = [stage.start for stage in stages]
    if starts[0] != 0 or starts != sorted(set(starts)) or not starts[-1] < 1:
        raise ValueError(f"{name}: shares start at 0 and rise, below 1; got {', '.join(given)}")
    if min(stage.size for stage in stages) < 1:
        raise ValueError(f"{name}: sizes are at least 1; got {', '.join(given)}")
    return stages

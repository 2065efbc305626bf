"""Learning-rate schedules, as a factor on each group's own rate over the progress of a run."""

import math


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

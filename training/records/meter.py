"""How fast a run goes, measured from outside of its steps: tokens a second, share of the peak, memory.

What belongs here: rates over a recent window, so that a slow start or an hour ago does not colour them.
Nothing here waits for a device.
"""

import copy
import math
from collections import deque

import torch

from tessera.modeling.accounting import count_costs
from tessera.modeling.configuration_tessera import TesseraConfig

from ..planner.peak import measured_peak
from ..pretrain_arguments import PretrainArguments

WINDOW_SECONDS = 30.0
TERA = 1e12
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Meter:
    """Rates over the last half a minute of training.

    Args:
        flops_per_token: floating-point operations that a token costs, forward and backward.
        peak: operations a second that all devices of the run together can do; None if nobody knows, and no
            share of it is told then.
        device: whose memory is looked at.
    """

    def __init__(self, flops_per_token: float, peak: float | None, device: torch.device):
        self.flops_per_token, self.peak, self.device = flops_per_token, peak, device
        self.points: deque[tuple[float, int]] = deque()

    def update(self, tokens: int, seconds: float) -> None:
        """Takes a point.

        Args:
            tokens: seen so far; fewer than before after a rollback, which starts a new window.
            seconds: of training so far, validation and checkpoints not among them.
        """
        if self.points and (tokens < self.points[-1][1] or seconds < self.points[-1][0]):
            self.points.clear()
        self.points.append((seconds, tokens))
        while len(self.points) > 2 and self.points[1][0] <= seconds - WINDOW_SECONDS:
            self.points.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """Over the window; None before two steps."""
        if len(self.points) < 2:
            return None
        (start, before), (end, after) = self.points[0], self.points[-1]
        return (after - before) / (end - start) if end > start else None

    def values(self) -> dict[str, float]:
        """`tokens_per_second`; `mfu`, a share of the peak; `memory_gib`, the most that torch has held on a
        GPU: those that are known.
        """
        found = {}
        if rate := self.tokens_per_second:
            found["tokens_per_second"] = rate
            if self.peak:
                found["mfu"] = rate * self.flops_per_token / self.peak
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found


class Smoothed:
    """A mean that weighs the last values most, each step a twentieth less than the one after it."""

    def __init__(self, keep: float = 0.95):
        self.keep = keep
        self.total = self.weight = 0.0

    def update(self, value: float) -> None:
        """Takes a value; what is not finite is passed over."""
        if math.isfinite(value):
            self.total = self.keep * self.total + (1 - self.keep) * value
            self.weight = self.keep * self.weight + (1 - self.keep)

    @property
    def value(self) -> float:
        """The mean; NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan


def flops_per_token(config: TesseraConfig, length: int) -> float:
    """Operations of a token in windows of `length`, forward and backward, by `count_costs`."""
    config = copy.deepcopy(config)
    config.max_position_embeddings = length
    return count_costs(config).training_flops


def find_peak(
    args: PretrainArguments, device: torch.device, processes: int, compute: str = "fp32"
) -> float | None:
    """Operations a second of all devices: `peak_tflops`, which is of one, or what a GPU is measured to reach.

    Args:
        args: of the run.
        device: of this process.
        processes: of the run.
        compute: what products are taken in: `bf16`, `fp16` or `fp32`.

    Returns:
        The peak; None on a CPU, unless it is given: what a CPU reaches depends on who else is on it.
    """
    peak = None if args.peak_tflops is None else args.peak_tflops * TERA
    if peak is None and device.type == "cuda":
        peak = measured_peak(device, DTYPES[compute])
    return None if peak is None else peak * processes

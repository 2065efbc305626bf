"""What changes over a run, as pure functions of its progress or step: rates, momentum, weight decay, stages.

What belongs here: numbers. Progress is the share of the run that is done, 0 to 1. The loop applies factors to
the base values of each parameter group; which rows a stage reads is `feed.py`. Nothing here imports torch.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pretrain_arguments import PretrainArguments

SCHEDULES = ("cosine", "linear", "constant", "wsd")
DECAY_SCHEDULES = ("constant", "linear", "cosine")
MOMENTUM_WARMUP_STEPS = 300
WSD_DECAY = 0.4  # between what pretraining runs take (0.1 to 0.2) and short races (0.45 to 0.65)


def warmup_share(args: "PretrainArguments", total_steps: int | None) -> float:
    """The share of a run over which the rate rises, whether it was given as one or in steps.

    Args:
        args: of the run.
        total_steps: of the run; None where it ends with its minutes.

    Raises:
        ValueError: if steps are to be a share of minutes.
    """
    if args.warmup_steps is None:
        return args.warmup
    if total_steps is None:
        raise ValueError("warmup_steps needs a length in steps, epochs or tokens; give warmup, a share")
    return min(args.warmup_steps / total_steps, 1.0)


def learning_rate_factor(args: "PretrainArguments", progress: float, warmup: float | None = None) -> float:
    """Factor on every group's learning rate: a linear rise, then what `schedule` says, down to `floor`.

    "cosine" is half a cosine (Loshchilov and Hutter, 2017), "linear" a line, "constant" neither; "wsd" stays
    up and falls in a line over the last `decay` of the run (Hu et al., MiniCPM, 2024; a line as in nanochat,
    which ends where training stops to pay and needs no second number). Where a run is so short that rise and
    fall overlap, the lower one counts.

    Args:
        args: of the run.
        progress: share of the run that is done.
        warmup: share of the run over which the rate rises, where that was given in steps; else `args.warmup`.
    """
    warmup = args.warmup if warmup is None else warmup
    # The first step is not quite zero.
    rise = max(progress / warmup, 0.01) if progress < warmup else 1.0
    if args.schedule == "constant":
        return rise
    if rise < 1 and args.schedule != "wsd":
        return rise
    rest = _decay_done(args, progress, warmup)
    left = 0.5 * (1 + math.cos(math.pi * rest)) if args.schedule == "cosine" else 1 - rest
    return min(rise, args.floor + (1 - args.floor) * left)


def momentum_at(args: "PretrainArguments", step: int, progress: float, warmup: float | None = None) -> float:
    """Muon's momentum: a line from `momentum_start` to `momentum`, and another to `momentum_end` while the
    learning rate falls (nanochat: 0.85 to 0.97 over 400 steps, then to 0.90).

    Args:
        args: of the run.
        step: optimizer steps done.
        progress: share of the run that is done.
        warmup: as in `learning_rate_factor`.
    """
    steps = args.momentum_warmup_steps
    steps = MOMENTUM_WARMUP_STEPS if steps is None else steps
    if args.momentum_start is not None and step < steps:
        return args.momentum_start + (args.momentum - args.momentum_start) * step / steps
    if args.momentum_end is None:
        return args.momentum
    warmup = args.warmup if warmup is None else warmup
    return args.momentum + (args.momentum_end - args.momentum) * _decay_done(args, progress, warmup)


def weight_decay_factor(args: "PretrainArguments", progress: float) -> float:
    """Factor on every group's weight decay: `weight_decay_schedule` over the whole run (nanochat: cosine)."""
    left = 1 - min(progress, 1.0)
    if args.weight_decay_schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if args.weight_decay_schedule == "linear" else 1.0


def _decay_done(args: "PretrainArguments", progress: float, warmup: float) -> float:
    """Share of the learning rate's fall that is done; it begins after the warm-up but in "wsd"."""
    if progress >= 1:
        return 1.0
    start = 1 - (WSD_DECAY if args.decay is None else args.decay) if args.schedule == "wsd" else warmup
    return max((progress - start) / (1 - start), 0.0) if start < 1 else 0.0


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


@dataclass(frozen=True)
class StepSizes:
    """A size that depends on the step, as a pure function of it.

    Attributes:
        firsts: step that each stage begins with; the first is 0.
        sizes: of each stage.
    """

    firsts: tuple[int, ...]
    sizes: tuple[int, ...]

    def at(self, step: int) -> int:
        """The size in a step, numbered from 0; the last one stays past the end."""
        return self.sizes[bisect_right(self.firsts, step) - 1]

    def before(self, step: int) -> int:
        """The sum over all steps before this one."""
        ends = [*self.firsts[1:], step]
        stages = zip(self.firsts, ends, self.sizes, strict=True)
        return sum(size * (min(end, step) - first) for first, end, size in stages if first < step)


def sizes_over_steps(stages: list[Stage], total: int) -> StepSizes:
    """The stages of a run of so many steps: each begins with the first step at or past its share."""
    # Rounded first: 0.55 of 100 steps is a hair over 55 in binary.
    firsts = tuple(math.ceil(round(stage.start * total, 9)) for stage in stages)
    return StepSizes(firsts, tuple(stage.size for stage in stages))


def mean_size(stages: list[Stage]) -> float:
    """Of a step, over a run."""
    ends = [*(stage.start for stage in stages[1:]), 1.0]
    return sum(stage.size * (end - stage.start) for stage, end in zip(stages, ends, strict=True))

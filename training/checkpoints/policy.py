"""When a run saves a checkpoint, and which ones stay.

What belongs here: decisions, as functions of steps, seconds and scores. All processes come to the same ones.
Nothing here touches a disk.
"""

from dataclasses import dataclass

from ..pretrain_arguments import PretrainArguments

# A checkpoint before an evaluation may cost this share of the training time since the last one.
SHARE_FOR_EVALUATIONS = 0.02


@dataclass(frozen=True)
class CheckpointPolicy:
    """What a run was told about its checkpoints.

    Attributes:
        minutes: of training between them; 0 for none by the clock.
        steps: between them; 0 for none by steps.
        keep_last: newest ones that stay.
        keep_best: the one with the fewest validation bits per byte stays.
        keep_every: those at multiples of this step are made and stay for ever; None for none.

    Raises:
        ValueError: for a number that makes no sense.
    """

    minutes: float = 0.0
    steps: int = 0
    keep_last: int = 2
    keep_best: bool = False
    keep_every: int | None = None

    def __post_init__(self):
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {self.keep_last}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every must be at least 1, got {self.keep_every}")

    @classmethod
    def of(cls, args: PretrainArguments) -> "CheckpointPolicy":
        """That of a run."""
        return cls(
            args.checkpoint_minutes, args.checkpoint_steps, args.keep_last, args.keep_best, args.keep_every
        )

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to save after a step.

        Args:
            step: steps done.
            seconds: of training since the last checkpoint.
        """
        by_clock = self.minutes > 0 and seconds >= 60 * self.minutes
        by_step = self.steps > 0 and step % self.steps == 0
        return by_clock or by_step or (self.keep_every is not None and step % self.keep_every == 0)

    def is_due_before_evaluation(self, seconds: float, cost: float) -> bool:
        """Whether to save before an evaluation, so that nothing is lost if it fails.

        Dense evaluations would double the price of a run: so only if what is at stake is worth it. A run that
        wants no checkpoints but the last gets none here either.

        Args:
            seconds: of training since the last checkpoint.
            cost: seconds that the last checkpoint kept training waiting; 0 before the first.
        """
        wanted = self.minutes > 0 or self.steps > 0 or self.keep_every is not None
        return wanted and seconds > 0 and seconds * SHARE_FOR_EVALUATIONS >= cost

    def kept(self, steps: list[int], newest: int, best: int | None = None) -> set[int]:
        """Which checkpoints stay once one is written.

        Later ones do not: a run is at an earlier step than its newest checkpoint only where that one was
        found to be broken, or where somebody chose to go on from an earlier one.

        Args:
            steps: of the checkpoints that are there, the new one among them.
            newest: the new one.
            best: the one with the best score.
        """
        done = sorted(step for step in steps if step <= newest)
        stay = set(done[-self.keep_last :])
        stay |= {step for step in done if self.keep_every is not None and step % self.keep_every == 0}
        return stay | ({best} & set(done) if self.keep_best else set())

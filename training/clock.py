"""Seconds of training: what `--minutes` counts, without compiling, evaluations and checkpoints.

What belongs here: when the clock runs. That steps in the queue of a GPU are part of them is seen to by the
loop, which never queues far ahead and reads all of them before the clock stops.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """A clock that runs within `with clock:`, and stands still within `clock.paused()`.

    Args:
        seconds: that it starts at.
    """

    def __init__(self, seconds: float = 0.0):
        self._before, self._started = seconds, None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._before, self._started = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within it does not count."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

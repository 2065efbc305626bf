"""What is seen of a run while it goes on: a progress bar, or a line now and then where nobody sees it move.

What belongs here: what is shown and how often.
"""

import math
import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where there is no progress bar


class Progress:
    """The progress of a run on the screen; a context.

    Args:
        done: share of the run that is done at the start.
        shows: whether this process is the one that is seen.
    """

    def __init__(self, done: float = 0.0, shows: bool = True):
        self.shows = shows
        self.bar = tqdm(
            total=1000,
            initial=int(1000 * done),
            # None: no bar where nobody sees it move; there, a line now and then.
            disable=None if shows else True,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            desc="training",
            file=sys.stderr,
            mininterval=0.5,
        )
        self.last_line = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def update(self, done: float, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Shows where the run is.

        Args:
            done: share of the run.
            step: optimizer steps done.
            loss: in nats per token, smoothed.
            tokens: seen so far.
            seconds: of training so far.
        """
        rate = tokens / max(seconds, 1e-9)
        status = f"loss {loss:.3f}, {rate:,.0f} tok/s, step {step}"
        self.bar.set_postfix_str(f" {status}", refresh=False)
        self.bar.update(int(1000 * min(done, 1)) - self.bar.n)
        if self.bar.disable and self.shows and time.perf_counter() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = _duration(seconds * (1 / min(done, 1) - 1))
            print(f"{100 * min(done, 1):3.0f} %  {status}, {left} left", file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A line above the bar."""
        if self.shows:
            self.bar.write(text, file=sys.stderr)


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"

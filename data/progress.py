"""How far a run is, for whoever looks on.

What belongs here: a bar, or a line now and then where nobody would see it move.
"""

import sys
import time
from collections import Counter

from tqdm import tqdm

from .mixing import Stream

SECONDS_BETWEEN_LINES = 10.0  # where there is no progress bar


class Progress:
    """A context manager that shows counts.

    Args:
        budget: tokens to end with; None if not known.
        done: tokens of an earlier process.
    """

    def __init__(self, budget: int | None, done: int = 0):
        self._bar = tqdm(
            total=budget, initial=done, unit="tok", unit_scale=True, disable=None, desc="encoding"
        )
        self._done = done
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, streams: list[Stream], tokens: int, dropped: Counter) -> None:
        """Shows the counts, twice a second or every ten."""
        now = time.perf_counter()
        if now - self._last < (SECONDS_BETWEEN_LINES if self._bar.disable else 0.5):
            return
        self._last = now
        megabytes = sum(stream.text_bytes for stream in streams) / 1e6
        kept = sum(stream.documents for stream in streams)
        status = f"{kept:,} documents, {megabytes:,.0f} MB, {dropped.total():,} dropped"
        if self._bar.disable:
            rate = (tokens - self._done) / (now - self._start)
            print(f"{tokens:,} tokens, {rate:,.0f} a second, {status}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(tokens - self._bar.n)

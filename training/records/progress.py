"""What is seen of a run while it goes on: a line with a bar that stays in its place on a terminal, and a line
now and then where nobody sees it move.

What belongs here: what is shown, in which words, and how often. The figures are the loop's and plain numbers:
nothing here waits for a device.
"""

import math
import os
import shutil
import sys
import time
from collections import deque

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal
SECONDS_BETWEEN_FRAMES = 0.25
WINDOW_SECONDS = 30.0  # that the remaining time is reckoned from
NARROWEST_BAR, WIDEST_BAR = 8, 24
COLUMNS_FOR_A_BAR = 50
BETWEEN = " · "
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Progress:
    """The progress of a run on the screen; a context.

    Args:
        done: share of the run that is done at the start.
        shows: whether this process is the one that is seen.
        bits_of_a_nat: what a nat per token is in bits per byte of the text; None leaves these out.
        total_steps: of the run, if its length is one of steps.
    """

    def __init__(
        self,
        done: float = 0.0,
        shows: bool = True,
        bits_of_a_nat: float | None = None,
        total_steps: int | None = None,
    ):
        self.shows, self.bits_of_a_nat, self.total_steps = shows, bits_of_a_nat, total_steps
        # tqdm knows terminals; the line is ours.
        self.bar = tqdm(
            disable=None if shows else True,
            bar_format="{desc}",
            nrows=20,  # a terminal that does not know its height, as in a container, has none to tqdm
            file=sys.stderr,
        )
        self.validation: float | None = None
        self.points = deque([(time.perf_counter(), done)])
        self.last_shown = 0.0 if not self.bar.disable else time.perf_counter()
        self.parts: list[str] = []
        self.done = done

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if not self.bar.disable and self.parts:
            self._draw()
        self.bar.close()

    def is_due(self, done: float, now: float | None = None) -> bool:
        """Whether it is time (`now`, of `time.perf_counter`) to show a run of which this share is done."""
        if not self.shows:
            return False
        now = time.perf_counter() if now is None else now
        between = SECONDS_BETWEEN_LINES if self.bar.disable else SECONDS_BETWEEN_FRAMES
        return done >= 1 or now - self.last_shown >= between

    def update(
        self,
        done: float,
        step: int,
        loss: float,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        learning_rate: float | None = None,
        memory_gib: float | None = None,
        **_: float,
    ) -> None:
        """Shows where the run is, if it is time for it.

        Args:
            done: share of the run.
            step: optimizer steps done.
            loss: in nats per token, smoothed.
            tokens_per_second: of late.
            mfu: share of the devices' peak.
            learning_rate: of the matrices.
            memory_gib: the most that a device held.
        """
        now = time.perf_counter()
        if not self.is_due(done, now):
            return
        self.last_shown = now
        done = min(max(done, 0.0), 1.0)
        left = self._seconds_left(now, done)
        steps = f"{step:,}/{self.total_steps:,}" if self.total_steps else f"{step:,}"
        # From what is missed most to what is missed least where there is no room.
        self.parts = [
            f"{math.floor(100 * done):3d} %",
            f"loss {loss:.3f}",
            "" if left is None or done == 1 else f"{duration(left)} left",
            "" if not tokens_per_second else f"{compact(tokens_per_second)} tok/s",
            self._bits(loss),
            f"step {steps}",
            "" if not mfu else f"MFU {100 * mfu:.0f} %",
            "" if learning_rate is None else f"lr {learning_rate:.2g}",
            "" if not memory_gib else f"{memory_gib:.1f} GiB",
        ]
        self.done = done
        if self.bar.disable:
            print(", ".join(part for part in self.parts if part), file=sys.stderr, flush=True)
        else:
            self._draw()

    def note_validation(self, bits_per_byte: float) -> None:
        """The last validation, shown beside the training loss."""
        self.validation = bits_per_byte

    def write(self, text: str) -> None:
        """Lines above the bar."""
        if self.shows:
            self.bar.write(text, file=sys.stderr)

    def _bits(self, loss: float) -> str:
        shown = [] if self.bits_of_a_nat is None else [f"{loss * self.bits_of_a_nat:.3f} bits/byte"]
        if self.validation is not None:
            shown.append(f"val {self.validation:.3f}")
        return ", ".join(shown)

    def _seconds_left(self, now: float, done: float) -> float | None:
        if done < self.points[-1][1]:  # rolled back
            self.points.clear()
        self.points.append((now, done))
        while len(self.points) > 2 and self.points[1][0] <= now - WINDOW_SECONDS:
            self.points.popleft()
        (start, before), (end, after) = self.points[0], self.points[-1]
        return (1 - after) * (end - start) / (after - before) if after > before else None

    def _draw(self) -> None:
        # tqdm's own idea is that of the start, and stdout may be a file.
        columns = self.bar.ncols = _terminal_columns() - 1
        plain = not (getattr(sys.stderr, "encoding", None) or "").lower().startswith("utf")
        self.bar.set_description_str(fit_line(self.parts, self.done, columns, plain), refresh=True)


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or shutil.get_terminal_size().columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def fit_line(parts: list[str], done: float, columns: int, plain: bool = False) -> str:
    """The parts that there is room for, most important first, with a bar after the first of them.

    Args:
        parts: texts; empty ones are left out.
        done: share that the bar shows.
        columns: of the terminal.
        plain: in ASCII alone.
    """
    first, *rest = (part for part in parts if part)
    reserved = NARROWEST_BAR + 1 if columns >= COLUMNS_FOR_A_BAR else 0
    shown, used = [], len(first) + reserved
    for part in rest:
        cost = len(part) + len(BETWEEN)
        if used + cost > columns:
            break
        shown.append(part)
        used += cost
    room = min(columns - used + reserved - 1, WIDEST_BAR)
    bar = f" {draw_bar(done, room)}" if reserved else ""
    line = BETWEEN.join([first + bar, *shown])
    # Not every terminal has letters for this.
    return (_plain(line) if plain else line)[: max(columns, 1)]


def _plain(line: str) -> str:
    return line.translate({**dict.fromkeys(map(ord, EIGHTHS[1:]), "#"), ord("░"): ".", ord("·"): "|"})


def draw_bar(done: float, width: int) -> str:
    """A bar of `width` characters, in eighths of one."""
    eighths = round(min(max(done, 0.0), 1.0) * width * 8)
    bar = "█" * (eighths // 8)
    if eighths % 8:
        bar += EIGHTHS[eighths % 8]
    return bar.ljust(width, "░")


def compact(number: float) -> str:
    """A number in three digits or so: 812, 12.3k, 1.25M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 10 s, 2 h 5 min, 3 d 4 h."""
    seconds = math.ceil(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes % (24 * 60) // 60} h"

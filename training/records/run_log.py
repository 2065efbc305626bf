"""What a run notes down while it goes on: measured values, and what happened to it.

- `metrics.jsonl`: values by step; records of steps that a resumed run does again are dropped.
- `events.jsonl`: starts, resumes, checkpoints, skipped steps, ends, with the time of day; nothing is dropped.
- `samples.jsonl`: what the model wrote on the way.

What belongs here: where it goes, trackers among it. Who measures is the loop; what is made of it are
`curves.py` and `report.py`.
"""

import json
import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .curves import read_metrics
from .trackers import Trackers

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"


class RunLog:
    """The records of a run.

    Args:
        folder: run directory.
        writes: whether this process is the one that notes things down.
        say: prints a sentence.
    """

    def __init__(self, folder: Path, writes: bool = True, say: Callable[[str], None] = print):
        self.folder = folder
        self.path = folder / METRICS_FILE
        self.writes, self.say, self.failed = writes, say, False
        self.trackers: Trackers | None = None

    def track(self, names: list[str], config: dict[str, Any], step: int, say: Callable[[str], None]) -> None:
        """Sends to these trackers too from now on; the run directory is there."""
        if self.writes and names:
            self.trackers = Trackers(names, self.folder, config, self._identity(), step, say)

    def record(self, step: int, tokens: int, seconds: float, **values: float | None) -> None:
        """Adds a record; what is not a finite number is left out.

        Args:
            step: optimizer steps done.
            tokens: seen so far.
            seconds: of training so far.
            values: what was measured, by name; `group/part` for a value that there are several of.
        """
        if not self.writes:
            return
        found = {
            key: _rounded(value)
            for key, value in values.items()
            if value is not None and math.isfinite(value)
        }
        self._append(self.path, {"step": step, "tokens": tokens, "seconds": round(seconds, 3), **found})
        if self.trackers:
            self.trackers.log({"tokens": tokens, **found}, step)

    def event(self, kind: str, step: int, **told: Any) -> None:
        """Notes that something happened, in one word and what else there is to say, as JSON."""
        if self.writes:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._append(self.folder / EVENTS_FILE, {"time": now, "event": kind, "step": step, **told})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Notes what the model wrote at a step."""
        if self.writes:
            self._append(self.folder / SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})
            if self.trackers:
                self.trackers.log({"sample": text}, step)

    def trim(self, step: int) -> None:
        """Drops values and samples of steps after `step`, which a resumed run will do again."""
        for path in (self.path, self.folder / SAMPLES_FILE):
            if not self.writes or not path.is_file():
                continue
            kept = [record for record in read_metrics(path) if record["step"] <= step]
            aside = path.with_suffix(".partial")
            aside.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            aside.replace(path)

    def close(self) -> None:
        """Lets the trackers finish."""
        if self.trackers:
            self.trackers.finish()
            self.trackers = None

    def _identity(self) -> str:
        """A name for the run that no other has and that stays when it is resumed: that of its first start."""
        path = self.folder / EVENTS_FILE
        for event in read_metrics(path) if path.is_file() else []:
            if "run" in event:
                return event["run"]
        made = uuid.uuid4().hex[:12]
        self.event("track", 0, run=made)
        return made

    def _append(self, path: Path, record: dict) -> None:
        with self.going_on(), path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """What cannot be written in it is said once: a full disk is no reason to stop training."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                self.say(
                    f"{error.filename or self.folder} cannot be written ({error.strerror}); training goes on"
                )
            self.failed = True


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _rounded(value: float) -> float | int:
    """Seven digits: more than fp32 has, and small learning rates keep theirs."""
    return value if isinstance(value, int) else float(f"{float(value):.7g}")

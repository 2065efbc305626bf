"""What a run notes down while it goes on: `metrics.jsonl`, a record a line.

What belongs here: where measured values go. Who measures them is the loop; what is drawn of them is
`curves.py`.
"""

import json
import math
from pathlib import Path

from .curves import read_metrics

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """The records of a run.

    Args:
        folder: run directory.
        writes: whether this process is the one that notes things down.
    """

    def __init__(self, folder: Path, writes: bool = True):
        self.path = folder / METRICS_FILE
        self.writes = writes

    def record(self, step: int, tokens: int, seconds: float, **values: float) -> None:
        """Adds a record; what is not a number is left out."""
        if not self.writes:
            return
        record = {"step": step, "tokens": tokens, "seconds": round(seconds, 3)}
        record.update({key: round(float(value), 6) for key, value in values.items() if not math.isnan(value)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def trim(self, step: int) -> None:
        """Drops the records of steps after `step`, which a resumed run will do again."""
        if not self.path.is_file():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        aside.replace(self.path)

"""Examples of the documents that filters dropped: what a user looks at before trusting them.

What belongs here: keeping the first few of each reason, and how one is written down and shown.
"""

import json
from pathlib import Path

from .filters import Dropped

EXAMPLES = "dropped_examples.jsonl"
START = 300  # characters of a document that are kept


class DroppedExamples:
    """The first examples of each reason, in the order of reading.

    Args:
        limit: how many of each; 0 for none.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.rows: list[dict] = []
        self._counts: dict[str, int] = {}

    def add(self, text: str, dropped: Dropped, source: str) -> None:
        """Keeps the beginning of a document, if there are not enough of its reason yet."""
        count = self._counts.get(dropped.reason, 0)
        if count < self.limit:
            self._counts[dropped.reason] = count + 1
            self.rows.append({**vars(dropped), "source": source, "chars": len(text), "text": text[:START]})

    def load(self, rows: list[dict]) -> None:
        """Goes on from the `rows` of before."""
        self.rows = list(rows)
        self._counts = {}
        for row in self.rows:
            self._counts[row["reason"]] = self._counts.get(row["reason"], 0) + 1

    def write(self, folder: Path) -> None:
        """Writes `dropped_examples.jsonl`, by reason, if any were asked for."""
        if self.limit:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._by_reason()]
            (folder / EXAMPLES).write_text("".join(lines), encoding="utf-8")

    def show(self) -> str:
        """All of them, as text for people."""
        return "\n\n".join(map(describe, self._by_reason()))

    def _by_reason(self) -> list[dict]:
        order = list(self._counts)
        return sorted(self.rows, key=lambda row: order.index(row["reason"]))


def describe(row: dict) -> str:
    """One example: why it went, and how it begins."""
    head = f"{row['reason']}"
    if row["value"] is not None:
        head += f": {row['value']:.4g}, limit {row['limit']:.4g}"
    text = " ".join(row["text"].split())
    more = " ..." if row["chars"] > len(row["text"]) else ""
    return f"{head} ({row['chars']:,} characters of {row['source']})\n    {text}{more}"

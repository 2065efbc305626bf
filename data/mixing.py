"""Several sources in proportion: which of them gives the next documents.

What belongs here: what a source is, the known mixtures, and taking turns. Proportions are those of the tokens
that are written, whatever the filters drop: the next batch comes from the source that is furthest behind,
with what is on its way counted at the rate that it has had so far.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .sources import read_source

# Characters in a batch: large enough that sending it costs nothing, small enough that sources mix finely.
BATCH = 2**16


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        source: file, folder or Hub dataset, as for `read_texts`.
        weight: share of the tokens, relative to the other sources; None for none in particular.
        column, split, name: as for `read_texts`.
    """

    source: str
    weight: float | None = None
    column: str = "text"
    split: str = "train"
    name: str | None = None


@dataclass(frozen=True)
class Mixture:
    """A known mixture of sources, and how many tokens of it are taken unless told otherwise."""

    sources: tuple[Source, ...]
    tokens: int


MIXTURES = {
    # The web cleaned by C4's rules, and a fifth of encyclopedia. 2e9 tokens are twenty for each parameter of
    # a model of 100M (Hoffmann et al. 2022, arXiv:2203.15556).
    "c4-wikipedia": Mixture(
        sources=(
            Source("allenai/c4", weight=0.8, name="en"),
            Source("wikimedia/wikipedia", weight=0.2, name="20231101.en"),
        ),
        tokens=2_000_000_000,
    ),
}


def parse_source(given: str, **where: str | None) -> Source:
    """A source as it is written on the command line: `X`, or `X:weight`.

    Raises:
        ValueError: if the weight is not positive.
    """
    weighted = re.fullmatch(r"(.+):(-?\d*\.?\d+)", given)
    if weighted is None or Path(given).expanduser().exists():
        return Source(given, **where)
    if (weight := float(weighted[2])) <= 0:
        raise ValueError(f"the weight of {weighted[1]} must be positive, got {weighted[2]}")
    return Source(weighted[1], weight, **where)


# What a stream is that its documents do not tell.
_MARKED = ("read", "read_chars", "documents", "tokens", "text_bytes", "chars_in_flight", "ended")


@dataclass
class Stream:
    """A source that is being read, and what has come of it.

    Attributes:
        source: which it is.
        texts: what is still to come.
        read, read_chars: documents that were filtered, and their characters.
        documents, tokens, text_bytes: what was written.
        chars_in_flight: of documents that are on their way.
        ended: whether there is no more to come.
    """

    source: Source
    texts: Iterator[str]
    read: int = 0
    read_chars: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    chars_in_flight: int = 0
    ended: bool = False

    def behind(self) -> float:
        """Tokens over weight, with those that are to be expected of what is on its way."""
        rate = self.tokens / self.read_chars if self.read_chars else 1.0
        return (self.tokens + self.chars_in_flight * rate) / (self.source.weight or 1.0)

    def next_batch(self) -> list[str]:
        """Documents up to the size of a batch; none at the end."""
        batch, chars = [], 0
        while chars < BATCH and not self.ended:
            text = next(self.texts, None)
            if text is None:
                self.ended = True
            else:
                batch.append(text)
                chars += len(text)
        self.chars_in_flight += chars
        return batch

    def take(self, count: int) -> list[str]:
        """The next documents again, which an earlier process had as a batch.

        Raises:
            ValueError: if there are fewer.
        """
        batch = list(islice(self.texts, count))
        if len(batch) < count:
            raise self._changed()
        self.chars_in_flight += sum(map(len, batch))
        return batch

    def skip(self) -> None:
        """Goes to where an earlier process was, past the documents that it has read.

        Raises:
            ValueError: if there are fewer.
        """
        if sum(1 for _ in islice(self.texts, self.read)) < self.read:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.source.source} has fewer documents than were read of it before; begin anew with --restart"
        )

    def mark(self) -> dict:
        """How far it is; `restore` takes it."""
        return {name: getattr(self, name) for name in _MARKED}

    def restore(self, mark: dict) -> None:
        """Takes over what `mark` returned."""
        for name in _MARKED:
            setattr(self, name, mark[name])

    def account(self) -> dict:
        """What `data_meta.json` says of the source."""
        given = {key: value for key, value in vars(self.source).items() if value is not None}
        counts = {"read": self.read, "documents": self.documents, "tokens": self.tokens}
        return {**given, **counts, "bytes": self.text_bytes, "ended": self.ended and not self.chars_in_flight}


def open_streams(sources: list[Source], seed: int) -> list[Stream]:
    """Begins to read sources.

    Raises:
        ValueError: if there are none, only some have weights, or one is nowhere.
    """
    if not sources:
        raise ValueError("there is nothing to read: give a file, a folder, or a Hub dataset (org/name)")
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"{sources[weighted.index(False)].source} has no weight; give one to all, or to none"
        )
    streams = []
    for source in sources:
        where = {"column": source.column, "split": source.split, "name": source.name}
        streams.append(Stream(source, read_source(source.source, **where, seed=seed)))
    return streams


def next_batch(streams: list[Stream]) -> tuple[Stream, list[str]] | None:
    """Documents of the source whose turn it is; None at the end.

    Sources without weights are each read to the end. Of weighted ones the first that ends is the end of all,
    since there is no mixture without it.
    """
    while True:
        running = [stream for stream in streams if not stream.ended]
        if not running or (len(running) < len(streams) and streams[0].source.weight):
            return None
        stream = min(running, key=Stream.behind)
        if texts := stream.next_batch():
            return stream, texts

"""Rows that a trainer reads: token ids, what each is to predict, and where documents begin.

A row has T positions. At each stands the token before the one that is to be predicted there, so that every
token of the corpus is a target once an epoch: the end of a document is predicted from its last token, and its
first token from the separator before it, which is the end-of-text token where the tokenizer has one. A
document thus always begins with a separator, as it does when text is generated from nothing; that of the
first one is taken from the end of the first document. (A corpus of one document has none: its first token is
read and never predicted.)

Isolated, position ids restart at the separator that a document begins with, so that the model sees nothing
of what lies before it in the row. What is to be predicted is the same either way. What belongs here: what is
in a row, and the sequence of all rows of a run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .mixture import Schedule
from .order import permute
from .packing import RULE, Plan, plan_rows, read_plan, write_plan
from .text import Tokens

PACKINGS = ("contiguous", "best-fit")
IGNORED = -100  # a target that does not count, as in torch's cross entropy
# Packing so many takes a fraction of a second and some tens of MB; from there on the plan is kept as files.
DOCUMENTS_IN_MEMORY = 2**20


@dataclass(frozen=True)
class Batch:
    """Rows [B, T], int64.

    Attributes:
        input_ids: tokens.
        targets: the token after each, or `IGNORED` on padding.
        position_ids: from 0 in each document of a row; None where documents are not isolated.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray | None

    @property
    def labels(self) -> np.ndarray:
        """Targets as transformers' models want them, which shift them inside [B, T].

        The last position of a row is then without a target.
        """
        labels = np.full_like(self.targets, IGNORED)
        labels[:, 1:] = self.targets[:, :-1]
        return labels


class ContiguousRows:
    """The stream cut into rows, whatever documents are in them; an epoch starts at a random place.

    Args:
        tokens: the corpus.
        length: positions in a row.
        seed: of the places where epochs start.
        isolate: whether documents are kept apart; `tokens.starts` are needed then.

    Raises:
        ValueError: if the stream is shorter than a row, or it is not known where documents start.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int = 0, isolate: bool = False):
        self.ids, self.length, self.seed = tokens.ids, length, seed
        if len(self.ids) < length + 1:
            raise ValueError(
                f"the text to train on has {len(self.ids)} tokens, but a window of {length} needs "
                f"{length + 1}; give more text or a shorter window"
            )
        self.starts = _starts_of(tokens) if isolate else None
        # Short of one row, so that every start leaves as many whole ones.
        self.per_epoch = max((len(self.ids) - 1) // length - 1, 1)
        self._shift = lru_cache(maxsize=4)(self._draw_shift)

    def fill(
        self, epoch: int, i: int, inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray
    ) -> None:
        """Writes row `i` of an epoch into arrays [T]."""
        first = self._shift(epoch) + i * self.length
        last = first + self.length
        inputs[:] = self.ids[first:last]
        targets[:] = self.ids[first + 1 : last + 1]
        if self.starts is not None:
            # A document begins at the separator, one before its first token.
            # Places are of the type of the starts, which would be copied as a whole otherwise.
            places = np.array([first + 2, last + 1], dtype=self.starts.dtype)
            edges = np.searchsorted(self.starts, places)
            begins = np.asarray(self.starts[edges[0] : edges[1]]).astype(np.int64) - 1 - first
            _restart(positions, np.concatenate([[0], begins]))

    def _draw_shift(self, epoch: int) -> int:
        room = len(self.ids) - 1 - self.per_epoch * self.length
        generator = np.random.default_rng([self.seed, epoch])
        return int(generator.integers(min(room, self.length) + 1))


class PackedRows:
    """Rows that each start at a document, or at a piece of one that is longer than a row.

    Args:
        tokens: the corpus; `starts` are needed.
        length: positions in a row.
        folder: where a plan of many documents is kept; by default, or where nothing can be written, in
            memory.

    Raises:
        ValueError: if it is not known where documents start, or there are no tokens.
    """

    def __init__(self, tokens: Tokens, length: int, folder: Path | None = None):
        self.ids, self.length = tokens.ids, length
        starts = _starts_of(tokens)
        if len(self.ids) < 2:
            raise ValueError(f"the text to train on has {len(self.ids)} tokens; give more text")
        bounds = starts
        if len(starts) > 2:
            self._before_the_first = int(self.ids[int(starts[1]) - 1])
        else:
            bounds = np.array([1, len(self.ids)])
        self.plan = _plan(bounds, length, folder)
        self.per_epoch = len(self.plan)

    def fill(
        self, epoch: int, i: int, inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray
    ) -> None:
        """Writes row `i` of an epoch into arrays [T]."""
        at, begins = 0, []
        starts, lengths = self.plan.row(i)
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
            end = start + size
            begins.append(at)
            if start:
                inputs[at : at + size] = self.ids[start - 1 : end - 1]
            else:
                inputs[at] = self._before_the_first
                inputs[at + 1 : at + size] = self.ids[: end - 1]
            targets[at : at + size] = self.ids[start:end]
            at += size
        if at < self.length:
            # Any token will do: nothing sees it that counts.
            inputs[at:], targets[at:] = inputs[0], IGNORED
            begins.append(at)
        _restart(positions, np.array(begins))

    def counted(self, i: int) -> int:
        """Targets in row `i` that count."""
        return int(self.plan.row(i)[1].sum(dtype=np.int64))


class RowSequence:
    """All rows of a run, from number 0 on without an end: a pure function of the corpora and the seed.

    Every epoch of a corpus has each of its rows once, in an order of its own.

    Args:
        corpora: rows of each corpus.
        weights: shares of the rows; not needed for one corpus.
        seed: of orders.
        isolate: whether position ids restart at documents.

    Raises:
        ValueError: if weights are not positive.
    """

    def __init__(
        self,
        corpora: Sequence[ContiguousRows | PackedRows],
        weights: Sequence[float | str] | None = None,
        seed: int = 0,
        isolate: bool = False,
    ):
        self.corpora, self.seed, self.isolate = list(corpora), seed, isolate
        self.length = corpora[0].length
        self.schedule = Schedule(list(weights) if len(self.corpora) > 1 else [1])

    def locate(self, numbers: Sequence[int]) -> list[tuple[int, int, int]]:
        """Corpus, epoch, and row within it, of each number."""
        numbers = np.asarray(numbers, dtype=np.int64)
        places = np.empty((len(numbers), 3), dtype=np.int64)
        places[:, 0], nth = self.schedule.locate(numbers)
        for k, corpus in enumerate(self.corpora):
            of_corpus = places[:, 0] == k
            epochs, order = np.divmod(nth[of_corpus], corpus.per_epoch)
            rows = np.empty_like(order)
            for epoch in np.unique(epochs):
                of_epoch = epochs == epoch
                key = (self.seed, int(epoch), k)
                rows[of_epoch] = permute(order[of_epoch], corpus.per_epoch, key)
            places[of_corpus, 1:] = np.stack([epochs, rows], axis=1)
        return [tuple(place) for place in places.tolist()]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Rows by their numbers, in that order."""
        inputs, targets, positions = np.empty((3, len(numbers), self.length), dtype=np.int64)
        for row, (k, epoch, i) in enumerate(self.locate(numbers)):
            self.corpora[k].fill(epoch, i, inputs[row], targets[row], positions[row])
        return Batch(inputs, targets, positions if self.isolate else None)

    def counted(self, numbers: Sequence[int]) -> int:
        """Targets that count in the rows of these numbers, of all together."""
        if not any(isinstance(corpus, PackedRows) for corpus in self.corpora):
            return len(numbers) * self.length  # without looking where they are
        return sum(self.corpora[k].counted(i) for k, _, i in self.locate(numbers))

    def epochs(self, rows: int) -> list[float]:
        """How often each corpus was seen after so many rows."""
        counts = self.schedule.counts(rows).tolist()
        return [count / corpus.per_epoch for count, corpus in zip(counts, self.corpora, strict=True)]

    def rows_in(self, epochs: float) -> float:
        """Rows until the first corpus that is through has been seen so often."""
        shares = self.schedule.shares.tolist()
        pairs = zip(self.corpora, shares, strict=True)
        return min(epochs * corpus.per_epoch / share for corpus, share in pairs)


def make_rows(
    tokens: Tokens,
    length: int,
    packing: str = "contiguous",
    *,
    seed: int = 0,
    isolate: bool = False,
    folder: str | Path | None = None,
) -> ContiguousRows | PackedRows:
    """Rows of one corpus.

    Args:
        tokens: the corpus.
        length: positions in a row.
        packing: of `PACKINGS`.
        seed: of the places where epochs of contiguous rows start.
        isolate: whether documents will be kept apart.
        folder: of the tokens, where a large plan may be kept.

    Raises:
        ValueError: for another packing, too few tokens, or if it is not known where documents start.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be {' or '.join(map(repr, PACKINGS))}, got {packing!r}")
    if packing == "contiguous":
        return ContiguousRows(tokens, length, seed, isolate)
    return PackedRows(tokens, length, Path(folder) if folder is not None else None)


def _starts_of(tokens: Tokens) -> np.ndarray:
    if tokens.starts is None:
        raise ValueError(
            "nobody knows where the documents of these tokens start: there is no train.idx, and no "
            "end-of-text token among them; take contiguous rows that are not isolated"
        )
    return tokens.starts


def _plan(bounds: np.ndarray, length: int, folder: Path | None) -> Plan:
    if folder is None or len(bounds) <= DOCUMENTS_IN_MEMORY:
        return plan_rows(bounds, length)
    key = hashlib.sha256(f"{RULE} {length} ".encode())
    for first in range(0, len(bounds), DOCUMENTS_IN_MEMORY):
        key.update(np.asarray(bounds[first : first + DOCUMENTS_IN_MEMORY], dtype="<u8"))
    folder = folder / f"rows-best-fit-{length}-{key.hexdigest()[:12]}"
    try:
        return read_plan(folder) or write_plan(bounds, length, folder)
    except OSError:  # tokens that may only be read
        return plan_rows(bounds, length)


def _restart(positions: np.ndarray, begins: np.ndarray) -> None:
    """Numbers from 0 at each of the places."""
    sizes = np.diff(begins, append=len(positions))
    positions[:] = np.arange(len(positions)) - np.repeat(begins, sizes)

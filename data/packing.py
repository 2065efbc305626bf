"""Best-fit packing: documents to rows of one length, with nothing thrown away.

A document is laid into a row whole where that can be; one that is longer than a row is cut into rows, and
what is left of it is packed as if it were a document. Pieces go, longest first, into the row with the least
room that still takes them (best-fit decreasing). That depends on lengths alone, so it is done on counts of
pieces of each length, in time that grows with the number of different lengths and not of documents. Where
lengths do not add up to rows (all documents a little over half a row, say), the emptiest rows are poured
together and cut, so that padding stays under a bound whatever the corpus.

What belongs here: the plan, which pieces make a row, and its files. Pieces are stretches of *targets*, the
tokens to be predicted: each token of the corpus is one exactly once. What a row reads for them is
`training_rows.py`.
"""

import contextlib
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RULE = 1  # goes up when the same documents would be packed otherwise
# Documents that are packed together: many enough to fill rows, few enough to stay within 100 MB and to keep
# what is in a row close together on disk.
WINDOW = 2**19
PADDING = 256  # at most one position in so many is padding, beside the last row


@dataclass(frozen=True)
class Plan:
    """Which stretches of the corpus make which row.

    Attributes:
        starts: first target of each piece [P], uint64.
        lengths: targets in each piece [P], uint32.
        ends: for each row, the number of pieces up to its end [R], uint64.
    """

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the pieces of a row."""
        first = int(self.ends[i - 1]) if i else 0
        stretch = slice(first, int(self.ends[i]))
        return self.starts[stretch], self.lengths[stretch]


def plan_rows(bounds: np.ndarray, length: int, window: int = WINDOW) -> Plan:
    """Packs a corpus in memory; see `write_plan` for one that is too large for it.

    Args:
        bounds: first target of each document, in the order of the corpus, and the end [D + 1].
        length: targets in a row.
        window: documents that are packed together.

    Raises:
        ValueError: if there is nothing to pack.
    """
    parts = list(_plan_windows(bounds, length, window))
    if not parts:
        raise ValueError("there are no tokens to make rows of")
    starts, lengths, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Plan(starts, lengths, counts.cumsum().astype(np.uint64))


def write_plan(bounds: np.ndarray, length: int, folder: Path, window: int = WINDOW) -> Plan:
    """Packs a corpus window by window into files, and opens them as memory maps.

    The folder is written aside and renamed; of several processes that do so at once the first one stays, and
    all write the same.

    Args:
        bounds, length, window: as for `plan_rows`.
        folder: to write.

    Raises:
        ValueError: if there is nothing to pack.
        OSError: if it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own also where other machines write to this disk, as process ids may be equal there.
    naming = {"prefix": f".{folder.name}.", "suffix": ".partial", "dir": folder.parent}
    with tempfile.TemporaryDirectory(**naming, ignore_cleanup_errors=True) as scratch:
        # One more below it, as a temporary folder itself is closed to other users.
        aside = Path(scratch) / folder.name
        aside.mkdir()
        pieces = rows = targets = 0
        with (
            (aside / "starts.bin").open("wb") as starts_file,
            (aside / "lengths.bin").open("wb") as lengths_file,
            (aside / "ends.bin").open("wb") as ends_file,
        ):
            for starts, lengths, counts in _plan_windows(bounds, length, window):
                starts.astype("<u8").tofile(starts_file)
                lengths.astype("<u4").tofile(lengths_file)
                (pieces + counts.cumsum()).astype("<u8").tofile(ends_file)
                pieces, rows = pieces + len(starts), rows + len(counts)
                targets += int(lengths.sum(dtype=np.int64))
        if not rows:
            raise ValueError("there are no tokens to make rows of")
        notes = {"rule": RULE, "length": length, "rows": rows, "pieces": pieces, "targets": targets}
        (aside / "plan.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and read_plan(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            # Another process may be faster, and has written the same.
            with contextlib.suppress(OSError):
                aside.rename(folder)
    plan = read_plan(folder)
    if plan is None:
        raise OSError(f"{folder} cannot be written")
    return plan


def read_plan(folder: Path) -> Plan | None:
    """A plan that was written, as memory maps; None if it is not there or not whole."""
    try:
        notes = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        starts = np.memmap(folder / "starts.bin", dtype="<u8", mode="r")
        lengths = np.memmap(folder / "lengths.bin", dtype="<u4", mode="r")
        ends = np.memmap(folder / "ends.bin", dtype="<u8", mode="r")
        expected = notes["pieces"], notes["pieces"], notes["pieces"], notes["rows"], RULE
    except (KeyError, OSError, TypeError, ValueError):  # TypeError: no object
        return None
    found = len(starts), len(lengths), int(ends[-1]), len(ends), notes.get("rule")
    return Plan(starts, lengths, ends) if found == expected else None


# ---- window by window ----

_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # starts and lengths of pieces, pieces in each row


def _plan_windows(bounds: np.ndarray, length: int, window: int) -> Iterator[_Rows]:
    """Rows of one window of documents after the other; the last, unfilled row goes on into the next."""
    left = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    documents = len(bounds) - 1
    for first in range(0, documents, window):
        edges = np.asarray(bounds[first : first + window + 1]).astype(np.int64)
        starts, sizes = edges[:-1], np.diff(edges)
        whole = sizes // length
        tails = sizes % length
        if whole.any():
            # The n-th row of a document starts n rows after it.
            nth = np.arange(whole.sum()) - np.repeat(whole.cumsum() - whole, whole)
            full = np.repeat(starts, whole) + nth * length
            yield full.astype(np.uint64), np.full(len(full), length, dtype=np.uint32), np.ones_like(full)
        kept = tails > 0
        starts = np.concatenate([left[0], (starts + whole * length)[kept]])
        sizes = np.concatenate([left[1], tails[kept]])
        last = first + window >= documents
        rows, left = _pack(starts, sizes, length, last)
        if len(rows[2]):
            yield rows


def _pack(starts: np.ndarray, sizes: np.ndarray, length: int, last: bool) -> tuple[_Rows, tuple]:
    """Rows of pieces that are shorter than a row, and pieces that are left, none of the last window."""
    # Longest first; pieces of one length in the order of the corpus.
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[order], sizes[order]
    lengths, first, counts = np.unique(-sizes, return_index=True, return_counts=True)
    groups = best_fit(dict(zip((-lengths).tolist(), counts.tolist(), strict=True)), length)

    next_of = dict(zip((-lengths).tolist(), first.tolist(), strict=True))
    taken, rows_sizes = [], []
    for count, contents in groups:
        columns = []
        for size, each in contents:
            begin = next_of[size]
            next_of[size] = begin + count * each
            columns.append(np.arange(begin, begin + count * each).reshape(count, each))
        block = np.concatenate(columns, axis=1)
        taken.append(block.reshape(-1))
        rows_sizes.append(np.full(count, block.shape[1]))
    taken = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
    counts = np.concatenate(rows_sizes) if rows_sizes else np.empty(0, dtype=np.int64)
    starts, sizes = starts[taken], sizes[taken]
    return _pour(starts, sizes, counts, length, last)


def best_fit(counts: dict[int, int], length: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Best-fit decreasing on numbers of pieces of each length.

    Args:
        counts: length of a piece (at most `length`) to how many there are, longest first.
        length: of a row.

    Returns:
        For each kind of row how many there are, and its contents: lengths of pieces, and how many of each.
    """
    # Rows that are alike are one entry (how many, contents) in the list of the room that they have left; the
    # bits of `rooms` say which lists are not empty.
    open_rows: dict[int, list] = defaultdict(list)
    rooms = 1 << length

    for size, pieces in counts.items():
        while pieces:
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1
            if room == length:
                rows, contents = pieces, []  # as many new ones as it takes
            else:
                rows, contents = open_rows[room].pop()
            each = min(room // size, pieces)
            used = min(rows, pieces // each)
            if room < length and used < rows:
                open_rows[room].append((rows - used, contents))
            if room < length and not open_rows[room]:
                rooms &= ~(1 << room)
            after = room - each * size
            open_rows[after].append((used, [*contents, (size, each)]))
            rooms |= 1 << after
            pieces -= used * each
    return [entry for entries in open_rows.values() for entry in entries]


def _pour(
    starts: np.ndarray, sizes: np.ndarray, counts: np.ndarray, length: int, last: bool
) -> tuple[_Rows, tuple]:
    """Keeps rows that are full enough together; pours the emptiest into one another, cutting pieces."""
    of_row = np.repeat(np.arange(len(counts)), counts)
    gaps = length - np.bincount(of_row, weights=sizes, minlength=len(counts)).astype(np.int64)
    fullest = np.argsort(gaps, kind="stable")
    kept = np.empty(len(counts), dtype=bool)
    # As many as there can be without more padding than the bound.
    kept[fullest] = gaps[fullest].cumsum() * PADDING <= np.arange(1, len(counts) + 1) * length
    piece_kept = kept[of_row]
    rows = [(starts[piece_kept], sizes[piece_kept], counts[kept])]

    starts, sizes = starts[~piece_kept], sizes[~piece_kept]
    if sizes.sum() >= length or last:
        ends = sizes.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.union1d(ends, np.arange(length, total, length))
        begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64) if total else np.empty(0, np.int64)
        piece = np.searchsorted(ends, begins, side="right")
        starts = starts[piece] + begins - (ends - sizes)[piece]
        sizes = cuts - begins
        row = begins // length
        whole = len(row) if last else int(np.searchsorted(row, total // length))
        rows.append((starts[:whole], sizes[:whole], np.bincount(row[:whole]).astype(np.int64)))
        starts, sizes = starts[whole:], sizes[whole:]
    starts_of, sizes_of, counts_of = (np.concatenate(column) for column in zip(*rows, strict=True))
    made = starts_of.astype(np.uint64), sizes_of.astype(np.uint32), counts_of.astype(np.int64)
    return made, (starts, sizes)

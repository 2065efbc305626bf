"""One pass over the sources: documents in, two growing splits out, and a mark now and then to go on from.

Notable:
- a mark is made between two batches and holds everything that what follows depends on: how far each source
is, the batches that were on their way (which had a part in whose turn it was), counts, and the sizes of the
files. What is written after a kill is therefore what would have been written without it;
- what becomes of a document is decided in one place, `_fates`, in the order of reading; what costs time was
done before, in the processes of the pool.

What belongs here: that loop, and which split a document goes to.
"""

import hashlib
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np

from .deduplication import DUPLICATE, NEAR_DUPLICATE, SeenSignatures, SeenTexts, minhash
from .dropped import DroppedExamples
from .encoding import EncodedBatch, Encoder, EncodingPool
from .filters import Dropped
from .journal import GrowingFile, Journal
from .mixing import BATCH, Source, Stream, next_batch
from .progress import Progress
from .sources import read_source
from .text import MANY_DOCUMENTS
from .token_files import SPLITS
from .token_writer import TokenWriter

# Batches on their way. The same for any number of processes, since the mixing sees results only after them.
IN_FLIGHT = 64
# Where the hashes leave nothing for validation, at most so many documents are moved there.
RECENT = 64
# Work that a kill costs at most. A mark waits for the disk, some hundredths of a second.
SECONDS_BETWEEN_MARKS = 5.0


class NothingToKeep(ValueError):
    """There is too little text; going on later would change nothing."""


class EncodingPass:
    """One pass over the streams.

    Args:
        folder: where the splits go.
        working: folder for what is needed only until the pass is over.
        encoder: what documents go through.
        streams: the sources, at their beginnings.
        budget: tokens to end with; None for all there are.
        val_fraction: share of the documents to hold out.
        explain: examples to keep of what each filter drops.
        journal: where marks go.
        arguments: of the run, which a mark begins with.
        mark: what the journal holds of an earlier process; None to begin.

    Raises:
        ValueError: if files or sources are less than the mark tells.
    """

    def __init__(
        self,
        folder: Path,
        working: Path,
        encoder: Encoder,
        streams: list[Stream],
        budget: int | None,
        val_fraction: float,
        explain: int,
        journal: Journal,
        arguments: dict[str, Any],
        mark: dict[str, Any] | None = None,
    ):
        self.encoder, self.streams, self.budget, self.val_fraction = encoder, streams, budget, val_fraction
        self.journal, self.arguments = journal, arguments
        self._between = [] if encoder.eos is not None else list(encoder.separator)
        marks = mark["splits"] if mark else dict.fromkeys(SPLITS)
        self.writers = {
            split: TokenWriter(folder, split, encoder.dtype, self._between, marks[split]) for split in SPLITS
        }
        self.seen, self.near = SeenTexts(), SeenSignatures()
        self._keys = []  # of documents before, and the files that they outlive this process in
        for name, keys in (("seen", self.seen), ("near", self.near)):
            file = GrowingFile(working / f"{name}.bin", mark[name] if mark else 0)
            keys.load(file.read(0, file.size))
            self._keys.append((name, keys, file))
        self.dropped = Counter(mark["dropped"] if mark else ())
        self.lines_dropped = Counter(mark["lines_dropped"] if mark else ())
        self.examples = DroppedExamples(explain)
        self.examples.load(mark["examples"] if mark else [])
        # Whether validation has text of its own.
        self.held_out: bool = mark["held_out"] if mark else False
        # How validation is chosen, for the account.
        self.drawn_by: str = mark["drawn_by"] if mark else "hash"
        # The first documents wait until it is known whether there are many; no mark is made before.
        self._waiting: list[tuple[Stream, list[str], EncodedBatch, np.ndarray]] | None = None if mark else []
        # Last documents of training: source, and bytes of the text.
        self._recent: deque[tuple[int, int]] = deque(
            map(tuple, mark["recent"] if mark else ()), maxlen=RECENT
        )
        # Source of the last document of each split.
        self._last: dict[str, int] = mark["last"] if mark else {}
        self._batches: int = mark["batches"] if mark else 0  # that are written
        self._done: bool = mark["done"] if mark else False
        # Batches on their way: of an earlier process, source and number of documents; of this one, all of it.
        self._planned: list[tuple[int, int]] = mark["pending"] if mark else []
        self._pending: deque = deque()
        for stream, number in zip(streams, mark["streams"] if mark else (), strict=False):
            stream.restore(number)

    def hold_out(self, sources: list[str], like: Source) -> None:
        """Takes text of its own for validation."""
        self.held_out, self._waiting, self.drawn_by = True, None, "text of its own"
        where = {"column": like.column, "split": like.split, "name": like.name}
        batch: list[str] = []
        chars = 0
        for source in sources:
            for text in read_source(source, **where):
                batch.append(text)
                chars += len(text)
                if chars >= BATCH:
                    self._hold_out_batch(batch)
                    batch, chars = [], 0
        if batch:
            self._hold_out_batch(batch)

    def run(self, pool: EncodingPool) -> None:
        """Reads until the sources end or the tokens are enough, unless an earlier process did."""
        if self._done:
            return
        with Progress(self.budget, self._tokens()) as progress:
            self._replay(pool)
            marked = time.monotonic()
            while self._fill(pool):
                stream, texts, wait = self._pending.popleft()
                self._batches += 1
                if self._take(stream, texts, wait()):
                    break
                progress.show(self.streams, self._tokens(), self.dropped)
                if self._waiting is None and time.monotonic() - marked >= SECONDS_BETWEEN_MARKS:
                    self.mark()
                    marked = time.monotonic()
        self._done = True

    def mark(self) -> None:
        """Makes what is written so far what a later process goes on from."""
        sizes = {}
        for name, keys, file in self._keys:
            file.append(keys.take_added())
            sizes[name] = file.sync()
        self.journal.write(
            {
                "arguments": self.arguments,
                "splits": {split: writer.mark() for split, writer in self.writers.items()},
                **sizes,
                "streams": [stream.mark() for stream in self.streams],
                "pending": [[self.streams.index(stream), len(texts)] for stream, texts, _ in self._pending],
                "batches": self._batches,
                "dropped": dict(self.dropped),
                "lines_dropped": dict(self.lines_dropped),
                "examples": self.examples.rows,
                "held_out": self.held_out,
                "drawn_by": self.drawn_by,
                "recent": list(self._recent),
                "last": self._last,
                "done": self._done,
            }
        )

    def finish(self) -> dict[str, dict]:
        """Sees to it that both splits have text, ends the files, and returns their counts.

        Raises:
            NothingToKeep: if there is not enough text for two splits.
        """
        few = any(len(kept) for *_, kept in self._waiting or ())
        if not few and not any(stream.documents for stream in self.streams):
            read = sum(stream.read for stream in self.streams)
            reasons = ", ".join(f"{name} dropped {count}" for name, count in self.dropped.most_common())
            raise NothingToKeep(f"nothing is left of {read} documents: {reasons}; choose other --filters")
        if few:
            self._hold_out_tail()
        elif not self.writers["val"].documents:
            self._move_last()
        for split, writer in self.writers.items():
            if writer.tokens < 2:
                raise NothingToKeep(
                    f"too little text for a split of its own: {writer.tokens} tokens for {split}; give more "
                    "text, another --val-fraction, or held-out text with --val-data"
                )
        # From here on a later process finds both splits as they are now, and nothing more to do than this.
        self._pending.clear()
        self.mark()
        for split, stream in self._last.items():
            if self.writers[split].documents:
                self.streams[stream].tokens -= len(self._between)
        return {split: writer.finish() for split, writer in self.writers.items()}

    def close(self) -> None:
        """Closes the files as they are."""
        for file in (*self.writers.values(), *(file for *_, file in self._keys)):
            file.close()

    # ---- reading ----

    def _replay(self, pool: EncodingPool) -> None:
        """Reads up to where an earlier process was, and sends what it had on its way."""
        if self._batches == 0:
            return
        for stream in self.streams:
            stream.chars_in_flight = 0
            stream.skip()
        for number, count in self._planned:
            stream = self.streams[number]
            texts = stream.take(count)
            self._pending.append((stream, texts, pool.submit(texts)))

    def _fill(self, pool: EncodingPool) -> bool:
        """Sends batches until enough are on their way; false at the end."""
        # Few at first, until it is known how many tokens a source gives.
        limit = min(self._batches + 2, IN_FLIGHT)
        while len(self._pending) < limit and (chosen := next_batch(self.streams)):
            stream, texts = chosen
            self._pending.append((stream, texts, pool.submit(texts)))
        return bool(self._pending)

    def _tokens(self) -> int:
        waiting = sum(int(result.lengths_of(kept).sum()) for _, _, result, kept in self._waiting or ())
        return sum(stream.tokens for stream in self.streams) + waiting

    # ---- deciding ----

    def _take(self, stream: Stream, texts: list[str], result: EncodedBatch) -> bool:
        """Counts and writes a batch, up to the document that reaches the budget; whether one does."""
        fates = self._fates(result)
        kept = np.flatnonzero([fate is None for fate in fates])
        enough = False
        if self.budget is not None and len(kept):
            reached = self._tokens() + np.cumsum(result.lengths_of(kept))
            if enough := bool(reached[-1] >= self.budget):
                kept = kept[: int(np.searchsorted(reached, self.budget)) + 1]
                fates = fates[: int(kept[-1]) + 1]
        chars = sum(map(len, texts[: len(fates)]))
        stream.read += len(fates)
        stream.read_chars += chars
        stream.chars_in_flight -= chars
        for i, fate in enumerate(fates):
            if fate:
                self.dropped[fate.reason] += 1
                self.examples.add(texts[i], fate, stream.source.source)
            if i in result.lines:
                self.lines_dropped.update(result.lines[i])
        if self._waiting is None:
            self._write(stream, result, kept)
        else:
            self._waiting.append((stream, texts, result, kept))
            if sum(len(kept) for *_, kept in self._waiting) >= MANY_DOCUMENTS:
                waiting, self._waiting = self._waiting, None
                for stream, _, result, kept in waiting:
                    self._write(stream, result, kept)
        return enough

    def _fates(self, result: EncodedBatch) -> list[Dropped | None]:
        """For each document why it is dropped, or None; for each batch once, in the order of reading."""
        remember = DUPLICATE in self.encoder.filters.names
        if not (remember or self.held_out or result.signatures):
            return result.dropped
        fates = list(result.dropped)
        for i, dropped in enumerate(fates):
            if dropped is None:
                digest = result.digest(i)
                if digest in self.seen:
                    fates[i] = Dropped(DUPLICATE)
                elif i in result.signatures and self.near.seen(result.signatures[i]):
                    fates[i] = Dropped(NEAR_DUPLICATE)
                elif remember:
                    self.seen.add(digest)
        return fates

    # ---- writing ----

    def _write(self, stream: Stream, result: EncodedBatch, kept: np.ndarray) -> None:
        """Writes documents to the splits that their hashes draw."""
        is_val = result.draws[kept] < (0.0 if self.held_out else self.val_fraction)
        for split, chosen in zip(SPLITS, (kept[~is_val], kept[is_val]), strict=True):
            if len(chosen):
                ids, ends = result.select(chosen)
                self._put(split, stream, ids, ends, result.num_bytes[chosen].tolist())

    def _put(self, split: str, stream: Stream, ids: np.ndarray, ends: np.ndarray, sizes: list[int]) -> None:
        number = self.streams.index(stream)
        self.writers[split].add(ids, ends, sum(sizes))
        self._last[split] = number
        stream.tokens += len(ids)
        stream.documents += len(ends)
        stream.text_bytes += sum(sizes)
        if split == "train":
            self._recent.extend((number, size) for size in sizes[-RECENT:])

    def _hold_out_batch(self, texts: list[str]) -> None:
        result = self.encoder.encode_batch(texts)
        for i, text in enumerate(texts):
            self.seen.add(result.digest(i))
            # Held out as it is, but in training it would be met as the filters leave it.
            cleaned, _ = self.encoder.filters.clean(text)
            if cleaned != text:
                self.seen.add(hashlib.sha256(cleaned.encode("utf-8")).digest())
            if NEAR_DUPLICATE in self.encoder.filters.names:
                for version in dict.fromkeys((text, cleaned)):
                    self.near.seen(minhash(version))
        ids, ends = result.select(np.arange(len(texts)))
        self.writers["val"].add(ids, ends, int(result.num_bytes.sum()))

    def _move_last(self) -> None:
        """Where the draw left nothing to validation: the last documents, but never all."""
        train, val = self.writers["train"], self.writers["val"]
        wanted = max(int(train.documents * self.val_fraction), 1)
        count = min(wanted, len(self._recent), train.documents - 1)
        if count < 1:
            return
        self.drawn_by = "last documents"
        moved = [self._recent.pop() for _ in range(count)][::-1]
        sizes = [size for _, size in moved]
        val.add(*train.take_back(sizes), sum(sizes))
        self._last["val"] = moved[-1][0]
        if self._recent:
            self._last["train"] = self._recent[-1][0]

    def _hold_out_tail(self) -> None:
        """Of few documents: the last bytes, which may cut one in two."""
        self.drawn_by = "end of the text"
        documents = [
            (stream, result.changed.get(i, texts[i]))
            for stream, texts, result, kept in self._waiting
            for i in kept.tolist()
        ]
        total = sum(len(text.encode("utf-8")) for _, text in documents)
        room = total - int(total * self.val_fraction)  # for training
        for stream, text in documents:
            encoded = text.encode("utf-8")
            cut = min(max(room, 0), len(encoded))
            while 0 < cut < len(encoded) and encoded[cut] & 0xC0 == 0x80:  # within a character
                cut -= 1
            room -= len(encoded)
            for split, part in zip(SPLITS, (encoded[:cut], encoded[cut:]), strict=True):
                if part:
                    result = self.encoder.encode_batch([part.decode("utf-8")])
                    self._put(split, stream, *result.select(np.arange(1)), [len(part)])
        self._waiting = None

"""BPE merges from counted words, in numpy: which two tokens to join next, 32,000 times over.

What belongs here: the merging alone. Where words come from, what bytes are called and what a tokenizer is
made of is for others; words are byte strings with counts, tokens are numbers.

The rule is that of the trainer of the `tokenizers` library, and so are its merges: the pair that is seen
most often is joined everywhere, from left to right, of several as frequent ones the pair of the smallest
ids; pairs inside a run overlap when they are counted ("aaa" has two) but not when they are joined.
(Sennrich et al., 2016, https://arxiv.org/abs/1508.07909, algorithm 1, with updates for counting anew.)

All words lie in one array of bytes, so that a token is where it starts and how long it is:

- `first[i]` is the token that starts at i, and -1 where none does: between words, or inside a token;
- `last[i]` is the token that ends at i (and anything where none does, which is never looked up);
- a pair is known by the places where it was when it came up. From then on it only becomes rarer: its tokens
  are joined with others, and none of them is made again later, since a string of bytes becomes a token in
  one way only. So its count at that time is the most that it can be, and its places are looked at again
  only when it is the first in the queue.

Each place where tokens are joined makes at most two new pairs, and there are never more such places than
bytes; so memory is about 60 bytes for each byte of all different words, whatever the size of the vocabulary.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

# No byte of UTF-8: stands between words.
SEPARATOR = b"\xff"
# Pairs are queued when their count reaches a bar that starts at this share of the highest and is lowered by
# half when none is left above it. Those below it, nearly all, never cost more than their place in an array.
_FIRST_BAR = 1 / 16
_NUM_BYTES = 256
SECONDS_BETWEEN_REPORTS = 5.0


def train_merges(
    words: Iterable[bytes],
    counts: Sequence[int],
    num_merges: int,
    *,
    byte_ids: Sequence[int] = range(_NUM_BYTES),
    min_count: int = 2,
    report: Callable[[int], None] | None = None,
) -> list[tuple[int, int]]:
    """Finds the merges of byte-level BPE.

    Args:
        words: different words, of bytes other than 0xff (which UTF-8 does not have).
        counts: how often each is there.
        num_merges: how many merges at most.
        byte_ids: token of each byte, which decides between equally frequent pairs.
        min_count: a pair that is there less often is not merged.
        report: called now and then with the number of merges so far.

    Returns:
        Pairs of tokens in the order in which they are merged; the i-th makes the token 256 + i. Fewer than
        `num_merges` if there are no more pairs of `min_count`.
    """
    merging = _Merging(words, counts, byte_ids, _NUM_BYTES + num_merges, min_count)
    reported = time.monotonic()
    while len(merging.merges) < num_merges and merging.merge_next():
        if report is not None and time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
            report(len(merging.merges))
            reported = time.monotonic()
    return merging.merges


class _Merging:
    """The state of all words, and the pairs in them."""

    def __init__(
        self,
        words: Iterable[bytes],
        counts: Sequence[int],
        byte_ids: Sequence[int],
        vocab_size: int,
        min_count: int,
    ):
        self.merges: list[tuple[int, int]] = []
        self._lengths = np.ones(vocab_size, dtype=np.int64)  # in bytes, of each token
        self._vocab_size = vocab_size

        text = np.frombuffer(b"".join([SEPARATOR, *(word + SEPARATOR for word in words)]), dtype=np.uint8)
        ids = np.array(byte_ids, dtype=np.int32)
        ids[SEPARATOR[0]] = -1
        self._first = ids[text]
        self._last = self._first.copy()
        ends = np.flatnonzero(self._first < 0)
        sizes = np.diff(ends)
        self._counts = np.zeros(len(text), dtype=np.int64)  # of the word that a byte is in
        self._counts[1:] = np.repeat(np.array(counts, dtype=np.int64), sizes)
        # Pairs above the bar, as (-count, left, right, places); and below, as `_Waiting`.
        self._queue: list[tuple[int, int, int, np.ndarray]] = []
        self._below: list[tuple[int, int, int, np.ndarray]] = []
        self._waiting: list[_Waiting] = []
        self._bar = self._min_count = max(min_count, 1)

        starts = np.flatnonzero((self._first[:-1] >= 0) & (self._first[1:] >= 0))
        left, right = self._first[starts], self._first[starts + 1]
        groups = _group(left * np.int64(_NUM_BYTES) + right, starts, self._counts)
        if groups is not None:
            keys, places, bounds, sums = groups
            self._bar = max(int(sums.max() * _FIRST_BAR), self._min_count)
            self._add(_Waiting(keys // _NUM_BYTES, keys % _NUM_BYTES, places, bounds, sums))

    def merge_next(self) -> bool:
        """Merges the most frequent pair; false if none is frequent enough."""
        first = self._first
        while True:
            while not self._queue or -self._queue[0][0] < self._bar:
                if self._bar == self._min_count:
                    return False
                self._lower_bar(max(self._bar // 2, self._min_count))
            highest, left, right, places = heapq.heappop(self._queue)
            still = (first[places] == left) & (first[places + self._lengths[left]] == right)
            places = places[still]
            count = int(self._counts[places].sum())
            if count == -highest:
                self._merge(left, right, places)
                return True
            if count >= self._bar:
                heapq.heappush(self._queue, (-count, left, right, places))
            elif count >= self._min_count:
                self._below.append((-count, left, right, places))

    def _merge(self, left: int, right: int, places: np.ndarray) -> None:
        token = _NUM_BYTES + len(self.merges)
        self.merges.append((left, right))
        first, last, lengths = self._first, self._last, self._lengths
        if left == right:
            places = _apart(places, int(lengths[left]))
        middles = places + lengths[left]
        length = lengths[token] = lengths[left] + lengths[right]
        ends = places + length
        first[middles] = -1
        first[places] = token
        last[ends - 1] = token

        before, after = last[places - 1], first[ends]
        # Two new tokens side by side are found at the left one.
        has_before = (before >= 0) & (before != token)
        has_after = after >= 0
        before = before[has_before]
        groups = _group(
            np.concatenate([before, after[has_after] + self._vocab_size], dtype=np.int64),
            np.concatenate([places[has_before] - lengths[before], places[has_after]]),
            self._counts,
        )
        if groups is not None:
            keys, places, bounds, sums = groups
            is_before = keys < self._vocab_size
            lefts = np.where(is_before, keys, token)
            rights = np.where(is_before, token, keys - self._vocab_size)
            self._add(_Waiting(lefts, rights, places, bounds, sums))

    def _add(self, pairs: "_Waiting") -> None:
        for entry in pairs.take(self._bar):
            heapq.heappush(self._queue, entry)
        self._waiting.append(pairs)

    def _lower_bar(self, bar: int) -> None:
        self._bar = bar
        self._queue += [entry for entry in self._below if -entry[0] >= bar]
        self._below = [entry for entry in self._below if -entry[0] < bar]
        for pairs in self._waiting:
            self._queue += pairs.take(bar)
        self._waiting = [pairs for pairs in self._waiting if pairs.highest > 1]
        heapq.heapify(self._queue)


class _Waiting:
    """Pairs that came up together, until their count reaches the bar.

    Args:
        lefts: left token of each pair.
        rights: right token of each.
        places: where they are, pair after pair.
        bounds: where the places of each begin, and where the last ones end.
        sums: how often each is there.
    """

    __slots__ = ("_bounds", "_lefts", "_places", "_rights", "_sums", "highest")

    def __init__(self, lefts, rights, places, bounds, sums):
        self._lefts, self._rights = lefts, rights
        self._places, self._bounds, self._sums = places, bounds, sums
        self.highest = int(sums.max())

    def take(self, bar: int) -> list[tuple[int, int, int, np.ndarray]]:
        """The pairs whose count is at least the bar, which no longer wait."""
        if self.highest < bar:
            return []
        chosen = np.flatnonzero(self._sums >= bar)
        places = self._places
        taken = [
            (-count, left, right, places[start:end])
            for count, left, right, start, end in zip(
                self._sums[chosen].tolist(),
                self._lefts[chosen].tolist(),
                self._rights[chosen].tolist(),
                self._bounds[chosen].tolist(),
                self._bounds[chosen + 1].tolist(),
                strict=True,
            )
        ]
        self._sums[chosen] = 0
        self.highest = int(self._sums.max())
        return taken


def _group(keys: np.ndarray, places: np.ndarray, counts: np.ndarray):
    """Places of equal keys together: the keys, all places, bounds of each key's, sum of its counts."""
    if not len(keys):
        return None
    # Sorted as one number: faster than an order to apply, and places come out ascending.
    both = (keys << 32) | places
    both.sort()
    places = both & 0xFFFFFFFF
    keys = both >> 32
    starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    sums = np.add.reduceat(counts[places], starts)
    return keys[starts], places, np.append(starts, len(keys)), sums


def _apart(places: np.ndarray, length: int) -> np.ndarray:
    """Every other place of each run of tokens that overlap by one, from the left."""
    begins = np.concatenate([[True], np.diff(places) != length])
    index = np.arange(len(places))
    return places[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]

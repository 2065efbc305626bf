"""Words that were encoded before, looked up by the thousand: what makes encoding faster than merging.

A word of up to 15 bytes is its own key: two 64-bit integers that hold its bytes and its length, so that equal
keys are equal words. They are in a hash table of arrays (open addressing), where all words of a batch are
looked up at once; a longer one is in a dictionary. Only what is in neither is given to the tokenizer.

What belongs here: those tables. How a text becomes words is `data/word_splits.py`.
"""

from collections.abc import Callable
from itertools import chain

import numpy as np

LONGEST = 15  # bytes of a word that fits its key
PADDING = bytes(16)  # what must follow a text, since keys are read 16 bytes at a time
# Slots, a power of two: 24 bytes each. Up to half of them are filled, and twice as many ids kept.
SLOTS = 2**20
MOST_LONG = 2**16  # longer words that are remembered
_PROBES = 32  # a key that is in none of so many slots from its own on is not there
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, with bits all over
# What of the first and of the second 8 bytes belongs to a word, by its length.
_LOW = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(LONGEST + 1)], dtype=np.uint64)
_HIGH = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(LONGEST + 1)], dtype=np.uint64)


class WordTable:
    """Ids of words.

    Args:
        encode: gives the ids of each of some words, which do not depend on what is around a word.
        dtype: type of ids.
    """

    def __init__(self, encode: Callable[[list[bytes]], list[list[int]]], dtype: np.dtype | str):
        self._encode = encode
        self._low = np.zeros(SLOTS, dtype=np.uint64)
        self._high = np.zeros(SLOTS, dtype=np.uint64)  # length in its highest byte: 0 for an empty slot
        self._first = np.zeros(SLOTS, dtype=np.int32)  # where its ids begin
        self._count = np.zeros(SLOTS, dtype=np.int32)
        self._short = 0
        self._long: dict[bytes, tuple[int, int]] = {}
        self._ids = np.zeros(4 * SLOTS, dtype=dtype)
        self._num_ids = 0

    @property
    def no_ids(self) -> np.ndarray:
        """An array of none, of the type of ids."""
        return self._ids[:0]

    def look_up(self, data: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words, one after the other, and how many each of them has.

        Args:
            data: UTF-8 text with `PADDING` behind it.
            starts, ends: of each word, in bytes, none of them empty [words].
        """
        lengths = ends - starts
        is_short = lengths <= LONGEST
        clipped = np.minimum(lengths, LONGEST)
        # The 8 bytes from every byte on.
        eights = np.ndarray(len(data) - 7, dtype="<u8", buffer=data, strides=(1,))
        low = eights[starts] & _LOW[clipped]
        high = eights[starts + 8] & _HIGH[clipped] | clipped.astype(np.uint64) << np.uint64(56)
        slots = self._find(low, high)
        slots[~is_short] = -1
        first, count = self._first[slots], self._count[slots]
        fresh = np.zeros(0, dtype=self._ids.dtype)
        if len(missing := np.flatnonzero(slots < 0)):
            places, fresh = self._find_missing(data, starts, ends, missing, low, high, is_short)
            first[missing], count[missing] = places
        pool = self._ids
        if len(fresh):  # for which there was no room; they are behind all others
            pool = np.concatenate([self._ids[: self._num_ids], fresh])
        total = np.cumsum(count, dtype=np.int64)
        places = np.repeat(first - (total - count), count)
        places += np.arange(len(places))
        return pool[places], count

    def _find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Slots of keys, -1 for those that are not there [keys]."""
        slots = self._own_slots(low, high)
        found = (self._high[slots] == high) & (self._low[slots] == low)
        looking = np.flatnonzero(~found & (self._high[slots] != 0))
        slots[~found & (self._high[slots] == 0)] = -1
        for _ in range(_PROBES):
            if not len(looking):
                break
            at = (slots[looking] + 1) % SLOTS
            there = self._high[at]
            slots[looking] = np.where(there == 0, -1, at)
            found = (there == high[looking]) & (self._low[at] == low[looking])
            looking = looking[~found & (there != 0)]
        slots[looking] = -1
        return slots

    @staticmethod
    def _own_slots(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = (low ^ (high * _FACTORS[1])) * _FACTORS[0]
        return (mixed >> np.uint64(64 - (SLOTS - 1).bit_length())).astype(np.int64)

    def _find_missing(
        self,
        data: bytes,
        starts: np.ndarray,
        ends: np.ndarray,
        missing: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        is_short: np.ndarray,
    ) -> tuple[tuple[list[int], list[int]], np.ndarray]:
        """Places of the ids of words that are in no slot, and the ids of those that are not kept."""
        words = [data[a:b] for a, b in zip(starts[missing].tolist(), ends[missing].tolist(), strict=True)]
        where = {word: self._long.get(word) for word in words}
        new = [word for word, place in where.items() if place is None]
        if new:
            encoded = self._encode(new)
            counts = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            behind = self._num_ids + np.cumsum(counts) - counts
            ids = np.fromiter(chain.from_iterable(encoded), dtype=self._ids.dtype, count=counts.sum())
            places = list(zip(behind.tolist(), counts.tolist(), strict=True))
            where.update(zip(new, places, strict=True))
        else:
            ids, places = np.zeros(0, dtype=self._ids.dtype), []
        found = [where[word] for word in words]
        room = self._short + len(new) <= SLOTS // 2 and self._num_ids + len(ids) <= len(self._ids)
        if room and new and len(self._long) + len(new) <= MOST_LONG:
            self._ids[self._num_ids : self._num_ids + len(ids)] = ids
            self._num_ids += len(ids)
            number = {word: i for i, word in enumerate(words)}  # one occurrence of each
            rows = missing[[number[word] for word in new]]
            short = is_short[rows]
            self._insert(low[rows[short]], high[rows[short]], np.array(places, dtype=np.int32)[short])
            self._long.update(
                (word, place) for word, place in zip(new, places, strict=True) if len(word) > LONGEST
            )
            ids = ids[:0]
        return tuple(map(list, zip(*found, strict=True))), ids

    def _insert(self, low: np.ndarray, high: np.ndarray, places: np.ndarray) -> None:
        """Puts keys that are different and not there into the next free slots."""
        slots = self._own_slots(low, high)
        left = np.arange(len(slots))
        for _ in range(_PROBES):
            free = left[self._high[slots[left]] == 0]
            taken, first = np.unique(slots[free], return_index=True)
            rows = free[first]
            self._low[taken], self._high[taken] = low[rows], high[rows]
            self._first[taken], self._count[taken] = places[rows].T
            self._short += len(rows)
            left = np.setdiff1d(left, rows, assume_unique=True)
            if not len(left):
                return
            slots[left] = (slots[left] + 1) % SLOTS

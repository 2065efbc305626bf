"""Documents that were there before, exactly or nearly.

Notable:
- exact: the first 64 bits or so of a sha256, of which there is one a document;
- near: MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3)
over the set of runs of 5 words, 14 bands of 8 rows as for FineWeb (Penedo et al. 2024, arXiv:2406.17557):
documents with a Jaccard similarity s share a band with probability 1 - (1 - s^8)^14, which is 0.05 for 0.5,
0.55 for 0.7, 0.92 for 0.8, 0.9995 for 0.9;
- what costs time, `minhash`, depends on a text alone and can be done anywhere; what depends on the order of
the documents, `SeenSignatures`, is a look-up, in the order of reading. So the result does not depend on the
number of processes;
- a document goes if it is near one that was kept: each that goes has a twin that stays.

What belongs here: the keys of a text, and sets of keys that outlive a process.
"""

import hashlib
import re
from functools import lru_cache

import numpy as np

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

SHINGLE = 5  # words
BANDS = 14
ROWS = 8
_WORD = re.compile(r"\w+")
_BLOCK = 1024  # shingles at a time, so that all their hashes stay in a processor's cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits all over


# ---- exact ----


def fingerprint(text: str) -> bytes:
    """sha256 of a text: what `SeenTexts` knows it by, and what draws the split."""
    return hashlib.sha256(text.encode("utf-8")).digest()


class KeySet:
    """A growing set of 64-bit keys, 8 bytes each once there are many.

    It is kept as sorted runs of which each is more than twice as long as the next, so that a key is moved a
    few times only, however many follow.
    """

    RECENT = 2**16

    def __init__(self):
        self._runs: list[np.ndarray] = []
        self._recent: set[int] = set()
        self._added: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs)) + len(self._recent)

    def has_any(self, keys: list[int]) -> bool:
        """Whether any of these keys was added before."""
        if not self._recent.isdisjoint(keys):
            return True
        wanted = np.array(keys, dtype=np.uint64)
        for run in self._runs:
            places = np.searchsorted(run, wanted)
            places[places == len(run)] = 0
            if (run[places] == wanted).any():
                return True
        return False

    def add(self, keys: list[int]) -> None:
        """Adds keys; those that are there already do no harm."""
        self._recent.update(keys)
        self._added.extend(keys)
        if len(self._recent) >= self.RECENT:
            self._push(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
            self._recent.clear()

    def take_added(self) -> bytes:
        """What was added since the last call, or ever: to append to a file that `load` reads."""
        added = np.array(self._added, dtype="<u8").tobytes()
        self._added = []
        return added

    def load(self, state: bytes) -> None:
        """Adds what `take_added` gave, of any number of calls one after the other.

        Raises:
            ValueError: if it ends within a key.
        """
        if len(state) % 8:
            raise ValueError(f"the keys of documents end within a key, after {len(state):,} bytes")
        if state:
            self._push(np.unique(np.frombuffer(state, dtype="<u8").astype(np.uint64)))

    def _push(self, run: np.ndarray) -> None:
        run.sort()
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # in place, as the longest run is most of the memory
        self._runs.append(run)


class SeenTexts(KeySet):
    """Remembers texts by 64 bits of their fingerprints.

    A run that is to go on after a kill appends `take_added()` to a file at each of its marks, and gives
    `load` as much of that file as there was at the mark.
    """

    def __contains__(self, digest: bytes) -> bool:
        """Whether a fingerprint was added before."""
        return self.has_any([self._key(digest)])

    def add(self, digest: bytes) -> None:
        """Remembers a fingerprint."""
        super().add([self._key(digest)])

    @staticmethod
    def _key(digest: bytes) -> int:
        # Other bits than those that draw the split, so that the two have nothing to do with each other.
        return int.from_bytes(digest[8:16], "little")


# ---- near ----


def minhash(text: str) -> np.ndarray:
    """The signature of a text: a key for each band [14] as uint64.

    Words are what `\\w+` finds in lower case, so that case, punctuation and white space make no difference.
    A text of fewer than five is one run; one without any is near its exact like only. The same on every
    machine.
    """
    words = _WORD.findall(text.lower())
    if words:
        hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
        count = max(len(words) - SHINGLE + 1, 1)
        shingles = np.zeros(count, dtype=np.uint64)
        for i in range(min(SHINGLE, len(words))):
            shingles = shingles * _MULTIPLIER + hashes[i : i + count]
        shingles = _mix(shingles)
    else:
        shingles = np.array([_word_hash(text)], dtype=np.uint64)
    scale, offset = _permutations()
    least = np.full(BANDS * ROWS, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        # Multiply and add modulo 2^64: the upper bits, which are the good ones, decide the order.
        hashed = scale[:, None] * shingles[None, start : start + _BLOCK] + offset[:, None]
        np.minimum(least, hashed.min(axis=1), out=least)
    keys = np.arange(BANDS, dtype=np.uint64)  # the number of its band makes a key different from the others'
    for row in least.reshape(BANDS, ROWS).T:
        keys = _mix(keys * _MULTIPLIER + row)
    return keys


def _mix(values: np.ndarray) -> np.ndarray:
    """Every bit of a value into every bit of the result (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    # Python's own hash is another in every process.
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and summands of the 112 hash functions, the same whatever the version of NumPy."""
    bits = _mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64) * _MULTIPLIER).reshape(2, -1)
    return bits[0] | np.uint64(1), bits[1]


class SeenSignatures(KeySet):
    """Remembers signatures of the documents that were kept: 112 bytes each.

    It is saved and loaded as `SeenTexts` is.
    """

    def seen(self, signature: np.ndarray) -> bool:
        """Whether a document [14] is near one from before; if not, it is remembered."""
        keys = signature.tolist()
        if self.has_any(keys):
            return True
        self.add(keys)
        return False

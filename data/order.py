"""The order of training rows, as a pure function: of (seed, epoch, place) which row, of (step, rank) which
places.

Nothing is shuffled in memory and nothing is remembered: an epoch is a keyed permutation of row numbers that
is computed for the numbers that are asked for, so that a corpus of billions of rows costs what one of
thousands does. The state of a run is the number of rows that it has consumed. What belongs here: numbers.
What is in a row is `training_rows.py`.
"""

import math
from functools import lru_cache

import numpy as np

# A Feistel network is a permutation whatever its rounds do. Four of them suffice where the round function is
# strong (Luby and Rackoff, 1988); small corpora, whose halves have few values, get by with twice as many.
ROUNDS = 8


def permute(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where the places of an epoch lie in it: a permutation of `range(size)`, taken at some of its places.

    A Feistel network on pairs (a, b) with `size` pairs or a few more, alternately moving one half by a hash
    of the other; what falls outside is sent through again until it does not (cycle walking; Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        places: whole numbers in `range(size)`, of any shape.
        size: rows in the epoch, at most 2^62.
        key: what the permutation depends on, such as the seed and the epoch.

    Returns:
        int64 of the shape of `places`.

    Raises:
        ValueError: if `size` is not positive or too large, or a place is outside.
    """
    if not 1 <= size <= 2**62:
        raise ValueError(f"an epoch has 1 to 2^62 rows, got {size}")
    places = np.asarray(places, dtype=np.int64)
    if places.size and not (places.min() >= 0 and places.max() < size):
        raise ValueError(f"places lie between 0 and {size - 1}, got {places.min()} to {places.max()}")
    high = math.isqrt(size - 1) + 1
    low = -(-size // high)
    keys = _round_keys(key)
    result = places.reshape(-1).astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        a, b = np.divmod(result[outside], np.uint64(low))
        for i in range(0, ROUNDS, 2):
            a = (a + _hash(b ^ keys[i]) % np.uint64(high)) % np.uint64(high)
            b = (b + _hash(a ^ keys[i + 1]) % np.uint64(low)) % np.uint64(low)
        result[outside] = a * np.uint64(low) + b
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(places.shape)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence([*key]).generate_state(ROUNDS, np.uint64)


def _hash(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): 64 well-mixed bits of 64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def share(numbers: range, part: int, parts: int) -> range:
    """The stretch of numbers that one of several takes; their sizes differ by one at most.

    Args:
        numbers: with step 1, such as the rows of a step.
        part: rank, or micro-batch, from 0.
        parts: of how many.
    """
    count = len(numbers)
    return numbers[count * part // parts : count * (part + 1) // parts]

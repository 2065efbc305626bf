"""How much of a text was there before in it: Gopher's rules on lines, paragraphs and runs of words.

What belongs here: counting repetition in one document against the limits of Rae et al. 2021,
arXiv:2112.11446, table A1. Each function returns None, or the share that was found and the limit it breaks.
"""

import re
from collections import Counter

import numpy as np

_PARAGRAPH_END = re.compile(r"\n\s*\n")
# n -> share of the characters that the most frequent n-gram may hold.
_MOST_FREQUENT = {2: 0.20, 3: 0.18, 4: 0.16}
# n -> share of the characters that n-grams which were there before may hold.
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits all over


def repeated_lines(lines: list[str], num_chars: int) -> tuple[float, float] | None:
    """Lines that were there before: over 0.3 of them, or with 0.2 of a text's characters."""
    again = len(lines) - len(set(lines))
    if not again:
        return None
    if (share := again / len(lines)) > 0.3:
        return share, 0.3
    share = repeated_chars(lines) / num_chars
    return (share, 0.2) if share > 0.2 else None


def repeated_paragraphs(text: str) -> tuple[float, float] | None:
    """The same of paragraphs, which blank lines separate."""
    return repeated_lines([part for part in _PARAGRAPH_END.split(text.strip()) if part], len(text))


def repeated_chars(lines: list[str]) -> int:
    """Characters in lines that were there before."""
    if len(set(lines)) == len(lines):
        return 0
    return sum(len(line) * (count - 1) for line, count in Counter(lines).items())


def repeated_ngrams(words: list[str]) -> tuple[float, float] | None:
    """Runs of 2 to 10 words that recur.

    Of 2 to 4 words it is the most frequent run that counts, of 5 to 10 every word in a run that occurred
    before, once. Shares are of the characters of all words.
    """
    hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    before = np.concatenate([[0], np.cumsum(lengths)])  # characters before each word
    total = max(int(before[-1]), 1)
    for n, limit in _MOST_FREQUENT.items():
        ngrams = _ngrams(hashes, n)
        ordered = np.sort(ngrams)
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else ordered
        counts = np.diff(ends, prepend=-1)
        most = int(counts.max(initial=0))
        if most <= 1:
            return None  # where no run of n words recurs, no longer one does
        places = np.flatnonzero(np.isin(ngrams, ordered[ends[counts == most]]))
        if (share := int((before[places + n] - before[places]).max()) * most / total) > limit:
            return share, limit
    for n, limit in _REPEATED.items():
        share = _chars_inside_repeated(hashes, lengths, n) / total
        if share > limit:
            return share, limit
        if share <= _REPEATED[10]:
            return None  # a word inside of a longer run that recurs is inside of a shorter one, too
    return None


def _ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A number for each n-gram; equal ones have the same."""
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total = total * _MULTIPLIER + hashes[i : i + count]
    return total


def _chars_inside_repeated(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of the words that are in an n-gram that occurred before, each counted once."""
    ngrams = _ngrams(hashes, n)
    ordered = np.sort(ngrams)
    recurring = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(recurring):
        return 0
    places = np.flatnonzero(np.isin(ngrams, np.unique(recurring)))
    _, first = np.unique(ngrams[places], return_index=True)
    again = np.zeros(len(ngrams), dtype=bool)
    again[np.delete(places, first)] = True
    inside = np.zeros(len(lengths), dtype=bool)
    for i in range(n):
        inside[i : i + len(again)] |= again
    return int(lengths[inside].sum())

"""Which documents are worth training on: the basic filters of a pretraining corpus.

What belongs here: the table `FILTERS` of names and predicates over one document, pure functions all, each
with the origin of its threshold, and `SeenTexts`, for exact duplicates. The rules are those for whole
documents of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2) and Gopher (Rae et al. 2021,
arXiv:2112.11446, appendix A1.1); where it says "ours", a threshold was chosen so that it drops less than one
article in a hundred of the English Wikipedia.

Gopher's upper limit of 100,000 words is left out: a long book is no bad text. So are C4's rules for single
lines, which change documents instead of dropping them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

DUPLICATE = "duplicate"
MIN_CHARS = 200  # ours: about two sentences

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "‣", "◦", "▪", "●", "*", "-", "–", "·")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}  # Gopher's eight
_URL = re.compile(r"(?:https?://|www\.)\S+")
# What C4 takes out line by line; here it is the share of such lines that counts.
_NOTICES = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies")
# Control characters but tab and line ends; the sign for what could not be decoded; private use.
_NON_PRINTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")
_LETTER = re.compile(r"[^\W\d_]")


class Document:
    """A text with what several filters look at, each computed once."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def lower(self) -> str:
        """The text in lower case."""
        return self.text.lower()

    @cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the space around them."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]


def _few_words(document: Document) -> bool:
    return len(document.words) < 50  # Gopher


def _word_length(document: Document) -> bool:
    words = document.words
    return not 3 <= sum(map(len, words)) / max(len(words), 1) <= 10  # Gopher: the mean


def _symbols(document: Document) -> bool:
    text = document.text
    symbols = text.count("#"), sum(map(text.count, _ELLIPSES))
    return max(symbols) > 0.1 * len(document.words)  # Gopher: of each kind, to words


def _few_letters(document: Document) -> bool:
    with_letter = sum(1 for word in document.words if word.isalpha() or _LETTER.search(word))
    return with_letter < 0.8 * len(document.words)  # Gopher


def _digits(document: Document) -> bool:
    digits = sum(map(document.text.count, "0123456789"))
    return digits > 0.15 * len(document.text)  # ours: tables of figures


def _bullets(document: Document) -> bool:
    starting = sum(line.startswith(_BULLETS) for line in document.lines)
    return starting > 0.9 * len(document.lines)  # Gopher


def _cut_off_lines(document: Document) -> bool:
    ending = sum(line.endswith(_ELLIPSES) for line in document.lines)
    return ending > 0.3 * len(document.lines)  # Gopher


def _repeated_lines(document: Document) -> bool:
    lines = document.lines
    if len(set(lines)) == len(lines):
        return False
    again = len(lines) - len(set(lines))
    again_chars = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return again > 0.3 * len(lines) or again_chars > 0.2 * len(document.text)  # Gopher


def _repeated_ngrams(document: Document) -> bool:
    words = document.words
    hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    before = np.concatenate([[0], np.cumsum(lengths)])  # characters before each word
    for n, share in ((2, 0.20), (3, 0.18), (4, 0.16)):  # Gopher: characters in the most frequent one
        _, first, counts = np.unique(_ngrams(hashes, n), return_index=True, return_counts=True)
        chars = (before[first + n] - before[first]) * counts
        if counts.max(initial=0) > 1 and chars[counts == counts.max()].max() > share * before[-1]:
            return True
    # Gopher has a threshold for each n from 5 (0.15) to 10 (0.10); the two ends drop nearly the same.
    return any(
        _repeated_chars(hashes, lengths, n) > share * before[-1] for n, share in ((5, 0.15), (10, 0.1))
    )


def _ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A number for each n-gram; equal ones have the same."""
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return total


def _repeated_chars(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of the words that are in an n-gram that occurred before, each counted once."""
    ngrams = _ngrams(hashes, n)
    _, first = np.unique(ngrams, return_index=True)
    again = np.ones(len(ngrams), dtype=bool)
    again[first] = False
    inside = np.zeros(len(lengths), dtype=bool)
    for i in range(n):
        inside[i : i + len(again)] |= again
    return int(lengths[inside].sum())


def _placeholder(document: Document) -> bool:
    return "lorem ipsum" in document.lower  # C4


def _code(document: Document) -> bool:
    return "{" in document.text  # C4: curly braces are of programs, not of natural language


def _notices(document: Document) -> bool:
    if not any(notice in document.lower for notice in _NOTICES):
        return False
    notices = sum(any(notice in line.lower() for notice in _NOTICES) for line in document.lines)
    return notices > 0.1 * len(document.lines)  # ours; the words are C4's


def _urls(document: Document) -> bool:
    text = document.text
    if "http" not in text and "www." not in text:
        return False
    return sum(map(len, _URL.findall(text))) > 0.1 * len(text)  # ours: lists of links


def _non_printing(document: Document) -> bool:
    text = document.text
    return "\0" in text or len(_NON_PRINTING.findall(text)) > 0.005 * len(text)  # ours


def _not_english(document: Document) -> bool:
    found = _STOP_WORDS.intersection(document.lower.split())
    return len(found) < 2  # Gopher: two different ones


# Name -> whether it drops a document, cheap ones first: the first that drops is the one that is counted.
FILTERS: dict[str, Callable[[Document], bool]] = {
    "few_words": _few_words,
    "word_length": _word_length,
    "placeholder": _placeholder,
    "code": _code,
    "non_printing": _non_printing,
    "symbols": _symbols,
    "digits": _digits,
    "urls": _urls,
    "notices": _notices,
    "bullets": _bullets,
    "cut_off_lines": _cut_off_lines,
    "repeated_lines": _repeated_lines,
    "few_letters": _few_letters,
    "not_english": _not_english,
    "repeated_ngrams": _repeated_ngrams,
}


@dataclass(frozen=True)
class Filters:
    """A choice of filters.

    Attributes:
        names: of `FILTERS`, in its order, and `duplicate` for documents that were there before.
        min_chars: characters that a document needs; 0 for any.
    """

    names: tuple[str, ...] = ()
    min_chars: int = 0

    def reason(self, text: str) -> str | None:
        """Name of the first filter that drops a text, or None; duplicates are the caller's to find."""
        if len(text) < self.min_chars:
            return "too_short"
        document = Document(text)
        return next((name for name in self.names if name in FILTERS and FILTERS[name](document)), None)


def choose_filters(given: str, min_chars: int | None = None) -> Filters:
    """The filters that a user names.

    Args:
        given: `none`, `basic` (all), or names separated by commas.
        min_chars: shortest document; default: 200 for `basic`, else any.

    Raises:
        ValueError: for an unknown name or a negative length.
    """
    if min_chars is not None and min_chars < 0:
        raise ValueError(f"the shortest document cannot have {min_chars} characters")
    every = (*FILTERS, DUPLICATE)
    names = {"none": (), "basic": every}.get(given)
    if names is None:
        wanted = [name.strip() for name in given.split(",")]
        if unknown := [name for name in wanted if name not in every]:
            raise ValueError(
                f"there is no filter {unknown[0]!r}; give none, basic, or some of {', '.join(every)}"
            )
        names = tuple(name for name in every if name in wanted)
    if min_chars is None:
        min_chars = MIN_CHARS if given == "basic" else 0
    return Filters(names, min_chars)


def fingerprint(text: str) -> bytes:
    """sha256 of a text: what `SeenTexts` knows it by, and what draws the split."""
    return hashlib.sha256(text.encode("utf-8")).digest()


class SeenTexts:
    """Remembers texts by 64 bits of their fingerprints: 8 bytes a text once there are many."""

    RECENT = 2**18

    def __init__(self):
        self._old = np.empty(0, dtype=np.uint64)  # sorted
        self._recent: set[int] = set()

    def __contains__(self, digest: bytes) -> bool:
        """Whether a fingerprint was added before."""
        key = self._key(digest)
        if key in self._recent:
            return True
        place = int(np.searchsorted(self._old, np.uint64(key)))
        return place < len(self._old) and bool(self._old[place] == key)

    def add(self, digest: bytes) -> None:
        """Remembers a fingerprint that is not there yet."""
        self._recent.add(self._key(digest))
        if len(self._recent) >= self.RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._old = np.sort(np.concatenate([self._old, recent]), kind="stable")
            self._recent.clear()

    @staticmethod
    def _key(digest: bytes) -> int:
        # Other bits than those that draw the split, so that the two have nothing to do with each other.
        return int.from_bytes(digest[8:16], "little")

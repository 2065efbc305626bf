"""The words that the patterns of GPT-2 and GPT-4 split text into, found for a whole text at once.

Notable:
- a regular expression goes through a text word by word; here the text becomes an array of classes (letter,
number, space, ...), and the beginnings of words follow from where the class changes, in a few dozen
operations on arrays;
- which character is a letter is asked of the engine that the tokenizers library has, not of Python's Unicode
tables, which may be of another version.

What belongs here: the two patterns as rules over runs of a class. `tests/data/test_word_encoding.py` compares
them with the engine.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

OTHER, LETTER, NUMBER, SPACE, BLANK, LINE_END, BOUNDARY = range(7)
_CHARACTERS = 0x110000
# Without the surrogates, and the planes that are empty (4 to 13) or private (15 and 16).
_PLANES = ((0, 0xD800), (0xE000, 0x40000), (0xE0000, 0xF0000))
_BLOCK = 0x800  # characters that the engine is asked of at a time; its time grows faster than they do


@lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """The class of every character [0x110000] as uint8; BLANK is white space but the space and line ends."""
    from tokenizers import Regex, pre_tokenizers

    classes = np.zeros(_CHARACTERS, dtype=np.uint8)
    for pattern, number in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", BLANK)):
        splitter = pre_tokenizers.Split(Regex(f"{pattern}+"), "isolated")
        for first in (first for planes in _PLANES for first in range(*planes, _BLOCK)):
            # Pieces of what is of the class and of what is not, in turns; a sign before them is of none.
            text = "!" + "".join(map(chr, range(first, first + _BLOCK)))
            for _, (start, end) in splitter.pre_tokenize_str(text)[1::2]:
                classes[first + start - 1 : first + end - 1] = number
    classes[[ord("\r"), ord("\n")]] = LINE_END
    classes[ord(" ")] = SPACE
    return classes


class Runs:
    """Runs of characters of one class.

    Attributes:
        start, end: of each run, in characters [runs].
        kind: class of each [runs].
        before, after: class of the run before and after it; BOUNDARY at the ends [runs].
        length: characters [runs].
    """

    def __init__(self, classes: np.ndarray):
        changes = np.flatnonzero(classes[1:] != classes[:-1]) + 1
        self.start = np.concatenate([[0], changes])
        self.end = np.append(changes, len(classes))
        self.length = self.end - self.start
        self.kind = classes[self.start]
        edge = np.full(1, BOUNDARY, dtype=np.uint8)
        self.before = np.concatenate([edge, self.kind[:-1]])
        self.after = np.concatenate([self.kind[1:], edge])


def starts_of_words(codes: np.ndarray, classes: np.ndarray, pattern: str) -> np.ndarray:
    """Where words begin.

    Args:
        codes: characters of the text [N], at least one.
        classes: class of each [N], `character_classes()` of them, or BOUNDARY for one that is apart from what
            is on both sides of it.
        pattern: a key of `PATTERNS`.

    Returns:
        Index of the first character of each word, ascending.
    """
    is_start = np.zeros(len(codes) + 1, dtype=bool)
    PATTERNS[pattern](codes, Runs(classes), is_start)
    return np.flatnonzero(is_start[:-1])


def _contractions(codes: np.ndarray, runs: Runs, fold: bool) -> tuple[np.ndarray, np.ndarray]:
    """Runs that are the apostrophe of 's, 't, 're, 've, 'm, 'll or 'd, and the number of letters of each."""
    possible = (runs.kind == OTHER) & (runs.length == 1) & (runs.before != SPACE) & (runs.after == LETTER)
    found = np.flatnonzero(possible)
    found = found[codes[runs.start[found]] == ord("'")]
    at = runs.start[found]
    first = codes[at + 1].astype(np.int64)
    second = codes[np.minimum(at + 2, len(codes) - 1)].astype(np.int64)
    second[runs.length[found + 1] < 2] = 0
    if fold:
        for letters in (first, second):
            upper = (letters >= ord("A")) & (letters <= ord("Z"))
            letters[upper] += 32
        first[first == 0x17F] = ord("s")  # the long s, whose capital is S
    one = np.isin(first, [ord(letter) for letter in "stmd"])
    pairs = ((ord(a), ord(b)) for a, b in ("re", "ve", "ll"))
    two = np.zeros(len(found), dtype=bool)
    for a, b in pairs:
        two |= (first == a) & (second == b)
    letters = np.where(one, 1, np.where(two, 2, 0))
    return found[letters > 0], letters[letters > 0]


def _split_gpt4(codes: np.ndarray, runs: Runs, is_start: np.ndarray) -> None:
    kind, before, after, start, end = runs.kind, runs.before, runs.after, runs.start, runs.end
    is_start[start[kind == BOUNDARY]] = True
    # Letters begin a word unless one character before them can: white space, or a sign that stands alone. A
    # space takes the sign behind it instead.
    apart = (kind == OTHER) & (before != SPACE) & (runs.length == 1)
    joined = (before == SPACE) | (before == BLANK)
    joined[1:] |= apart[:-1]
    is_start[start[(kind == LETTER) & ~joined]] = True
    # Numbers are cut in threes.
    numbers = np.flatnonzero(kind == NUMBER)
    for at in range(0, int(runs.length[numbers].max(initial=0)), 3):
        numbers = numbers[runs.length[numbers] > at]
        is_start[start[numbers] + at] = True
    is_start[start[(kind == OTHER) & (before != SPACE)]] = True
    # White space: line ends right behind signs are theirs. Of what is left all up to the last line end is a
    # word; of what is left then the last character belongs to what follows, or is a word.
    white = (kind == SPACE) | (kind == BLANK) | ((kind == LINE_END) & (before != OTHER))
    first = white.copy()
    first[1:] &= ~white[:-1]
    is_start[start[first]] = True
    group = np.cumsum(first)
    lines = np.flatnonzero(white & (kind == LINE_END))
    last = np.ones(len(lines), dtype=bool)
    last[:-1] = group[lines[1:]] != group[lines[:-1]]
    lines = lines[last]
    is_start[end[lines]] = True
    white_after = np.append(white[1:], False)
    is_start[end[white & ~white_after & (kind != LINE_END) & (after != BOUNDARY)] - 1] = True
    found, letters = _contractions(codes, runs, fold=True)
    is_start[start[found] + 1 + letters] = True


def _split_gpt2(codes: np.ndarray, runs: Runs, is_start: np.ndarray) -> None:
    kind, before, after, start, end = runs.kind, runs.before, runs.after, runs.start, runs.end
    is_white = (kind == SPACE) | (kind == BLANK) | (kind == LINE_END)
    # Whatever is no white space begins a word, unless a space before it does.
    is_start[start[~is_white & ((before != SPACE) | (kind == BOUNDARY))]] = True
    first = is_white.copy()
    first[1:] &= ~is_white[:-1]
    is_start[start[first]] = True
    white_after = np.append(is_white[1:], False)
    is_start[end[is_white & ~white_after & (after != BOUNDARY)] - 1] = True
    found, letters = _contractions(codes, runs, fold=False)
    is_start[start[found] + 1] = False
    is_start[start[found] + 1 + letters] = True


# By name; the regular expressions are those of `tessera.tokenization.byte_level`.
PATTERNS: dict[str, Callable[[np.ndarray, Runs, np.ndarray], None]] = {
    "gpt2": _split_gpt2,
    "gpt4": _split_gpt4,
}

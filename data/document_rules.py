"""Rules that drop whole documents for how they look: C4's, Gopher's, FineWeb's, and a few of our own.

What belongs here: pure functions of one document, each with the origin of its threshold, in two tables by
name: `RULES` ask the document as it was read, `LATER_RULES` what the line rules have left of it. A rule
returns None, or what it measured with the limit that this breaks. Those on repetition are in repetition.py.

- C4: Raffel et al. 2020, arXiv:1910.10683, section 2.2.
- Gopher: Rae et al. 2021, arXiv:2112.11446, appendix A1.1.
- FineWeb: Penedo et al. 2024, arXiv:2406.17557, section 3.6. Where the paper and the code that made the data
  set differ (characters in repeated lines: a tenth, a hundredth), the limit is the code's.
- Ours: chosen so that a rule drops less than one article in a hundred of the English Wikipedia.
"""

import re
from collections.abc import Callable
from functools import cached_property
from operator import itemgetter

from .repetition import repeated_chars, repeated_lines, repeated_ngrams, repeated_paragraphs

# What was measured, and the limit that it breaks.
Measured = tuple[float, float]

ELLIPSES = ("...", "…")
# What C4 takes out line by line.
NOTICES = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_BULLETS = ("•", "‣", "◦", "▪", "●", "*", "-", "–", "·")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}  # Gopher's eight
# Commonest words of English whose spelling other languages hardly share.
_ENGLISH = frozenset(
    "the of and to that is was for with as his her on by at from are were this which have had has been not "
    "they their it be he she you we its or an but also after there would who when more than into".split()
)
_URL = re.compile(r"(?:https?://|www\.)\S+")
# Control characters but tab and line ends; the sign for what could not be decoded; private use.
_NON_PRINTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")
_LETTER = re.compile(r"[^\W\d_]")
_FINISHED = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？", "؟", "۔", "।")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


class Document:
    """A text with what several rules look at, each computed once."""

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
    def lower_words(self) -> list[str]:
        """The words in lower case."""
        return self.lower.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the space around them."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]


def above(value: float, limit: float) -> Measured | None:
    """What breaks an upper limit."""
    return (value, limit) if value > limit else None


def below(value: float, limit: float) -> Measured | None:
    """What breaks a lower limit."""
    return (value, limit) if value < limit else None


# ---- length and shape ----


def _few_words(document: Document) -> Measured | None:
    return below(len(document.words), 50)  # Gopher


def _many_words(document: Document) -> Measured | None:
    return above(len(document.words), 100_000)  # Gopher


def _word_length(document: Document) -> Measured | None:
    words = document.words
    mean = sum(map(len, words)) / max(len(words), 1)
    return below(mean, 3) or above(mean, 10)  # Gopher


def _few_sentences(document: Document) -> Measured | None:
    # C4; where a sentence ends is a guess of ours, theirs a trained model's.
    text, found = document.text, 0
    for _ in _SENTENCE_END.finditer(text):
        found += 1
        if found == 3:
            return None
    return found, 3


def _bullets(document: Document) -> Measured | None:
    starting = sum(line.startswith(_BULLETS) for line in document.lines)
    return above(starting / max(len(document.lines), 1), 0.9)  # Gopher


def _cut_off_lines(document: Document) -> Measured | None:
    ending = sum(line.endswith(ELLIPSES) for line in document.lines)
    return above(ending / max(len(document.lines), 1), 0.3)  # Gopher


def _unfinished(document: Document) -> Measured | None:
    ending = sum(line.endswith(_FINISHED) for line in document.lines)
    return below(ending / max(len(document.lines), 1), 0.12)  # FineWeb


def _short_lines(document: Document) -> Measured | None:
    short = sum(len(line) <= 30 for line in document.lines)
    return above(short / max(len(document.lines), 1), 0.67)  # FineWeb


def _line_breaks(document: Document) -> Measured | None:
    return above(document.text.count("\n") / max(len(document.words), 1), 0.3)  # FineWeb


# ---- what it consists of ----


def _placeholder(document: Document) -> Measured | None:
    return above(document.lower.count("lorem ipsum"), 0)  # C4


def _code(document: Document) -> Measured | None:
    return above(document.text.count("{"), 0)  # C4: curly braces are of programs, not of natural language


def _non_printing(document: Document) -> Measured | None:
    text = document.text
    if "\0" in text:
        return text.count("\0"), 0
    return above(len(_NON_PRINTING.findall(text)) / max(len(text), 1), 0.005)  # ours


def _symbols(document: Document) -> Measured | None:
    symbols = document.text.count("#"), sum(map(document.text.count, ELLIPSES))
    return above(max(symbols) / max(len(document.words), 1), 0.1)  # Gopher: of each kind, to words


def _few_letters(document: Document) -> Measured | None:
    words = document.words
    if sum(map(str.isalpha, map(itemgetter(0), words))) >= 0.8 * len(words):
        return None  # that many begin with one
    with_letter = sum(1 for word in words if word.isalpha() or _LETTER.search(word))
    return below(with_letter / len(words), 0.8)  # Gopher


def _digits(document: Document) -> Measured | None:
    digits = sum(map(document.text.count, "0123456789"))
    return above(digits / max(len(document.text), 1), 0.15)  # ours: tables of figures


def _urls(document: Document) -> Measured | None:
    text = document.text
    if "http" not in text and "www." not in text:
        return None
    return above(sum(map(len, _URL.findall(text))) / len(text), 0.1)  # ours: lists of links


def _notices(document: Document) -> Measured | None:
    if not any(notice in document.lower for notice in NOTICES):
        return None
    notices = sum(any(notice in line.lower() for notice in NOTICES) for line in document.lines)
    return above(notices / len(document.lines), 0.1)  # ours; the words are C4's


# ---- language ----


def _not_english(document: Document) -> Measured | None:
    return below(len(_STOP_WORDS.intersection(document.lower_words)), 2)  # Gopher: two different ones


def _few_english_words(document: Document) -> Measured | None:
    words = document.lower_words
    common = sum(map(_ENGLISH.__contains__, words))
    return below(common / max(len(words), 1), 0.15)  # ours


# ---- repetition ----


def _repeated_lines(document: Document) -> Measured | None:
    return repeated_lines(document.lines, len(document.text))


def _repeated_paragraphs(document: Document) -> Measured | None:
    return repeated_paragraphs(document.text)


def _repeated_ngrams(document: Document) -> Measured | None:
    return repeated_ngrams(document.words)


def _repeated_line_chars(document: Document) -> Measured | None:
    again = repeated_chars(document.lines)
    return above(again / max(sum(map(len, document.lines)), 1), 0.01)  # FineWeb


# Cheap ones first: the first that drops is the one that is counted.
RULES: dict[str, Callable[[Document], Measured | None]] = {
    "few_words": _few_words,
    "many_words": _many_words,
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
    "repeated_paragraphs": _repeated_paragraphs,
    "few_letters": _few_letters,
    "not_english": _not_english,
    "few_english_words": _few_english_words,
    "repeated_ngrams": _repeated_ngrams,
}
LATER_RULES: dict[str, Callable[[Document], Measured | None]] = {
    "few_sentences": _few_sentences,
    "unfinished": _unfinished,
    "short_lines": _short_lines,
    "repeated_line_chars": _repeated_line_chars,
    "line_breaks": _line_breaks,
}

"""Which documents are worth training on: choosing rules, and asking them.

What belongs here: the names and presets that a user chooses from, and what becomes of a document: dropped by
one rule, with what was measured; kept; or kept without some of its lines. The order is that of the tables:
the rules on the document as it was read, those that take out lines, those on what is left; then, where the
documents come together, duplicates (deduplication.py).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .deduplication import DUPLICATE, NEAR_DUPLICATE, minhash
from .document_rules import LATER_RULES, RULES, Document
from .language import CONFIDENT, probability_of, require_language
from .line_rules import CITATIONS, LINE_RULES, clean_lines

MIN_CHARS = 200  # ours: about two sentences
TOO_SHORT = "too_short"
OTHER_LANGUAGE = "other_language"
EMPTY = "empty"  # nothing is left of it

EVERY = (*RULES, CITATIONS, *LINE_RULES, *LATER_RULES, DUPLICATE, NEAR_DUPLICATE)

_GOPHER = (
    "few_words",
    "many_words",
    "word_length",
    "symbols",
    "bullets",
    "cut_off_lines",
    "repeated_lines",
    "repeated_paragraphs",
    "few_letters",
    "not_english",
    "repeated_ngrams",
)
_C4 = ("placeholder", "code", CITATIONS, *LINE_RULES, "few_sentences")
PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "basic": (
        "few_words",
        "word_length",
        "placeholder",
        "code",
        "non_printing",
        "symbols",
        "digits",
        "urls",
        "notices",
        "bullets",
        "cut_off_lines",
        "repeated_lines",
        "few_letters",
        "not_english",
        "repeated_ngrams",
        DUPLICATE,
    ),
    "c4": (*_C4, DUPLICATE),
    "gopher": (*_GOPHER, DUPLICATE),
    # FineWeb keeps lines without an end mark: the rule would have cost it a third of its tokens.
    "fineweb": (
        "few_english_words",
        *_GOPHER,
        *(name for name in _C4 if name != "open_lines"),
        "unfinished",
        "short_lines",
        "repeated_line_chars",
        "line_breaks",
        DUPLICATE,
        NEAR_DUPLICATE,
    ),
}


@dataclass(frozen=True)
class Dropped:
    """Why a document was dropped.

    Attributes:
        reason: name of the rule.
        value, limit: what it measured, and what that would have to reach or not to pass; None for duplicates.
    """

    reason: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Examined:
    """What became of a document.

    Attributes:
        text: the document, without the lines that were taken out.
        dropped: why it is to go; None if it stays.
        lines: how many lines each rule took out.
        signature: what near duplicates are found by [14]; None if nobody asked, or it goes anyway.
    """

    text: str
    dropped: Dropped | None = None
    lines: Counter = field(default_factory=Counter)
    signature: np.ndarray | None = None


@dataclass(frozen=True)
class Filters:
    """A choice of filters.

    Attributes:
        names: of `EVERY`, in its order.
        min_chars: characters that a document needs; 0 for any.
        language: two letters of the only language to keep; None for any.
    """

    names: tuple[str, ...] = ()
    min_chars: int = 0
    language: str | None = None

    def examine(self, text: str) -> Examined:
        """Asks all rules but those on duplicates, which are for the caller to find."""
        if len(text) < self.min_chars:
            return Examined(text, Dropped(TOO_SHORT, len(text), self.min_chars))
        document = Document(text)
        if dropped := self._ask(document, RULES):
            return Examined(text, dropped)
        if self.language and (sure := probability_of(self.language, text)) < CONFIDENT:
            return Examined(text, Dropped(OTHER_LANGUAGE, sure, CONFIDENT))
        cleaned, lines = self.clean(text)
        if text and not cleaned:
            return Examined(text, Dropped(EMPTY, 0, 1), lines)
        if cleaned != text:
            document = Document(cleaned)
        dropped = self._ask(document, LATER_RULES)
        near = dropped is None and NEAR_DUPLICATE in self.names
        return Examined(document.text, dropped, lines, minhash(document.text) if near else None)

    def clean(self, text: str) -> tuple[str, Counter]:
        """What the rules for single lines leave of a text, and how many lines each of them took out."""
        rules = tuple(name for name in self.names if name in LINE_RULES or name == CITATIONS)
        return clean_lines(text, rules) if rules else (text, Counter())

    def reason(self, text: str) -> str | None:
        """Name of the first rule that drops a text, or None."""
        dropped = self.examine(text).dropped
        return dropped.reason if dropped else None

    def _ask(self, document: Document, rules: dict) -> Dropped | None:
        for name in self.names:
            if name in rules and (measured := rules[name](document)):
                return Dropped(name, *measured)
        return None


def choose_filters(given: str, min_chars: int | None = None, language: str | None = None) -> Filters:
    """The filters that a user names.

    Args:
        given: presets (`none`, `basic`, `c4`, `gopher`, `fineweb`) and names, separated by commas.
        min_chars: shortest document; default: 200 with `basic`, else any.
        language: two letters of the only language to keep, such as `en`.

    Raises:
        ValueError: for an unknown name or language, or a negative length.
    """
    if language is not None:
        require_language(language)
    if min_chars is not None and min_chars < 0:
        raise ValueError(f"the shortest document cannot have {min_chars} characters")
    wanted = [name.strip() for name in given.split(",")]
    if unknown := [name for name in wanted if name not in EVERY and name not in PRESETS]:
        raise ValueError(
            f"there is no filter {unknown[0]!r}; give {', '.join(PRESETS)}, or some of {', '.join(EVERY)}"
        )
    chosen = {name for given in wanted for name in PRESETS.get(given, (given,))}
    if min_chars is None:
        min_chars = MIN_CHARS if "basic" in wanted else 0
    return Filters(tuple(name for name in EVERY if name in chosen), min_chars, language)

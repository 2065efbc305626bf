"""Rules that take lines out of documents: C4's, for what stands around an article on a page of the web.

What belongs here: `LINE_RULES`, names and predicates over one line, and applying a choice of them. A document
that any of them is applied to comes out changed: kept lines without the space around them, one under the
other, no blank ones, as in C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2, and the code released with
it, which `CITATIONS` and `long_word_lines` are from).
"""

import re
from collections import Counter
from collections.abc import Callable

from .document_rules import ELLIPSES, NOTICES

# The one rule that changes lines instead of taking them out: reference marks of encyclopedias.
CITATIONS = "citations"
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_END_MARKS = (".", "?", "!", '"', "”")
_LONGEST_WORD = 1000


def _long_word_lines(line: str) -> bool:
    return len(line) > _LONGEST_WORD and any(len(word) > _LONGEST_WORD for word in line.split())


def _open_lines(line: str) -> bool:
    return not line.endswith(_END_MARKS) or line.endswith(ELLIPSES)


def _few_word_lines(line: str) -> bool:
    return len(line.split(None, 5)) < 5


def _notice_lines(line: str) -> bool:
    lower = line.lower()
    return any(notice in lower for notice in NOTICES)


# Name -> whether a line goes; the first that takes it is the one that is counted.
LINE_RULES: dict[str, Callable[[str], bool]] = {
    "long_word_lines": _long_word_lines,
    "open_lines": _open_lines,
    "few_word_lines": _few_word_lines,
    "notice_lines": _notice_lines,
}


def clean_lines(text: str, names: tuple[str, ...]) -> tuple[str, Counter]:
    """Takes lines out of a text.

    Args:
        text: a document.
        names: of `LINE_RULES`, and `citations`.

    Returns:
        What is left, and how many lines each rule took.
    """
    rules = [(name, LINE_RULES[name]) for name in names if name != CITATIONS]
    without_citations = CITATIONS in names and "[" in text
    kept, taken = [], Counter()
    for line in text.splitlines():
        if without_citations and "[" in line:
            line = _CITATION.sub("", line)
        line = line.strip()
        if not line:
            continue
        for name, takes in rules:
            if takes(line):
                taken[name] += 1
                break
        else:
            kept.append(line)
    return "\n".join(kept), taken

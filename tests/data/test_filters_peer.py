"""Our rules against datatrove's of the same name, on made-up pages of the web: an independent reading."""

import random

import pytest

from tessera.data.filters import Filters, choose_filters

pytest.importorskip("datatrove", reason="an optional extra")
from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.filters import (  # noqa: E402
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
)
from datatrove.utils.word_tokenizers import WordTokenizer  # noqa: E402


class WhiteSpace(WordTokenizer):
    """Words by white space; a sentence for each end mark before white space."""

    def word_tokenize(self, text):
        return text.split()

    def sent_tokenize(self, text):
        return [text[a:b] for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text):
        ends = [i + 1 for i, mark in enumerate(text) if mark in ".!?" and text[i + 1 : i + 2].strip() == ""]
        return list(zip([0, *ends], [*ends, len(text)], strict=True))[: len(ends)] or [(0, len(text))]


LINES = [
    "The museum[3] opened its doors to the public in 1911.",
    "A second building, larger than the first, was added by the city. It burnt down!",
    "Was it ever rebuilt? Nobody seems to know that with certainty.",
    "Home",
    "About us",
    "Read more about all of that in ...",
    "This is a line of text without an end",
    "Please enable JavaScript to see this page.",
    "By using this site you agree to our Terms of Use today.",
    "- one item of a list that goes on.",
    "• another item of the list",
    "#tag #tag #tag #tag #tag",
    "12 34 56 78 90 12 34",
    "if (x) { return y; }",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
    "w" * 1001 + " is one word of this long line here.",
    "Antidisestablishmentarianism notwithstanding.",
    "Counterrevolutionaries' incomprehensibilities.",
    "",
]
RARE = {LINES.index(line) for line in LINES if "{" in line or "Lorem" in line}


def pages(count: int) -> list[str]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        pool = draw.sample(range(len(LINES)), draw.randint(1, 8))
        pool = [i for i in pool if i not in RARE or draw.random() < 0.2] or [0]
        numbered = [f"{LINES[draw.choice(pool)]}" for _ in range(draw.randint(1, 30))]
        unique = draw.random() < 0.7
        made.append(
            "\n".join(f"{'x' * draw.randint(1, 9)} {line}".strip() if unique else line for line in numbered)
        )
    return [page for page in made if page.strip()]


def test_c4_leaves_the_same_text_of_every_page():
    chosen = Filters(
        tuple(name for name in choose_filters("c4").names if name not in ("placeholder", "code"))
    )
    peer = C4QualityFilter(
        language=WhiteSpace(),
        min_num_sentences=3,
        min_words_per_line=5,
        filter_lorem_ipsum=False,
        filter_curly_bracket=False,
    )
    kept = 0
    for page in pages(800):
        examined, document = chosen.examine(page), Document(text=page, id="0")
        result = peer.filter(document)
        assert (examined.dropped is None) == (result is True), page
        if result is True:
            kept += 1
            assert examined.text == document.text
    assert 200 < kept < 700


# Ours of FineWeb count lines without the space around them; the pages have none.
WEB = {
    "unfinished": "line_punct_ratio",
    "short_lines": "short_line_ratio",
    "repeated_line_chars": "char_dup_ratio",
    "line_breaks": "list_ratio",
}


def test_fineweb_drops_the_same_pages_for_the_same_reasons():
    chosen = choose_filters(",".join(WEB))
    peer = FineWebQualityFilter(language=WhiteSpace(), stop_chars=(".", "!", "?", '"', "'"))
    seen = set()
    for page in pages(2500):
        result = peer.filter(Document(text=page, id="0"))
        reason = chosen.reason(page)
        assert (WEB[reason] if reason else None) == (None if result is True else result[1]), page
        seen.add(reason)
    assert seen == {None, *WEB}


QUALITY = {
    "few_words": "gopher_short_doc",
    "word_length": "gopher_above_avg_threshold",
    "symbols": "gopher_too_many_hashes",
    "few_letters": "gopher_below_alpha_threshold",
    "not_english": "gopher_enough_stop_words",
}


@pytest.mark.parametrize("name", QUALITY)
def test_gopher_drops_the_same_pages(name):
    # One rule at a time, as the order is another. Words that are all punctuation count for us only.
    limits = "min_doc_words max_doc_words min_avg_word_length max_avg_word_length max_symbol_word_ratio "
    limits += "max_bullet_lines_ratio max_ellipsis_lines_ratio max_non_alpha_words_ratio min_stop_words"
    settings = dict.fromkeys(limits.split())
    own = {
        "few_words": {"min_doc_words": 50},
        "word_length": {"min_avg_word_length": 3, "max_avg_word_length": 10},
        "symbols": {"max_symbol_word_ratio": 0.1},
        "few_letters": {"max_non_alpha_words_ratio": 0.8},
        "not_english": {"min_stop_words": 2},
    }[name]
    peer = GopherQualityFilter(language=WhiteSpace(), **(settings | own))
    ours = Filters((name,))
    marks = ("-", "•", "{", "...")
    made = [page.lower() for page in pages(900) if not any(mark in page for mark in marks)]
    reasons = set()
    for page in made:
        result = peer.filter(Document(text=page, id="0"))
        assert ours.reason(page) == (None if result is True else name), page
        reasons.add(None if result is True else result[1])
    assert QUALITY[name] in reasons and None in reasons

"""Filters: each drops what it is there for, and nothing else does."""

import hashlib
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tessera.data.filters import DUPLICATE, FILTERS, Document, Filters, SeenTexts, choose_filters, fingerprint
from tessera.data.filters import _repeated_ngrams as repeated_ngrams
from tessera.data.sources import read_texts

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))

BASIC = choose_filters("basic")

GOOD = """The village of Ashford stands where two old roads have met since before anyone wrote its name
down. A market was held there every second week, and farmers came to it from as far as the coast with wool and
cheese. In 1847 the railway reached the valley, which changed almost everything that people did for a living.
Shops opened along the new street; the mill that had ground corn for centuries was turned into an inn.
Visitors today may walk around the church, see the remains of the castle, and follow a path by the river."""


def words(seed: int, count: int) -> list[str]:
    """Made-up words, all different."""
    draw = random.Random(seed)
    made = {
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 8))) for _ in range(2 * count)
    }
    return sorted(made, key=lambda word: draw.random())[:count]


def sentence(seed: int) -> str:
    return f"The {' '.join(words(seed, 9))} and {' '.join(words(seed + 1000, 6))}."


# For each filter a text that it alone drops.
BAD = {
    "few_words": "The quick brown foxes jumped over all of those lazy dogs and ran across the meadow. "
    * 1
    + "Afterwards everybody was remarkably surprised about what happened to the photographer "
    "and his extraordinary equipment, including tripods.",
    "word_length": " ".join(
        [
            "the",
            "and",
            *("".join(pair) for pair in zip(words(1, 40), words(2, 40), words(3, 40), strict=True)),
        ]
        + words(4, 10)
    ),
    "placeholder": GOOD + " Lorem ipsum dolor sit amet.",
    "code": GOOD + " function() { return 1; }",
    "non_printing": GOOD + "\x02\ufffd\ue000\x7f" * 2,
    "symbols": GOOD + " " + " ".join(f"#{word}" for word in words(1, 20)),
    "digits": GOOD + " " + " ".join(str(random.Random(i).randrange(10**12)) for i in range(11)),
    "urls": GOOD + " " + " ".join(f"https://example.com/{word}" for word in words(1, 3)),
    "notices": GOOD + "\nPlease enable JavaScript.",
    "bullets": "\n".join(f"- {sentence(i)}" for i in range(8)),
    "cut_off_lines": "\n".join(f"{sentence(i)}{'..' if i % 2 else ''}" for i in range(8)),
    "repeated_lines": "\n".join(
        [*(sentence(i) for i in range(8)), *(word for word in words(5, 10) for _ in range(2))]
    ),
    "few_letters": GOOD + " -- / :" * 11,
    "not_english": " ".join(words(7, 60)),
    "repeated_ngrams": " ".join(
        f"{sentence(i)} Follow us on all of our channels and subscribe to the letter now." for i in range(4)
    ),
}


def test_good_text_passes():
    assert BASIC.reason(GOOD) is None
    assert all(
        BASIC.reason(" ".join(sentence(seed + i) for i in range(8))) is None for seed in range(0, 80, 8)
    )


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_alone_drops_its_text(name):
    text = BAD[name]
    assert BASIC.reason(text) == name
    others = Filters(tuple(other for other in FILTERS if other != name), BASIC.min_chars)
    assert others.reason(text) is None
    assert Filters((name,)).reason(text) == name


def test_control_characters_count_in_ascii_text_too():
    assert BASIC.reason(GOOD + "\x02\x1b\x7f\x08" * 2) == "non_printing"


def test_short_text_is_dropped_first_and_only_by_its_characters():
    assert BASIC.reason("short") == "too_short"
    assert choose_filters("basic", 0).reason("short") == "few_words"
    assert choose_filters("none", 10).reason("123456789") == "too_short"
    assert choose_filters("none", 10).reason("1234567890") is None
    assert choose_filters("none").reason("") is None


def test_filters_are_chosen_by_name_and_count_in_the_order_of_the_table():
    assert choose_filters("none") == Filters((), 0)
    assert BASIC == Filters((*FILTERS, DUPLICATE), 200)
    chosen = choose_filters("not_english, code")
    assert chosen == Filters(("code", "not_english"), 0)
    assert chosen.reason("{") == "code" and chosen.reason("Ein Haus") == "not_english"


@pytest.mark.parametrize("given", ["most", "basic,code", "", "code,,urls"])
def test_unknown_filters_are_refused_with_those_that_there_are(given):
    with pytest.raises(
        ValueError, match=r"there is no filter .* none, basic, or some of few_words, .*duplicate"
    ):
        choose_filters(given)
    with pytest.raises(ValueError, match="cannot have -1 characters"):
        choose_filters("basic", -1)


def by_counting(text: str) -> bool:
    """Repeated n-grams word by word, as Gopher's appendix has it."""
    parts = text.split()
    size = sum(map(len, parts))
    for n, share in ((2, 0.20), (3, 0.18), (4, 0.16)):
        counts = Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))
        top = max(counts.values(), default=0)
        chars = [top * sum(map(len, ngram)) for ngram, count in counts.items() if count == top]
        if top > 1 and max(chars) > share * size:
            return True
    for n, share in ((5, 0.15), (10, 0.10)):
        seen, inside = set(), set()
        for i in range(len(parts) - n + 1):
            if tuple(parts[i : i + n]) in seen:
                inside.update(range(i, i + n))
            seen.add(tuple(parts[i : i + n]))
        if sum(len(parts[i]) for i in inside) > share * size:
            return True
    return False


def test_repeated_ngrams_are_those_of_a_plain_count():
    draw = random.Random(0)
    dropped = 0
    for _ in range(600):
        vocabulary = words(draw.randrange(1000), draw.choice([5, 50, 500]))
        parts = draw.choices(vocabulary, k=draw.randint(0, 150))
        if len(parts) > 20:
            start, length = draw.randrange(10), draw.randint(2, 12)
            for _ in range(draw.randrange(5)):
                at = draw.randrange(len(parts))
                parts[at:at] = parts[start : start + length]
        text = " ".join(parts)
        expected = by_counting(text)
        assert repeated_ngrams(Document(text)) == expected
        dropped += expected
    assert 100 < dropped < 500


def test_fingerprints_are_sha256():
    assert fingerprint("Länder") == hashlib.sha256("Länder".encode()).digest()


def test_texts_are_new_once_however_many_there_are(monkeypatch):
    monkeypatch.setattr(SeenTexts, "RECENT", 7)
    draw = random.Random(0)
    ours, reference = SeenTexts(), set()
    for _ in range(3000):
        text = str(draw.randrange(1500))
        assert (fingerprint(text) in ours) == (text in reference)
        if text not in reference:
            ours.add(fingerprint(text))
            reference.add(text)
    assert len(ours._recent) < 7 and ours._old.nbytes < 8 * len(reference) + 1


@pytest.mark.shared
def test_thresholds_of_our_own_drop_hardly_an_article_of_the_encyclopedia():
    articles = list(read_texts([str(SHARED / "data/enwiki2015/valid.txt")]))
    assert len(articles) > 100
    dropped = Counter(name for name in FILTERS for text in articles if FILTERS[name](Document(text)))
    assert all(
        dropped[name] <= 0.01 * len(articles) for name in ("digits", "urls", "notices", "non_printing")
    )
    assert sum(BASIC.reason(text) is None for text in articles) > 0.93 * len(articles)

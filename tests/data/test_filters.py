"""Filters: each drops what it is there for, and nothing else does."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tessera.data.document_rules import LATER_RULES, RULES, Document
from tessera.data.filters import DUPLICATE, EVERY, PRESETS, Filters, choose_filters
from tessera.data.line_rules import clean_lines
from tessera.data.repetition import repeated_ngrams, repeated_paragraphs
from tessera.data.sources import read_texts

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))

BASIC = choose_filters("basic")
BASIC_RULES = [name for name in BASIC.names if name != DUPLICATE]

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


@pytest.mark.parametrize("name", BASIC_RULES)
def test_each_basic_filter_alone_drops_its_text(name):
    text = BAD[name]
    assert BASIC.reason(text) == name
    others = Filters(tuple(other for other in BASIC_RULES if other != name), BASIC.min_chars)
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
    assert BASIC.names[0] == "few_words" and BASIC.names[-1] == DUPLICATE and BASIC.min_chars == 200
    chosen = choose_filters("not_english, code")
    assert chosen == Filters(("code", "not_english"), 0)
    assert chosen.reason("{") == "code" and chosen.reason("Ein Haus") == "not_english"
    both = choose_filters("near_duplicate,basic,few_sentences")
    assert (
        both.names == (*BASIC_RULES, "few_sentences", DUPLICATE, "near_duplicate") and both.min_chars == 200
    )
    for names in PRESETS.values():
        assert set(names) <= set(EVERY)


@pytest.mark.parametrize("given", ["most", "", "code,,urls"])
def test_unknown_filters_are_refused_with_those_that_there_are(given):
    with pytest.raises(
        ValueError, match=r"there is no filter .* none, basic, c4, .*some of few_words, .*duplicate"
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
    for n, share in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
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
    limits = Counter()
    for _ in range(700):
        vocabulary = words(draw.randrange(1000), draw.choice([5, 50, 500, 2000]))
        parts = draw.choices(vocabulary, k=draw.randint(0, 150))
        if len(parts) > 20:
            start, length = draw.randrange(10), draw.randint(2, 12)
            for _ in range(draw.randrange(5)):
                at = draw.randrange(len(parts))
                parts[at:at] = parts[start : start + length]
        measured = repeated_ngrams(parts)
        assert (measured is not None) == by_counting(" ".join(parts))
        limits[measured and measured[1]] += 1
        assert measured is None or measured[0] > measured[1]
    assert 150 < limits[None] < 650 and len(limits) >= 8, "no test of this or that limit"


# ---- C4, Gopher, FineWeb ----

# For each of their rules that `basic` does not have: a text that it drops, and one that it just does not.
MARGINS = {
    "many_words": ("a " * 100_001, "a " * 100_000),
    "repeated_paragraphs": (
        "same\n\n" * 2 + "other\n\n" * 2 + "third",
        "same\n\nsame\n\n" + "other " * 3 + "\n\nfour",
    ),
    "few_english_words": ("der Hund und die Katze sind von hier " * 3, "the dog saw many cats here"),
    "few_sentences": ("One. Two! And no", "One. Two! (Three?)"),
    "unfinished": ("\n".join(["A line."] * 1 + ["a line"] * 8), "\n".join(["A line."] * 1 + ["a line"] * 7)),
    "short_lines": (
        "\n".join(["x" * 30] * 68 + ["x" * 31] * 32),
        "\n".join(["x" * 30] * 67 + ["x" * 31] * 33),
    ),
    "repeated_line_chars": ("\n".join(["12"] * 2 + ["x" * 190]), "\n".join(["12"] * 2 + ["x" * 196])),
    "line_breaks": ("a b c\n" * 31 + "d e f", "a b c d\n" * 31),
}


@pytest.mark.parametrize("name", MARGINS)
def test_rules_of_the_papers_drop_from_their_limit_on(name):
    bad, good = MARGINS[name]
    dropped = Filters((name,)).examine(bad).dropped
    assert dropped.reason == name and (dropped.value > dropped.limit or dropped.value < dropped.limit)
    assert Filters((name,)).reason(good) is None


def test_every_rule_has_a_text_that_it_drops_and_none_stumbles_over_an_empty_one():
    assert {*RULES, *LATER_RULES} == {*BAD, *MARGINS}
    for rules in (RULES, LATER_RULES):
        for name, rule in rules.items():
            rule(Document("")), rule(Document("\n \n")), rule(Document("x"))
            measured = rule(Document(BAD[name] if name in BAD else MARGINS[name][0]))
            assert len(measured) == 2


def test_what_a_rule_measured_is_told_with_its_limit():
    dropped = choose_filters("few_words").examine("only four words here").dropped
    assert (dropped.reason, dropped.value, dropped.limit) == ("few_words", 4, 50)
    dropped = choose_filters("none", 30).examine("only four words here").dropped
    assert (dropped.reason, dropped.value, dropped.limit) == ("too_short", 20, 30)


def test_paragraphs_count_by_number_and_by_characters():
    assert repeated_paragraphs("a\n\nb\n \na\n\na") == (0.5, 0.3)
    long = "word " * 40 + "end"
    share, limit = repeated_paragraphs("\n\n".join([long, *"abcdefg", long]))
    assert limit == 0.2 and 0.4 < share < 0.5
    assert repeated_paragraphs("a\na\na") is None


SENTENCES = {
    "en": "The railway reached the valley in spring, which changed almost everything that people did there.",
    "de": "Die Eisenbahn erreichte das Tal im Frühling, was fast alles änderte, wovon die Leute dort lebten.",
    "fr": "Le chemin de fer atteignit la vallée au printemps, ce qui changea presque toute la vie des gens.",
    "ru": "Железная дорога пришла в долину весной, и это изменило почти всё, чем жили там люди.",
    "ja": "鉄道は春に谷に達し、そこに住む人々の暮らしのほとんどすべてを変えた。",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_only_one_language_is_kept(language):
    pytest.importorskip("py3langid", reason="an optional extra")
    chosen = choose_filters("none", language=language)
    for other, text in SENTENCES.items():
        dropped = chosen.examine(text * 3).dropped
        assert (dropped is None) == (other == language), other
        if dropped:
            assert dropped.reason == "other_language" and dropped.value < dropped.limit == 0.65


def test_a_language_that_nobody_knows_is_refused():
    pytest.importorskip("py3langid", reason="an optional extra")
    with pytest.raises(ValueError, match="no language 'english'; there are .*, en, "):
        choose_filters("none", language="english")


PAGE = """Home | About | Contact
The museum[1] opened its doors[edit] in the spring of 1911.
It was closed during both of the wars.

    She said that "it had never looked better."
This sentence has no end mark at all
Too short.
Read more about this in ...
Please enable JavaScript to see all of this page.
By staying you accept our terms of use and more."""


def test_c4_takes_lines_out_of_a_page():
    examined = choose_filters("c4").examine(PAGE)
    assert examined.dropped is None
    assert examined.text == (
        "The museum opened its doors in the spring of 1911.\nIt was closed during both of the wars.\n"
        'She said that "it had never looked better."'
    )
    assert examined.lines == {"open_lines": 3, "few_word_lines": 1, "notice_lines": 2}
    only, _ = clean_lines("a " + "b" * 1001 + "\n" + "c" * 1000, ("long_word_lines",))
    assert only == "c" * 1000


def test_rules_on_what_is_left_do_not_see_the_lines_that_went():
    text = PAGE.replace("It was closed during both of the wars.", "closed")
    assert choose_filters("few_sentences").reason(text) is None
    dropped = choose_filters("c4").examine(text).dropped
    assert (dropped.reason, dropped.value) == ("few_sentences", 2)
    # The whole page is asked for braces, though the line with them would go.
    assert choose_filters("c4").reason(PAGE + "\n{") == "code"
    assert choose_filters("few_word_lines").reason("three words only") == "empty"


@pytest.mark.shared
def test_thresholds_of_our_own_drop_hardly_an_article_of_the_encyclopedia():
    articles = list(read_texts([str(SHARED / "data/enwiki2015/valid.txt")]))
    assert len(articles) > 100
    dropped = Counter(name for name in RULES for text in articles if RULES[name](Document(text)))
    ours = ("digits", "urls", "notices", "non_printing", "few_english_words")
    assert all(dropped[name] <= 0.01 * len(articles) for name in ours)
    assert sum(BASIC.reason(text) is None for text in articles) > 0.93 * len(articles)

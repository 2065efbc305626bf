"""Texts that are hard on tokenizers, made by code: what `verify` compares on, and savers before they save.

What belongs here is text in which splitting, merging, byte fallback or decoding may go another way in another
library. The set is the same in every process; it may grow. Each text has a name, so that a difference can be
told without printing ten thousand spaces.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MAX_POINT = 0x110000
SURROGATES = range(0xD800, 0xE000)
RUN_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 255, 256, 257, 1000)
LONGEST_RUN = 10_000
# One of so many neighbouring code points is among the probes; blocks of scripts have 16 at least.
POINTS_APART = 61


class Probe(NamedTuple):
    """A text and what it is."""

    name: str
    text: str


def adversarial_texts(special_tokens: Sequence[str] = ()) -> Iterator[Probe]:
    """All probes but the whole of Unicode, 1/3 MB or so.

    Args:
        special_tokens: tokens whose spelling is put into text.

    Yields:
        Texts that can be encoded as UTF-8, each with its name.
    """
    yield Probe("the empty text", "")
    yield from _control_characters()
    yield from _characters(POINTS_APART)
    yield from _combining()
    yield from _invalid_utf8()
    yield from _runs()
    yield from _white_space()
    yield from _digits()
    yield from _contractions()
    yield from _spelled(special_tokens)
    yield from _emoji_and_directions()
    yield from _long_words()
    yield from _mixed()


def every_character() -> Iterator[Probe]:
    """Each code point of all 17 planes: after a letter, before a digit, doubled after a space, at a mark."""
    yield from _characters(1)


def _characters(step: int) -> Iterator[Probe]:
    points = [point for point in range(0, MAX_POINT, step) if point not in SURROGATES]
    for start in range(0, len(points), 64):
        chosen = points[start : start + 64]
        lines = [f"a{chr(point)}1 {chr(point)}{chr(point)}!" for point in chosen]
        yield Probe(f"code points U+{chosen[0]:04X} to U+{chosen[-1]:04X}", "\n".join(lines))


def _control_characters() -> Iterator[Probe]:
    for point in [*range(0x20), *range(0x7F, 0xA1), 0xAD, 0xFEFF, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF]:
        c = chr(point)
        yield Probe(f"U+{point:04X} in places", f"{c}a{c}{c} {c}1{c}.{c}\n{c} b{c}")
        yield Probe(f"U+{point:04X} alone", c)
    yield Probe("all bytes below 0x80", "".join(map(chr, range(0x80))))
    yield Probe("all of Latin-1", "".join(map(chr, range(0x100))))


def _combining() -> Iterator[Probe]:
    yield Probe("marks after a letter", "e\u0301 e\u0301\u0323 a\u030a\u0301x")
    yield Probe("forty marks on one letter", "Z" + "\u0301\u0323\u0336\u0360" * 10 + "a")
    yield Probe("marks without a letter", "\u0301 \u0301\u0301 1\u0301 .\u0301\n\u0301")
    yield Probe("enclosing marks", "1\u20dd a\u20dd 12\u20e3 #\ufe0f\u20e3")
    yield Probe("composed and decomposed", "é e\u0301 Å A\u030a \u212b ﬁ fi 각 \u1100\u1161\u11a8")
    yield Probe("Indic vowels and conjuncts", "क्षत्रिय நி කෝ ខ្មែរ ไทยนี้ བོད་")
    yield Probe("cases that change the length", "İ ı ß ẞ ǅ ŉ ſ K ﬅ ΐ")
    yield Probe("letters and digits of other sets", "𝐀𝟎 ⅷ ² ½ ㊿ ①② １２３４ ٣٤٥ १२३ 𝕏 🄰")


def _invalid_utf8() -> Iterator[Probe]:
    for name, data in {
        "bytes that are in no UTF-8": b"a\xff\xfe\xc0\xc1\xf5b",
        "continuation bytes alone": b"\x80\xbf x\x80y",
        "characters cut short": b"a\xe2\x82 b\xf0\x9f\x98 c\xc3",
        "overlong forms": b"\xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf",
        "surrogates as UTF-8": b"\xed\xa0\x80\xed\xb0\x80 \xed\xbf\xbf",
        "beyond U+10FFFF": b"\xf4\x90\x80\x80 \xf8\x88\x80\x80\x80",
        "Latin-1": "Füße über Ärger, ça va".encode("latin-1"),
        "UTF-16": "text".encode("utf-16"),
        "all bytes": bytes(range(256)),
        "all bytes backwards": bytes(range(255, -1, -1)),
    }.items():
        yield Probe(f"not UTF-8: {name}", data.decode("utf-8", errors="replace"))
    yield Probe("U+FFFD in text", "a\ufffdb \ufffd\ufffd 1\ufffd\n\ufffd" + "\ufffd" * 300)


def _runs() -> Iterator[Probe]:
    for c in (
        "a",
        " ",
        "\n",
        "\t",
        "0",
        ".",
        "'",
        "A",
        "é",
        "京",
        "\u00a0",
        "\u3000",
        "🙂",
        "\r\n",
        "_",
        "ab",
    ):
        name = repr(c)
        for length in RUN_LENGTHS:
            yield Probe(f"{name} {length} times", c * length)
            if length < 20 or length == 257:
                yield Probe(f"{name} {length} times in text", f"x{c * length}y {c * length} z.{c * length}")
        if len(c.encode("utf-8")) < 3:
            yield Probe(f"{name} {LONGEST_RUN} times", c * LONGEST_RUN)


def _white_space() -> Iterator[Probe]:
    draw = random.Random(1)
    kinds = "  \t\n\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u180e\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b"
    for number in range(150):
        space = ["".join(draw.choices(kinds, k=draw.randint(1, 9))) for _ in range(4)]
        yield Probe(f"white space {number}", f"{space[0]}a{space[1]}1{space[2]}.{space[3]}")
    for n in range(1, 10):
        yield Probe(
            f"code indented by {n}", f"def f():\n{' ' * n}if x:\n{' ' * 2 * n}return 1\n\n\n{' ' * n}# end  "
        )
    yield Probe("line ends of all sorts", "a\r\nb\n\rc\rd\n\n\r\n\r\r e \r\n f\u2028g\u2029h\x85i")
    yield Probe("spaces before a line end", "a   \nb \t \r\n  \n \n   c\n   ")
    yield Probe("space at both ends", "  ka  ren  ")


def _digits() -> Iterator[Probe]:
    draw = random.Random(2)
    for separator in ("", ",", ".", " ", "_", "-", ":", "/", "'", "\u00a0", "\u202f", "٬"):
        groups = [str(draw.randrange(10 ** draw.randint(1, 6))) for _ in range(30)]
        yield Probe(f"digits with {separator!r} between", separator.join(groups))
    for length in range(1, 13):
        yield Probe(
            f"{length} digits", " ".join(str(draw.randrange(10**length)).zfill(length) for _ in range(5))
        )
    yield Probe(
        "numbers as they are written", "1,234,567.89 -0.5e-10 0xFF 1e9 3.14159 2026-11-24T17:05 50% $9.99 №7"
    )
    yield Probe("other digits together", "1٢३４5৬ 1²3 12½ 99９9")


def _contractions() -> Iterator[Probe]:
    ends = ("s", "t", "re", "ve", "m", "ll", "d")
    for end in ends:
        for form in dict.fromkeys((end, end.upper(), end.capitalize(), end[0] + end[1:].upper())):
            yield Probe(
                f"'{form}", f"it'{form} IT'{form}, x'{form}y '{form} ''{form} 1'{form}\n'{form} it’{form}"
            )
    yield Probe(
        "apostrophes with other letters", "'ſ it'ſ 'S's'S 'Ll'rE don''t o'clock rock'n'roll y'all'd've 'K"
    )


def _spelled(special_tokens: Sequence[str]) -> Iterator[Probe]:
    usual = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|pad|>",
        "<think>",
        "</tool_call>",
        "<s>",
        "</s>",
    )
    usual += ("<unk>", "[INST]", "<0x41>", "<0x0A>", "<|fim_prefix|>", "<|endofprompt|>", "\u2581", "Ġ", "Ċ")
    for token in dict.fromkeys([*usual, *special_tokens]):
        yield Probe(
            f"text that spells {token}",
            f"{token}a {token} b{token}{token}\n{token}1 {token[:-1]} {token[1:]}",
        )
    yield Probe("marks of a space of SentencePiece's", "a\u2581b \u2581c\u2581\u2581d")


def _emoji_and_directions() -> Iterator[Probe]:
    yield Probe(
        "emoji with joiners", "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 ❤️‍🔥 🧑‍🤝‍🧑🇳🇴🇺🇳 ☺️☺︎ 🏴\U000e0067\U000e0062\U000e007f"
    )
    yield Probe("joiners alone", "\u200d \u200d\u200d a\u200db \ufe0f\ufe0e \u200c")
    yield Probe("right to left", "שלום עולם! مرحبا بالعالم، ١٢٣ — السَّلَامُ עַל־כֵּן abc שלום 123")
    yield Probe("directions by hand", "\u202eabc\u202c \u2066x\u2069 \u200fא\u200e \u061c1")
    yield Probe(
        "scripts without spaces", "我們在這裡。日本語の文章、カタカナとｶﾅ。ภาษาไทยไม่มีช่องว่าง ລາວ မြန်မာ"
    )
    yield Probe("scripts with spaces", "Это русский. Ελληνικά, Հայերեն ქართული አማርኛ हिन्दी বাংলা 한국어")


def _long_words() -> Iterator[Probe]:
    draw = random.Random(3)
    for length in (100, 1000, 5000):
        letters = "".join(draw.choices("etaoinshrdlucmfwyp", k=length))
        yield Probe(f"a word of {length} letters", f"x {letters} y")
        yield Probe(
            f"a word of {length} letters and capitals", "".join(draw.choices("etaoinETAOIN", k=length))
        )
    yield Probe("a word of 2000 letters of several scripts", "".join(draw.choices("aéßжщ東京אب한ไ", k=2000)))
    yield Probe("base 64", "".join(draw.choices("ABCDEFGHabcdefgh0123456789+/", k=3000)))
    yield Probe("one line of minified code", "function(a,b){return a[b]||(a[b]={})};" * 40)
    yield Probe("3000 marks", "".join(draw.choices("!?.,;:-=*#@$%^&()[]{}<>/\\|~`\"'", k=3000)))


def _mixed() -> Iterator[Probe]:
    draw = random.Random(4)

    def anything() -> str:
        point = draw.randrange(MAX_POINT)
        return chr(point) if point not in SURROGATES else "?"

    pools = (
        lambda: draw.choice(" \t\n\r\x0b\x85\u00a0\u2028\u3000\u200b"),
        lambda: chr(draw.randrange(0x80)),
        lambda: draw.choice("aaab.. -=0"),
        lambda: draw.choice(
            ("'s", "'LL", "é", "e\u0301", "日本", "１２", "½", "ǅ", "the", "ing", "да", "Ka")
        ),
        anything,
    )
    for number in range(400):
        chosen = draw.sample(pools, draw.randint(1, 3))
        yield Probe(f"mixture {number}", "".join(draw.choice(chosen)() for _ in range(draw.randint(1, 40))))

"""Two tokenizers side by side: do they give the same ids, and the same text for them?

What belongs here: comparing vocabularies, special tokens, ids and decoded text, and telling the first
difference so that a person sees it. Whoever writes a tokenizer compares what was written with what it was
made from.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from .probes import Probe, adversarial_texts, every_character
from .reference_codecs import Codec, open_codec

# Texts are handed over in batches of so many characters: threads have work, memory stays small.
BATCH_CHARACTERS = 2**20
# What is shown around a difference: characters before and after, and ids on each side.
AROUND = 30
IDS_SHOWN = 8
TOKENS_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """Where two tokenizers first part.

    Attributes:
        document: which text, by name.
        offset: characters before the first token that differs; None where tokens stand for no fixed bytes.
        before, after: the text on both sides of that place.
        ids: the ids from there on, of A and of B.
        tokens: what they are.
    """

    document: str
    offset: int | None
    before: str
    after: str
    ids: tuple[list[int], list[int]]
    tokens: tuple[list[str], list[str]]

    def lines(self) -> Iterator[str]:
        """Told in lines."""
        place = f"character {self.offset:,}" if self.offset is not None else "an unknown character"
        yield f"first difference: {self.document}, {place}"
        yield f"  text: {self.before!r} | {self.after!r}"
        for side, ids, tokens in zip("AB", self.ids, self.tokens, strict=True):
            shown = "  ".join(f"{index} {token}" for index, token in zip(ids, tokens, strict=True))
            yield f"  {side}: {shown or '(ends)'}"


@dataclass
class Verification:
    """What came of comparing A and B.

    Attributes:
        a, b: the names of both, and the libraries that ran them.
        documents, num_bytes, tokens: what was encoded; tokens are A's.
        difference: the first in ids.
        decoding: the first text that one gives back in another way than the other: name, A's text and B's.
        came_back: documents that A and B decode to the text they encoded.
        vocabulary: differences between tokens that both have, or that only one has; told in lines.
        only_special: special tokens that only one has; told in lines.
    """

    a: str
    b: str
    documents: int = 0
    num_bytes: int = 0
    tokens: int = 0
    difference: Difference | None = None
    decoding: tuple[str, str, str] | None = None
    came_back: list[int] = field(default_factory=lambda: [0, 0])
    vocabulary: list[str] = field(default_factory=list)
    only_special: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both encode and decode all of it alike, with the same tokens.

        Special tokens that only one has are no difference: no text is encoded to them.
        """
        return self.difference is None and self.decoding is None and not self.vocabulary

    def report(self) -> str:
        """All of it for people."""
        lines = [f"A: {self.a}", f"B: {self.b}", *self.vocabulary, *self.only_special]
        lines.append(f"{self.documents:,} documents, {self.num_bytes:,} bytes, {self.tokens:,} tokens of A")
        if self.difference:
            lines += self.difference.lines()
        if self.decoding:
            name, *texts = self.decoding
            lines.append(f"first difference in decoding: {name}")
            lines += [f"  {side}: {text!r}" for side, text in zip("AB", texts, strict=True)]
        if self.difference is None:
            lines.append(
                "decoded to the text that was encoded: "
                + ", ".join(f"{side} {n:,}" for side, n in zip("AB", self.came_back, strict=True))
                + f" of {self.documents:,}"
            )
        return "\n".join(lines)


def verify_tokenizers(
    a: str | Path,
    b: str | Path,
    texts: Iterable[str] | None = None,
    *,
    encodings: tuple[str | None, str | None] = (None, None),
    whole_unicode: bool = False,
) -> Verification:
    """Compares two tokenizers on a corpus.

    Args:
        a: directory, name on the Hub, or original file, which is run by its own library; see `open_codec`.
        b: the other.
        texts: documents; if not given, the texts of `probes`.
        encodings: which encodings rank files are of, where that does not show.
        whole_unicode: with `probes`, each character of Unicode.

    Returns:
        What was found. Encoding stops with the batch that has a difference.

    Raises:
        ValueError: if one of them cannot be opened.
    """
    one, other = (open_codec(source, encoding=name) for source, name in zip((a, b), encodings, strict=True))
    if texts is not None:
        named = (Probe(f"document {number}", text) for number, text in enumerate(texts, 1))
    else:
        named = adversarial_texts(sorted({*one.special_tokens, *other.special_tokens}))
        if whole_unicode:
            named = chain(named, every_character())
    return compare(one, other, named)


def compare(a: Codec, b: Codec, texts: Iterable[Probe]) -> Verification:
    """Compares two tokenizers on named texts."""
    result = Verification(f"{a.name} ({a.library})", f"{b.name} ({b.library})")
    _compare_vocabularies(a, b, result)
    for batch in _batches(texts):
        documents = [probe.text for probe in batch]
        rows = a.encode_batch(documents), b.encode_batch(documents)
        result.documents += len(documents)
        result.num_bytes += sum(len(text.encode("utf-8")) for text in documents)
        result.tokens += sum(map(len, rows[0]))
        for probe, of_a, of_b in zip(batch, *rows, strict=True):
            if of_a != of_b:
                result.difference = _difference(probe, of_a, of_b, a, b)
                return result
        _compare_decoding(a, b, batch, rows[0], result)
        if result.decoding:
            return result
    return result


def require_same(original: Codec, written: Codec, what: str) -> Verification:
    """Refuses a tokenizer that is not what it was made from, on the adversarial texts.

    Args:
        original: what it was made from.
        written: what is about to get its name.
        what: of which one speaks in the error.

    Raises:
        ValueError: with the first difference.
    """
    result = compare(original, written, adversarial_texts(sorted(written.special_tokens)))
    if not result.equal:
        lines = [*result.vocabulary]
        if result.difference:
            lines += result.difference.lines()
        if result.decoding:
            name, *texts = result.decoding
            lines.append(f"{name} is decoded to {texts[0][:80]!r} and {texts[1][:80]!r}")
        story = "; ".join(line.strip() for line in lines[:6])
        raise ValueError(
            f"{what} does not encode as {original.name} does with {original.library}; nothing was written. "
            f"{story}"
        )
    return result


def _compare_decoding(
    a: Codec, b: Codec, batch: list[Probe], rows: list[list[int]], result: Verification
) -> None:
    lossy = a.loses_in_decoding or b.loses_in_decoding
    unknown = (
        {i for codec in (a, b) for name, i in codec.special_tokens.items() if "unk" in name}
        if lossy
        else set()
    )
    for probe, ids, of_a, of_b in zip(batch, rows, a.decode_batch(rows), b.decode_batch(rows), strict=True):
        result.came_back[0] += of_a == probe.text
        result.came_back[1] += of_b == probe.text
        if of_a != of_b and not (lossy and ("\ufffd" in probe.text or unknown.intersection(ids))):
            result.decoding = result.decoding or (probe.name, of_a, of_b)


def _compare_vocabularies(a: Codec, b: Codec, result: Verification) -> None:
    for (side, one), (_, other) in ((("A", a), ("B", b)), (("B", b), ("A", a))):
        extra = [
            f"{token} {index}"
            for token, index in sorted(one.special_tokens.items(), key=lambda item: item[1])
            if token not in other.special_tokens
        ]
        if extra:
            result.only_special.append(f"special tokens of {side} alone, {_count(extra)}")
    moved = [
        f"{token} {index} and {b.special_tokens[token]}"
        for token, index in a.special_tokens.items()
        if b.special_tokens.get(token, index) != index
    ]
    if moved:
        result.vocabulary.append(f"special tokens with other ids, {_count(moved)}")
    special = {*a.special_tokens.values(), *b.special_tokens.values()}
    of_a, of_b = _ordinary(a, b)
    different = []
    for index in range(max(len(of_a), len(of_b))):
        if index in special:
            continue
        one, other = (tokens[index] if index < len(tokens) else None for tokens in (of_a, of_b))
        if (one or None) != (other or None):
            different.append(
                f"{index} {a.token(index) if one else 'nothing'} and {b.token(index) if other else 'nothing'}"
            )
    if different:
        result.vocabulary.append(f"ids that stand for other tokens, {_count(different)}")


def _ordinary(a: Codec, b: Codec) -> tuple[list, list]:
    """Tokens by id in a form that both have: their bytes, or else their names."""
    if a.table is not None and b.table is not None:
        return a.table.pieces, b.table.pieces
    lists = []
    for codec in (a, b):
        names: list[str | None] = [None] * (max(codec.names, default=-1) + 1)
        for index, name in codec.names.items():
            names[index] = name
        lists.append(names)
    return lists[0], lists[1]


def _count(items: list[str]) -> str:
    more = f", and {len(items) - TOKENS_SHOWN:,} more" if len(items) > TOKENS_SHOWN else ""
    return f"{len(items):,}: {', '.join(items[:TOKENS_SHOWN])}{more}"


def _difference(probe: Probe, of_a: list[int], of_b: list[int], a: Codec, b: Codec) -> Difference:
    shorter = min(len(of_a), len(of_b))
    unequal = np.flatnonzero(np.array(of_a[:shorter]) != np.array(of_b[:shorter]))
    first = int(unequal[0]) if len(unequal) else shorter
    offset = _characters(a, probe.text, of_a[:first])
    if offset is None:
        offset = _characters(b, probe.text, of_b[:first])
    place = offset or 0
    ids = of_a[first : first + IDS_SHOWN], of_b[first : first + IDS_SHOWN]
    return Difference(
        probe.name,
        offset,
        probe.text[max(place - AROUND, 0) : place],
        probe.text[place : place + AROUND],
        ids,
        ([a.token(index) for index in ids[0]], [b.token(index) for index in ids[1]]),
    )


def _characters(codec: Codec, text: str, ids: list[int]) -> int | None:
    """How many whole characters of a text some first ids stand for."""
    if codec.table is None:
        return None
    data = codec.table.join(ids)
    return len(data.decode("utf-8", errors="ignore")) if text.encode("utf-8").startswith(data) else None


def _batches(texts: Iterable[Probe]) -> Iterator[list[Probe]]:
    batch: list[Probe] = []
    size = 0
    for probe in texts:
        batch.append(probe)
        size += len(probe.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

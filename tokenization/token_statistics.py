"""What a tokenizer is like: its size and tokens, and how many bytes of which kind of text a token holds.

What belongs here: figures about tokenizers, and their tables. The texts of each kind are short and our own
(`samples/`), so that figures of different tokenizers, days and machines can be compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from .reference_codecs import Codec, show_bytes

# kind of text -> what the figure is called
KINDS = {
    "english": "English prose",
    "code": "code",
    "digits": "digits",
    "scripts": "other scripts",
    "markup": "markup",
}
LONGEST = 10
SPECIAL_SHOWN = 20
_CHUNK = 4096


@cache
def sample(kind: str) -> str:
    """The text of a kind."""
    return files(__package__).joinpath("samples", f"{kind}.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class TokenizerInfo:
    """What `tessera tokenizer info` tells.

    Attributes:
        name, library: what was opened, and what runs it.
        vocab_size: ids, those of special tokens included.
        special_tokens: with their ids.
        bytes_per_token: of each kind of text.
        single_bytes: ids that stand for a single byte.
        longest: the longest tokens, white space aside, with their ids; none where tokens have no fixed bytes.
        unreached: how many tokens their own text, alone, is not encoded to, and some of them.
        others: bytes per token of other tokenizers, by their names.
    """

    name: str
    library: str
    vocab_size: int
    special_tokens: dict[str, int]
    bytes_per_token: dict[str, float]
    single_bytes: int
    longest: list[tuple[int, bytes]]
    unreached: tuple[int, list[int]]
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    def report(self) -> str:
        """All of it for people."""
        ordered = sorted(self.special_tokens.items(), key=lambda item: item[1])
        special = [f"{token} {index}" for token, index in ordered[:SPECIAL_SHOWN]]
        if len(ordered) > SPECIAL_SHOWN:
            special.append(f"and {len(ordered) - SPECIAL_SHOWN:,} more")
        lines = [
            f"{self.name} ({self.library})",
            f"{self.vocab_size:,} tokens, of which {len(ordered)} special: {', '.join(special) or 'none'}",
            self._bytes_per_token(),
        ]
        if self.longest:
            longest = ", ".join(f"{show_bytes(piece)} {index}" for index, piece in self.longest)
            count, some = self.unreached
            shown = f", such as {', '.join(map(str, some))}" if some else ""
            lines += [
                f"single bytes: {self.single_bytes} tokens",
                f"longest tokens, white space aside: {longest}",
                f"tokens that their own text, alone, is not encoded to: {count:,}{shown}",
            ]
        return "\n".join(lines)

    def _bytes_per_token(self) -> str:
        if not self.others:
            rows = [f"  {kind:<14} {value:5.2f}" for kind, value in self.bytes_per_token.items()]
            return "\n".join(["bytes per token:", *rows])
        table = [["bytes per token", "this one", *map(_last_part, self.others)]]
        for kind, value in self.bytes_per_token.items():
            table.append(
                [f"  {kind}", *(f"{x:.2f}" for x in (value, *(o[kind] for o in self.others.values())))]
            )
        return _aligned(table)


def describe(codec: Codec, others: Iterable[Codec] = ()) -> TokenizerInfo:
    """Figures of one tokenizer; of others, for comparison, bytes per token."""
    pieces = codec.table.pieces if codec.table else []
    dense = sorted(
        ((index, piece) for index, piece in enumerate(pieces) if _has_no_long_space(piece)),
        key=lambda item: (-len(item[1]), item[0]),
    )
    return TokenizerInfo(
        codec.name,
        codec.library,
        _size(codec),
        dict(codec.special_tokens),
        _by_kind(codec),
        sum(len(piece) == 1 for piece in pieces),
        dense[:LONGEST],
        _unreached(codec, pieces),
        {other.name: _by_kind(other) for other in others},
    )


def _by_kind(codec: Codec) -> dict[str, float]:
    return {title: bytes_per_token(codec, [sample(kind)]) for kind, title in KINDS.items()}


def bytes_per_token(codec: Codec, texts: Iterable[str]) -> float:
    """UTF-8 bytes over tokens.

    Args:
        codec: the tokenizer.
        texts: documents, encoded one at a time.

    Raises:
        ValueError: if there is no text.
    """
    num_bytes = tokens = 0
    for text in texts:
        num_bytes += len(text.encode("utf-8"))
        tokens += len(codec.encode(text))
    if not tokens:
        raise ValueError("there is no text to count tokens of")
    return num_bytes / tokens


def compare_table(codecs: list[Codec], texts: list[str] | None = None) -> str:
    """A table of bytes per token: a row for each kind of text, a column for each tokenizer.

    Args:
        codecs: the tokenizers.
        texts: documents of the user's own, for a row more.
    """
    rows = {title: [sample(kind)] for kind, title in KINDS.items()}
    if texts:
        rows["your text"] = texts
    names = [_last_part(codec.name) for codec in codecs]
    if len(set(names)) < len(names):
        names = [codec.name for codec in codecs]
    table = [["bytes per token", *names]]
    for title, documents in rows.items():
        table.append([title, *(f"{bytes_per_token(codec, documents):.2f}" for codec in codecs)])
    table.append(["tokens", *(f"{_size(codec):,}" for codec in codecs)])
    return _aligned(table)


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    )


def _size(codec: Codec) -> int:
    last = len(codec.table.pieces) - 1 if codec.table else -1
    return max([last, *codec.names, *codec.special_tokens.values()]) + 1


def _has_no_long_space(piece: bytes) -> bool:
    """Whether a token is a word or the like: not one of the runs that are the longest in every vocabulary."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(set(text.strip())) > 2


def _unreached(codec: Codec, pieces: list[bytes]) -> tuple[int, list[int]]:
    """Tokens that are whole characters and that nothing is encoded to when it is just their text."""
    wanted: list[tuple[int, str]] = []
    for index, piece in enumerate(pieces):
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text:
            continue
        if codec.table.strips_first_space:
            # Encoding puts a space before a text: it is the token's own, or a line break stands between.
            text = text[1:] if text.startswith(" ") and text != " " else "\n" + text
        wanted.append((index, text))
    missed = []
    for start in range(0, len(wanted), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        for (index, text), ids in zip(chunk, codec.encode_batch([text for _, text in chunk]), strict=True):
            alone = ids[-1:] == [index] if text.startswith("\n") else ids == [index]
            if not alone:
                missed.append(index)
    return len(missed), missed[:LONGEST]

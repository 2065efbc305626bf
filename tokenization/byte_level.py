"""Byte-level BPE: the patterns that split text, tiktoken's encodings and their rank files.

What belongs here: how a vocabulary of byte strings becomes a backend of the `tokenizers` library that gives
the ids of its origin. The patterns are OpenAI's, in the form that was published before possessive quantifiers
came in: the regular expressions of `tokenizers` (Oniguruma) read `{1,3}+` and `$` otherwise.

Text comes back as it was, whatever it is. Ids that do not end on whole characters decode to U+FFFD there.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .chat import END_OF_TEXT, SPECIAL_TOKENS

BYTE_NAMES: dict[int, str] = bytes_to_unicode()

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


@dataclass(frozen=True)
class Encoding:
    """A published encoding: what its rank file does not say.

    Args:
        name: tiktoken's.
        pattern: what splits text before merging.
        num_ranks: lines of the rank file; ranks are 0 to one less.
        special_tokens: ids of the tokens that no text is merged to.
        sha256: of the rank file.
    """

    name: str
    pattern: str
    num_ranks: int
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    sha256: str = ""


ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "r50k_base",
            GPT2_PATTERN,
            50256,
            {END_OF_TEXT: 50256},
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        Encoding(
            "cl100k_base",
            GPT4_PATTERN,
            100256,
            {
                END_OF_TEXT: 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
        Encoding(
            "o200k_base",
            GPT4O_PATTERN,
            199998,
            {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
    )
}


def find_encoding(name: str) -> Encoding | None:
    """The encoding that a name means; GPT-2's is also called by the model's."""
    return ENCODINGS.get("r50k_base" if name == "gpt2" else name)


def read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Reads tiktoken's rank file: base64 of a token, a space, its rank.

    Args:
        data: content of the file.
        name: of the file, for errors.

    Raises:
        ValueError: if a line is something else, a byte is no token, or the ranks are not all from 0 on.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if not token or token in ranks:
                raise ValueError
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{name} is not a whole tiktoken rank file: line {number} is not the base64 of another token "
                f"and its rank, but {line[:40]!r}"
            ) from None
    _check_ranks(ranks, name)
    return ranks


def _check_ranks(ranks: Mapping[bytes, int], name: str) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks in {name} are not 0 to {len(ranks) - 1}, each once: the file is damaged")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{name} has no token for the byte {missing[0]:#04x}: the file is damaged")


def identify_ranks(path: Path, data: bytes, named: str | None) -> Encoding:
    """The encoding that a rank file is of: the one named, or else by the hash or name of the file.

    Raises:
        ValueError: if the name is unknown, or nothing tells the encoding.
    """
    if named is not None:
        encoding = find_encoding(named)
        if encoding is None:
            raise ValueError(f"there is no encoding {named}; known are gpt2, {', '.join(ENCODINGS)}")
        return encoding
    digest = hashlib.sha256(data).hexdigest()
    for encoding in ENCODINGS.values():
        if encoding.sha256 == digest:
            return encoding
    if encoding := find_encoding(path.name.removesuffix(".tiktoken")):
        return encoding
    raise ValueError(
        f"{path} is a rank file, which does not say how text is split before merging; say whose it is "
        f"with --as, one of gpt2, {', '.join(ENCODINGS)}"
    )


def backend_from_ranks(ranks: Mapping[bytes, int], encoding: Encoding, *, chat: bool) -> Tokenizer:
    """The backend of a tiktoken encoding.

    Ids are tiktoken's. Those that it leaves unused between its special tokens hold the tokens of the chat
    format as far as there is room, the rest `<|reserved_N|>`, so that the vocabulary keeps its size.

    Args:
        ranks: of the ordinary tokens.
        encoding: the pattern and the special tokens.
        chat: whether unused ids hold chat tokens.

    Raises:
        ValueError: if there are more or fewer ranks than the encoding has.
    """
    if len(ranks) != encoding.num_ranks:
        raise ValueError(
            f"{encoding.name} has {encoding.num_ranks} ranks, but there are {len(ranks)}: the file is cut "
            "short, or of another encoding"
        )
    vocabulary = {_name_of(token): rank for token, rank in ranks.items()}
    backend = byte_level_backend(vocabulary, _merges_of_ranks(ranks), encoding.pattern)
    # tiktoken looks a whole word up before it merges
    backend.model.ignore_merges = True
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _special_tokens(encoding, chat=chat)]
    )
    assert all(backend.token_to_id(token) == index for token, index in encoding.special_tokens.items())
    return backend


def _special_tokens(encoding: Encoding, *, chat: bool) -> list[str]:
    """A token for each id after the ranks, up to the last special one."""
    token_at = {index: token for token, index in encoding.special_tokens.items()}
    wanted = [token for token in SPECIAL_TOKENS if token not in encoding.special_tokens] if chat else []
    last = max(token_at, default=-1)
    # Not before the first special token: what is there belongs to other encodings on the same ranks.
    free = [index for index in range(min(token_at, default=0), last) if index not in token_at]
    token_at.update(zip(free, wanted, strict=False))
    return [token_at.get(index, f"<|reserved_{index}|>") for index in range(encoding.num_ranks, last + 1)]


def backend_from_gpt2_files(vocabulary_file: Path, merges_file: Path) -> Tokenizer:
    """The backend of GPT-2's own files: `encoder.json` (or vocab.json) and `vocab.bpe` (or merges.txt).

    Raises:
        ValueError: if they are not such files, or do not belong together.
    """
    try:
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not all(len(merge) == 2 for merge in merges):
            raise ValueError("a merge is not of two tokens")
        backend = byte_level_backend(vocabulary, merges, GPT2_PATTERN)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{vocabulary_file} and {merges_file.name} are not a vocabulary and the merges of it: {error}"
        ) from error
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def byte_level_backend(
    vocabulary: Mapping[str, int], merges: list[tuple[str, str]], pattern: str = GPT4_PATTERN
) -> Tokenizer:
    """Byte-level BPE.

    Args:
        vocabulary: ids of tokens, whose bytes are written with GPT-2's names of bytes.
        merges: pairs of tokens, the ones to merge first first.
        pattern: what splits text before merging.
    """
    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _name_of(token: bytes) -> str:
    return "".join(map(BYTE_NAMES.__getitem__, token))


def _merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token. tiktoken merges any of them, in the order of what they make."""
    names = {token: _name_of(token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(names[left], names[right]) for left, right in cuts if left in ranks and right in ranks]
    return merges

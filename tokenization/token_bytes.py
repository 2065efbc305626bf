"""The bytes that each token stands for: for bits per byte, for comparing vocabularies, for showing tokens.

What belongs here: reading from a tokenizer's decoder what a single id adds to a text. Where a decoder only
joins bytes (byte-level BPE, SentencePiece with or without byte fallback, the byte tokenizer) the bytes of a
text are those of its tokens one after the other; decoders that look at neighbours, as WordPiece's, have none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# GPT-2's name for each byte, one printable character: what byte-level files call their tokens
CHARACTER_TO_BYTE: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenBytes:
    """Bytes by id.

    Attributes:
        pieces: bytes of each id; none for special tokens and for ids that no token has.
        strips_first_space: whether decoding takes one space off the start, which encoding put there.
    """

    pieces: list[bytes]
    strips_first_space: bool = False

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of bytes of each id, int32 (V,)."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)

    def count(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of the text that ids stand for.

        Args:
            ids: of one document (T,), special tokens among them or not.
        """
        ids = np.asarray(ids, dtype=np.int64)
        total = int(self.lengths[ids].sum())
        if self.strips_first_space and len(ids) and self.pieces[ids[0]].startswith(b" "):
            total -= 1
        return total

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes themselves, special tokens left out."""
        data = b"".join([self.pieces[index] for index in ids])
        starts = self.strips_first_space and len(ids) and self.pieces[ids[0]].startswith(b" ")
        return data[1:] if starts else data


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The table of a tokenizer.

    Args:
        tokenizer: of the `tokenizers` library.

    Raises:
        ValueError: if its tokens stand for no fixed bytes.
    """
    backend = tokenizer.backend_tokenizer
    kind = _Decoder.of(backend)
    special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index not in special:
            pieces[index] = kind.bytes_of(token)
    return TokenBytes(pieces, kind.strips_first_space)


def bytes_of_name(token: str) -> bytes:
    """What a byte-level decoder makes of a token: the bytes it names, if each character names one."""
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode("utf-8")


@dataclass
class _Decoder:
    """What the decoder of a `tokenizer.json` does to one token."""

    byte_level: bool = False
    byte_fallback: bool = False
    strips_first_space: bool = False
    replaced: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, backend: Tokenizer) -> "_Decoder":
        kind = cls()
        # The state of the one part: the JSON of the whole takes a second where vocabularies are large.
        kind._read(json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"})
        return kind

    def _read(self, step: dict) -> None:
        pattern = step.get("pattern", {})
        match step["type"]:
            case "Sequence":
                for one in step["decoders"]:
                    self._read(one)
            case "ByteLevel":
                self.byte_level = True
            case "ByteFallback":
                self.byte_fallback = True
            case "Fuse":
                pass
            case "Replace" if "String" in pattern:
                self.replaced += ((pattern["String"], step["content"]),)
            case "Metaspace":
                self.replaced += ((step["replacement"], " "),)
                self.strips_first_space |= step.get("prepend_scheme", "always") != "never"
            case "Strip" if step["content"] == " " and step["stop"] == 0:
                self.strips_first_space = True
            case other:
                raise ValueError(
                    "the tokens of this tokenizer stand for no fixed bytes: its decoder has a step of type "
                    f"{other}"
                )

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            return bytes_of_name(token)
        for old, new in self.replaced:
            token = token.replace(old, new)
        is_byte = self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if is_byte:
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode("utf-8")

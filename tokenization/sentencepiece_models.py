"""SentencePiece models: what is in a `.model` file, and the backend that gives the same ids.

What belongs here: reading the file, for which neither sentencepiece nor protobuf is needed, and saying in
parts of the `tokenizers` library what SentencePiece does with spaces, bytes and merges. Only for BPE models,
which is what language models have.

What a text comes back as: itself, for models that do not remove white space, with three exceptions. U+2581,
SentencePiece's mark for a space, comes back as a space; a character without a piece is lost in models without
byte fallback; and where ids do not end on whole characters, the run of byte pieces there decodes to U+FFFD
for each of them, even for those that are characters by themselves.
Models that put a space before a text ("dummy prefix") lose it again in decoding, at the start of the ids.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .save import wrap

SPACE = "\u2581"

# sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, _USER_DEFINED, _UNUSED, BYTE = range(1, 7)
_BPE = 2

_ALL_SPACES = 2**16


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a model file says of how text becomes ids.

    Args:
        pieces: the vocabulary.
        roles: ids of the tokens unk, bos, eos and pad that the model has.
        add_dummy_prefix: put a space before a text.
        remove_extra_whitespaces: strip spaces at both ends and join runs of them.
    """

    pieces: list[Piece]
    roles: dict[str, int]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(data: bytes, name: str) -> SentencePieceModel:
    """Reads a model file.

    Args:
        data: its content.
        name: of the file, for errors.

    Raises:
        ValueError: if it is no whole SentencePiece model, or one that is not BPE, normalises characters, or
            has unused pieces.
    """
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(next(value for number, value in fields if number == 3)))
    except (IndexError, KeyError, StopIteration, TypeError, ValueError, struct.error):
        raise ValueError(f"{name} is not a SentencePiece model, or not a whole one") from None
    if trainer.get(3, 1) != _BPE:
        raise ValueError(
            f"{name} is a SentencePiece model of another type than BPE; only BPE can be imported"
        )
    if normalizer.get(2, b""):
        # tokenizers has a part for these rules, whose results are not always SentencePiece's
        raise ValueError(
            f"{name} normalises text (rule {normalizer.get(1, b'').decode('utf-8', 'replace')}); only models "
            "of the rule identity can be imported"
        )
    kinds = {piece.kind for piece in pieces}
    if NORMAL not in kinds or _UNUSED in kinds or trainer.get(24, 0):
        raise ValueError(
            f"{name} has unused pieces, spaces after words, or no ordinary pieces: it cannot be imported"
        )
    # fields 40 to 43 and what they are when not written; -1, which reads as 2**64 - 1, is for none
    roles = {
        role: trainer.get(40 + place, default)
        for place, (role, default) in enumerate({"unk": 0, "bos": 1, "eos": 2, "pad": -1}.items())
    }
    return SentencePieceModel(
        pieces=pieces,
        roles={role: index for role, index in roles.items() if 0 <= index < len(pieces)},
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def sentencepiece_tokenizer(data: bytes, name: str = "the model") -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece BPE model. Ids are those that SentencePiece gives to a text.

    Control pieces are special tokens, found in text unless `split_special_tokens` is set (SentencePiece never
    finds them). Neither bos nor eos is added to a text. A dummy prefix is added before a text, not after a
    special token, nor where a text begins with a user-defined piece (there SentencePiece adds one).

    Args:
        data: content of the model file.
        name: of the file, for errors.

    Raises:
        ValueError: as `read_model`.
    """
    return tokenizer_of_pieces(read_model(data, name))


def tokenizer_of_pieces(model: SentencePieceModel) -> PreTrainedTokenizerFast:
    """The tokenizer of pieces and scores, wherever they were read; see `sentencepiece_tokenizer`."""
    roles = {f"{role}_token": model.pieces[index].text for role, index in model.roles.items()}
    return wrap(_backend(model), **roles)


def _backend(model: SentencePieceModel) -> Tokenizer:
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in model.pieces),
        )
    )
    steps = []
    if model.remove_extra_whitespaces:
        # \A and \z: ^ and $ are at each line
        ends = r" +\z" if model.add_dummy_prefix else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(ends), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        # A space before the text, but not after special tokens: "first" is where the text begins. Metaspace
        # adds none to a text that begins with its replacement. That is right for the one space that is left
        # of several; in other models all spaces are marks by then. The second step makes the new one a mark.
        spaces = Regex(r"(?!\A) ") if model.remove_extra_whitespaces else " "
        steps.append(normalizers.Replace(spaces, SPACE))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            ]
        )
    else:
        steps.append(normalizers.Replace(" ", SPACE))
    # Where no text begins with a space, decoding takes all of them away: marks that a text spells leave some.
    if spaces_before := _ALL_SPACES if model.remove_extra_whitespaces else int(model.add_dummy_prefix):
        decoding.append(decoders.Strip(content=" ", left=spaces_before, right=0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(decoding)
    backend.add_special_tokens(
        [
            AddedToken(piece.text, special=True, normalized=False)
            for piece in model.pieces
            if piece.kind in (CONTROL, UNKNOWN)
        ]
    )
    # Found after spaces have become marks; one that is written with a space never is.
    backend.add_tokens(
        [
            AddedToken(piece.text, normalized=True)
            for piece in model.pieces
            if piece.kind == _USER_DEFINED and " " not in piece.text
        ]
    )
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that make an ordinary piece, in the order in which SentencePiece prefers those."""
    ordinary = {piece.text for piece in pieces if piece.kind == NORMAL}
    merges = []
    for piece in sorted((piece for piece in pieces if piece.kind == NORMAL), key=lambda piece: -piece.score):
        cuts = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        merges += [(left, right) for left, right in cuts if left in ordinary and right in ordinary]
    return merges


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message: integers, or the bytes of anything else."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if number == 0 or position + size > len(data):
            raise ValueError("cut short, or no message")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

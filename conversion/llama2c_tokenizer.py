"""llama2.c's tokenizer files (`tokenizer.bin`, `tok512.bin`), in: pieces and scores of a SentencePiece model.

What belongs here: reading them, and finding the one that belongs to a model. A file says neither whether
spaces are stripped nor whether one is put before a text; taken is what llama2.c's own `run` does: none is
stripped, and one is put. Where the SentencePiece model itself lies beside it, that is read instead.
"""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tessera.tokenization.sentencepiece_models import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Piece,
    SentencePieceModel,
    sentencepiece_tokenizer,
    tokenizer_of_pieces,
)

from .meta_tokenizer import put_bos_first

_ENTRY = struct.Struct("<fI")
# The first three ids; the file has line breaks around the names of the last two.
_ROLES = {"unk": 0, "bos": 1, "eos": 2}


def find_tokenizer(folder: Path, vocab_size: int) -> Callable[[Path], None] | None:
    """Finds the tokenizer of a model: `tok*.model` or `tok*.bin` with as many pieces.

    Returns:
        What writes it into a directory; None if there is no such file.

    Raises:
        ValueError: if a file is damaged, or all have another number of pieces.
    """
    others = []
    for file in (*sorted(folder.glob("tok*.model")), *sorted(folder.glob("tok*.bin"))):
        tokenizer = read_tokenizer(file)
        if len(tokenizer) == vocab_size:

            def write(
                target: Path, tokenizer: PreTrainedTokenizerFast = tokenizer, file: Path = file
            ) -> None:
                tokenizer.save_pretrained(target)
                if file.suffix == ".model":
                    shutil.copyfile(file, target / "tokenizer.model")

            return write
        others.append(f"{file.name} has {len(tokenizer)}")
    if others:
        raise ValueError(
            f"no tokenizer in {folder} has the model's {vocab_size} pieces ({', '.join(others)}); put the "
            "right one there, or none"
        )
    return None


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, which puts its beginning-of-text token before each text.

    Raises:
        ValueError: if it is damaged.
    """
    if file.suffix == ".model":
        tokenizer = sentencepiece_tokenizer(file.read_bytes(), str(file))
    else:
        tokenizer = tokenizer_of_pieces(
            SentencePieceModel(
                pieces=read_pieces(file), roles=_ROLES, add_dummy_prefix=True, remove_extra_whitespaces=False
            )
        )
    put_bos_first(tokenizer)
    return tokenizer


def read_pieces(file: Path) -> list[Piece]:
    """Reads pieces and scores: the length of the longest piece, then score, length and bytes of each.

    Raises:
        ValueError: if the file ends within a piece, or a piece is no text.
    """
    data = file.read_bytes()
    position, pieces = 4, []
    while position < len(data):
        if position + _ENTRY.size > len(data):
            raise ValueError(f"{file} is cut short: it ends within piece {len(pieces)}")
        score, length = _ENTRY.unpack_from(data, position)
        position += _ENTRY.size
        if position + length > len(data):
            raise ValueError(
                f"{file} is cut short: piece {len(pieces)} has {length} bytes, but "
                f"{len(data) - position} are left"
            )
        try:
            text = data[position : position + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: piece {len(pieces)} is not UTF-8") from error
        position += length
        pieces.append(_piece(text, score, len(pieces)))
    if len(pieces) <= len(_ROLES) or all(piece.kind != NORMAL for piece in pieces):
        raise ValueError(f"{file} is not a tokenizer of llama2.c: it has no pieces")
    return pieces


def _piece(text: str, score: float, index: int) -> Piece:
    if index in (_ROLES["bos"], _ROLES["eos"]):
        return Piece(text.strip("\n"), score, CONTROL)
    if index == _ROLES["unk"]:
        return Piece(text, score, UNKNOWN)
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return Piece(text.replace(" ", SPACE), score, BYTE if is_byte else NORMAL)

"""llama2.c's tokenizer files (`tokenizer.bin`, `tok512.bin`), in: pieces and scores of a SentencePiece model.

What belongs here: reading them, and finding the one that belongs to a model. A file says neither whether
spaces are stripped nor whether one is put before a text; taken is what llama2.c's own `run` does: none is
stripped, and one is put. Where the SentencePiece model itself lies beside it, that is read instead.
"""

import math
import shutil
import struct
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

from .checkpoints import FoundTokenizer
from .meta_tokenizer import put_bos_first

_ENTRY = struct.Struct("<fI")
# The first three ids; the file has line breaks around the names of the last two.
_ROLES = {"unk": 0, "bos": 1, "eos": 2}
# No tokenizer is longer, and files of token ids have such names too.
_MOST_BYTES = 2**26


def find_tokenizer(folder: Path, vocab_size: int) -> FoundTokenizer:
    """Finds the tokenizer of a model: the one `tok*.model`, or else `tok*.bin`, with as many pieces.

    Data and the tokenizers of other models have such names as well. So what cannot be read or does not fit
    is no obstacle: where not exactly one is left there is none, and a note says why.
    """
    others = []
    for kind in ("tok*.model", "tok*.bin"):
        fitting = []
        for file in sorted(folder.glob(kind)):
            try:
                tokenizer = read_tokenizer(file)
            except ValueError as error:
                others.append(str(error).replace(str(file), file.name))
                continue
            if len(tokenizer) == vocab_size:
                fitting.append((file, tokenizer))
            else:
                others.append(f"{file.name} has {len(tokenizer)} pieces")
        if len(fitting) == 1:
            return _found(*fitting[0])
        if fitting:
            others = [f"{', '.join(file.name for file, _ in fitting)} fit alike"]
            break
    if not others:
        return FoundTokenizer()
    note = (
        f"the result has no tokenizer, as not exactly one beside the model has its {vocab_size} pieces "
        f"({'; '.join(others)})"
    )
    return FoundTokenizer(notes=[note])


def _found(file: Path, tokenizer: PreTrainedTokenizerFast) -> FoundTokenizer:
    def write(target: Path) -> None:
        tokenizer.save_pretrained(target)
        if file.suffix == ".model":
            shutil.copyfile(file, target / "tokenizer.model")

    return FoundTokenizer(write)


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
        ValueError: if the file ends within a piece, a piece is no text, or a score no number.
    """
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} is not a tokenizer of llama2.c: it is too long")
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
        if not math.isfinite(score):
            raise ValueError(f"{file} is damaged: the score of piece {len(pieces)} is {score}")
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

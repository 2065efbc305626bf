"""Any tokenizer as text to ids and back, run by the library that it belongs to.

What belongs here: opening what a user names, a directory, a name on the Hub or the original files, as
something that encodes, decodes and lists its tokens. Original files go to their own libraries, tiktoken and
sentencepiece, so that what was made of them here is compared with something that shares no code with it.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .byte_level import Encoding, identify_ranks, read_ranks
from .chat import END_OF_TEXT
from .locate import Located, load_huggingface, locate
from .token_bytes import TokenBytes, token_bytes


@dataclass(frozen=True)
class Codec:
    """A tokenizer. Text that spells a special token is text to it, and nothing is added to a text.

    Attributes:
        name: what it was opened from.
        library: which library runs it, with its version.
        encode_batch: ids of each of some texts.
        decode_batch: texts of some lists of ids.
        table: bytes of each id; None where tokens stand for no fixed bytes.
        names: how tokens are written in their vocabulary, where bytes do not tell.
        special_tokens: ids of tokens that no text is encoded to.
        loses_in_decoding: whether U+FFFD and what has no token come back as something else.
    """

    name: str
    library: str
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode_batch: Callable[[list[list[int]]], list[str]]
    table: TokenBytes | None
    names: Mapping[int, str] = field(default_factory=dict)
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    loses_in_decoding: bool = False

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def token(self, index: int) -> str:
        """A token for people: its text where it is whole characters, else its bytes."""
        for name, special in self.special_tokens.items():
            if special == index:
                return name
        if self.table is None:
            return self.names.get(index, f"no token {index}")
        if index >= len(self.table.pieces):
            return f"no token {index}"
        return show_bytes(self.table.pieces[index])


def show_bytes(piece: bytes) -> str:
    """Text in quotes, or bytes where they are no whole characters."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return "<" + piece.hex(" ").upper() + ">"


def open_codec(source: str | Path, *, encoding: str | None = None) -> Codec:
    """Opens a tokenizer.

    Args:
        source: a directory with tokenizer.json or a name on the Hub (run by `tokenizers`); a rank file, a
            folder with encoder.json and vocab.bpe, or the name of an encoding (run by tiktoken); a
            SentencePiece model (run by sentencepiece).
        encoding: which encoding a rank file is of, where neither its hash nor its name tells.

    Raises:
        ValueError: if there is no such tokenizer, its file is damaged, or its library is not installed.
    """
    located = locate(source, encoding)
    if located.kind == "huggingface":
        return huggingface_codec(load_huggingface(located.name), str(source))
    library = "sentencepiece" if located.kind == "sentencepiece" else "tiktoken"
    if find_spec(library) is None:
        raise ValueError(f"{source} is run by {library}, which is not installed: pip install {library}")
    return _own_library(located, str(source), encoding)


def original_codec(located: Located, encoding: str | None = None) -> Codec | None:
    """The original run by its own library; None where that is not installed."""
    if located.kind == "huggingface":
        return huggingface_codec(load_huggingface(located.name), located.name)
    library = "sentencepiece" if located.kind == "sentencepiece" else "tiktoken"
    return _own_library(located, located.name, encoding) if find_spec(library) else None


def huggingface_codec(tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer") -> Codec:
    """A tokenizer of the `tokenizers` library, through a copy of its backend."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    try:
        table = token_bytes(tokenizer)
    except ValueError:
        table = None

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return Codec(
        name,
        f"tokenizers {version('tokenizers')}",
        encode_batch,
        lambda rows: backend.decode_batch(rows, skip_special_tokens=False),
        table,
        {index: token for token, index in backend.get_vocab().items()},
        special,
    )


def _own_library(located: Located, name: str, encoding: str | None) -> Codec:
    if located.kind == "encoding":
        return tiktoken_codec(_by_name(located.name), name)
    if located.kind == "gpt2":
        return tiktoken_codec(_of_gpt2_files(*located.paths), name)
    (path,) = located.paths
    data = path.read_bytes()
    if located.kind == "sentencepiece":
        return sentencepiece_codec(data, name)
    known = identify_ranks(path, data, encoding)
    return tiktoken_codec(_of_ranks(read_ranks(data, name), known), name)


# ---- tiktoken ----


def tiktoken_codec(encoding: Any, name: str) -> Codec:
    """An encoding of tiktoken's."""
    special = dict(encoding._special_tokens)
    pieces = [b""] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():
        pieces[rank] = token
    return Codec(
        name,
        f"tiktoken {version('tiktoken')}",
        lambda texts: encoding.encode_ordinary_batch(texts, num_threads=2),
        lambda rows: encoding.decode_batch(rows, num_threads=2),
        TokenBytes(pieces),
        special_tokens=special,
    )


def download_ranks(name: str) -> dict[bytes, int]:
    """The ranks of an encoding by name, through tiktoken.

    Raises:
        ValueError: if tiktoken is not installed, or they cannot be had.
    """
    return _by_name(name)._mergeable_ranks


def _by_name(name: str) -> Any:
    try:
        import tiktoken
    except ImportError:
        raise ValueError(
            f"{name} by name needs the tiktoken package: pip install 'tessera-lm[tokenizer]', "
            "or give its rank file"
        ) from None
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the ranks of {name} cannot be downloaded ({type(error).__name__}); give the file "
            f"{name}.tiktoken in place of the name, or set TIKTOKEN_CACHE_DIR to tiktoken's folder"
        ) from error


def _of_ranks(ranks: dict[bytes, int], encoding: Encoding) -> Any:
    """tiktoken's own encoding, with its own pattern and special tokens, from ranks that were read here."""
    import tiktoken

    construct = getattr(import_module("tiktoken_ext.openai_public"), encoding.name, None)
    if construct is None:  # none of tiktoken's: the pattern is all that is known of it
        return tiktoken.Encoding(
            encoding.name,
            pat_str=encoding.pattern,
            mergeable_ranks=ranks,
            special_tokens=dict(encoding.special_tokens),
        )
    return tiktoken.Encoding(**_with(construct, load_tiktoken_bpe=lambda *_, **__: ranks)())


def _of_gpt2_files(vocabulary: Path, merges: Path) -> Any:
    import tiktoken

    public = import_module("tiktoken_ext.openai_public")
    read = _with(
        import_module("tiktoken.load").data_gym_to_mergeable_bpe_ranks,
        read_file_cached=lambda name, *_: Path(name).read_bytes(),
    )
    try:
        ranks = read(str(merges), str(vocabulary))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"{vocabulary} and {merges.name} are not GPT-2's vocabulary and merges to tiktoken"
        ) from error
    # A vocabulary of another size than GPT-2's has its one special token after it all the same.
    own = {"explicit_n_vocab": len(ranks) + 1, "special_tokens": {END_OF_TEXT: len(ranks)}}
    return tiktoken.Encoding(**_with(public.gpt2, data_gym_to_mergeable_bpe_ranks=lambda **_: ranks)() | own)


def _with(function: Callable, **globals_: Any) -> Callable:
    """A function of another library that finds other things under some names, in place of downloads."""
    return types.FunctionType(
        function.__code__, {**function.__globals__, **globals_}, argdefs=function.__defaults__
    )


# ---- SentencePiece ----


def sentencepiece_codec(data: bytes, name: str) -> Codec:
    """A SentencePiece model, run by sentencepiece."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise ValueError(f"{name} is not a SentencePiece model, or not a whole one") from error
    pieces, special = [], {}
    for index in range(len(model)):
        piece = model.id_to_piece(index)
        if model.is_control(index) or model.is_unknown(index):
            special[piece] = index
            pieces.append(b"")
        elif model.is_byte(index):
            pieces.append(bytes([int(piece[1:-1], 16)]))
        else:
            pieces.append(piece.replace("\u2581", " ").encode("utf-8"))
    prefix = model.encode_as_pieces("a")[0].startswith("\u2581")
    return Codec(
        name,
        f"sentencepiece {version('sentencepiece')}",
        lambda texts: model.encode(texts, num_threads=2),
        lambda rows: [model.decode(row) for row in rows],
        TokenBytes(pieces, strips_first_space=prefix),
        special_tokens=special,
        loses_in_decoding=True,
    )

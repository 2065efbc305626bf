"""Tokenizers that exist already: tiktoken's, SentencePiece models, GPT-2's files, Hugging Face's.

What belongs here: telling what a source is, and who reads it. Each tokenizer gives the ids of its origin;
what the chat format needs is appended, or put where the origin has unused ids.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .byte_level import (
    ENCODINGS,
    Encoding,
    backend_from_gpt2_files,
    backend_from_ranks,
    find_encoding,
    identify_ranks,
    read_ranks,
)
from .chat import END_OF_TEXT, add_chat
from .save import check_output, save_tokenizer, wrap
from .sentencepiece_models import sentencepiece_tokenizer

# vocabulary and merges, by the names that OpenAI and Hugging Face give them
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def import_tokenizer(
    source: str | Path,
    *,
    encoding: str | None = None,
    chat: bool = True,
    output: str | Path | None = None,
) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of one that exists.

    Args:
        source: `o200k_base`, `cl100k_base` or `gpt2`, whose ranks come through tiktoken (downloaded, or from
            TIKTOKEN_CACHE_DIR); a tiktoken rank file; a SentencePiece BPE model; a folder with encoder.json
            and vocab.bpe, with tokenizer.json or with tokenizer.model; or the name of a tokenizer on the Hub.
        encoding: which encoding a rank file is of, where neither its hash nor its name tells.
        chat: give it the tokens and the template of the chat format, unless it has a template.
        output: directory to save it in; None for nowhere.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if there is no such source, its file is damaged or of a kind that cannot be imported, or
            something is at `output` already.
    """
    if output is not None:
        check_output(output)
    path = Path(source)
    files: dict[str, bytes] = {}
    if path.is_file() and path.name != "tokenizer.json":
        tokenizer, meta, files = _from_file(path, encoding, chat)
    elif encoding is not None:
        raise ValueError(f"the encoding is said of a rank file only, and {source} is none")
    elif path.exists():
        tokenizer, meta, files = _from_folder(path if path.is_dir() else path.parent, chat)
    elif known := find_encoding(str(source)):
        tokenizer, meta = _from_ranks(_download_ranks(known), known, chat), {"type": "tiktoken"}
    else:
        tokenizer, meta = _from_hub(str(source)), {"type": "huggingface"}
    if chat:
        add_chat(tokenizer)
    if output is not None:
        # A path on this machine says nothing to others.
        name = path.name if path.exists() else str(source)
        save_tokenizer(tokenizer, output, {"source": name, **meta}, files)
    return tokenizer


_Imported = tuple[PreTrainedTokenizerFast, dict[str, Any], dict[str, bytes]]


def _from_file(path: Path, encoding: str | None, chat: bool) -> _Imported:
    data = path.read_bytes()
    meta = {"source_sha256": hashlib.sha256(data).hexdigest()}
    # the first line tells: base64, space, number
    if path.suffix == ".tiktoken" or encoding or re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
        ranks = read_ranks(data, str(path))
        known = identify_ranks(path, data, encoding)
        return _from_ranks(ranks, known, chat), {"type": "tiktoken", "encoding": known.name, **meta}, {}
    if path.suffix in (".json", ".bpe", ".txt"):
        raise ValueError(f"{path} alone is no tokenizer; give the folder that it is in")
    tokenizer = sentencepiece_tokenizer(data, str(path))
    return tokenizer, {"type": "sentencepiece", **meta}, {"tokenizer.model": data}


def _from_folder(folder: Path, chat: bool) -> _Imported:
    if (folder / "tokenizer.json").is_file():
        return _from_hub(str(folder)), {"type": "huggingface"}, {}
    for names in _GPT2_FILES:
        vocabulary, merges = (folder / name for name in names)
        if vocabulary.is_file() and merges.is_file():
            backend = backend_from_gpt2_files(vocabulary, merges)
            return wrap(backend, eos_token=END_OF_TEXT), {"type": "gpt2"}, {}
    if (folder / "tokenizer.model").is_file():
        return _from_file(folder / "tokenizer.model", None, chat)
    raise ValueError(
        f"{folder} holds no tokenizer: looked for tokenizer.json, encoder.json with vocab.bpe, vocab.json "
        "with merges.txt, and tokenizer.model"
    )


def _from_ranks(ranks: dict[bytes, int], encoding: Encoding, chat: bool) -> PreTrainedTokenizerFast:
    special = list(encoding.special_tokens)
    roles: dict[str, Any] = {"extra_special_tokens": special[1:]} if special[1:] else {}
    return wrap(backend_from_ranks(ranks, encoding, chat=chat), eos_token=END_OF_TEXT, **roles)


def _download_ranks(encoding: Encoding) -> dict[bytes, int]:
    try:
        import tiktoken
    except ImportError:
        raise ValueError(
            f"{encoding.name} by name needs the tiktoken package: pip install 'tessera-lm[tokenizer]', "
            "or give its rank file"
        ) from None
    try:
        return tiktoken.get_encoding(encoding.name)._mergeable_ranks
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the ranks of {encoding.name} cannot be downloaded ({type(error).__name__}); give the file "
            f"{encoding.name}.tiktoken in place of the name, or set TIKTOKEN_CACHE_DIR to tiktoken's folder"
        ) from error


def _from_hub(source: str) -> PreTrainedTokenizerFast:
    """What AutoTokenizer loads from a directory or the Hub."""
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(
            f"{source} is no file or directory, no encoding (known are gpt2, {', '.join(ENCODINGS)}), and no "
            "tokenizer on the Hub, whose name is written org/name"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        if Path(source).exists():
            raise ValueError(f"the tokenizer.json in {source} cannot be read: {error}") from error
        raise ValueError(
            f"{source} is no file or directory, and no tokenizer on the Hub that could be loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ValueError(
            f"{source} is a {type(loaded).__name__}, not of the tokenizers library: it cannot be imported"
        )
    for name in ("is_local", "local_files_only", "name_or_path"):
        loaded.init_kwargs.pop(name, None)  # how it was loaded here, which would be saved with it
    return loaded

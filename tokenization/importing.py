"""Tokenizers that exist already: tiktoken's, SentencePiece models, GPT-2's files, Hugging Face's.

What belongs here: telling what a source is, and who reads it. Each tokenizer gives the ids of its origin;
what the chat format needs is appended, or put where the origin has unused ids.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .byte_level import (
    Encoding,
    backend_from_gpt2_files,
    backend_from_ranks,
    find_encoding,
    identify_ranks,
    read_ranks,
)
from .chat import END_OF_TEXT, add_chat
from .locate import Located, load_huggingface, locate
from .reference_codecs import download_ranks, original_codec
from .save import check_output, save_tokenizer, wrap
from .sentencepiece_models import sentencepiece_tokenizer


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
    located = locate(source, encoding)
    tokenizer, meta, files = _read(located, encoding, chat)
    if chat:
        add_chat(tokenizer)
    if output is not None:
        # A path on this machine says nothing to others.
        name = Path(source).name if Path(source).exists() else str(source)
        original = original_codec(located, encoding)
        save_tokenizer(tokenizer, output, {"source": name, **meta}, files, original=original)
    return tokenizer


def _read(
    located: Located, encoding: str | None, chat: bool
) -> tuple[PreTrainedTokenizerFast, dict[str, Any], dict[str, bytes]]:
    """The tokenizer, what to tell of it, and the files to keep beside it."""
    meta: dict[str, Any] = {"type": located.kind}
    if located.kind == "huggingface":
        return load_huggingface(located.name), meta, {}
    if located.kind == "gpt2":
        return wrap(backend_from_gpt2_files(*located.paths), eos_token=END_OF_TEXT), meta, {}
    if located.kind == "encoding":
        known = find_encoding(located.name)
        return _from_ranks(download_ranks(known.name), known, chat), {"type": "tiktoken"}, {}
    (path,) = located.paths
    data = path.read_bytes()
    meta["source_sha256"] = hashlib.sha256(data).hexdigest()
    if located.kind == "sentencepiece":
        return sentencepiece_tokenizer(data, str(path)), meta, {"tokenizer.model": data}
    ranks = read_ranks(data, str(path))
    known = identify_ranks(path, data, encoding)
    return _from_ranks(ranks, known, chat), meta | {"encoding": known.name}, {}


def _from_ranks(ranks: dict[bytes, int], encoding: Encoding, chat: bool) -> PreTrainedTokenizerFast:
    special = list(encoding.special_tokens)
    roles: dict[str, Any] = {"extra_special_tokens": special[1:]} if special[1:] else {}
    return wrap(backend_from_ranks(ranks, encoding, chat=chat), eos_token=END_OF_TEXT, **roles)

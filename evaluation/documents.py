"""What a model is measured on: held-out documents as tokens, from text or from a prepared folder.

What belongs here: from what a user named to documents and to the stream that they make, in the tokens of the
model that is measured.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from tessera.data.sources import read_texts
from tessera.data.text import Tokens
from tessera.data.token_files import PreparedData, is_prepared, open_prepared, read_starts


@dataclass(frozen=True)
class Document:
    """A document: its tokens [N], without the separator after it, and the words and bytes of its text."""

    ids: np.ndarray
    words: int
    num_bytes: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out text: its documents, and the one stream that training would make of them."""

    documents: list[Document]
    stream: Tokens


def read_held_out(path: str, tokenizer, **where: str | None) -> HeldOut:
    """Reads text, or the held-out part of a prepared folder.

    Args:
        path: file, folder, Hub dataset, or prepared folder.
        tokenizer: of the model.
        where: column, split and configuration of tables, as for `read_texts`.

    Raises:
        ValueError: if there is nothing to read, or a folder was prepared with another tokenizer.
    """
    if is_prepared(path):
        return _open_val(path, tokenizer)
    texts = list(read_texts([path], **where))
    documents = [
        Document(ids, *_count(text)) for ids, text in zip(_encode(tokenizer, texts), texts, strict=True)
    ]
    separator = _separator(tokenizer)
    parts = [part for document in documents for part in (document.ids, separator)]
    # End-of-text also ends the last document; a line break only stands between two.
    ids = np.concatenate(parts if tokenizer.eos_token_id is not None else parts[:-1])
    num_bytes = sum(document.num_bytes for document in documents) + len(documents) - 1
    return HeldOut(documents, Tokens(ids, num_bytes))


def start_token(tokenizer) -> int:
    """The token that stands before a document: its bos, its eos, or else the line break that stands between
    documents of bytes. The model sees it, nobody asks the model for it."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return int(_separator(tokenizer)[-1])


def _separator(tokenizer) -> np.ndarray:
    if tokenizer.eos_token_id is not None:
        return np.array([tokenizer.eos_token_id], dtype=np.int64)
    return _encode(tokenizer, ["\n"])[0]


def _encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    # Text that spells a control token is text.
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [np.asarray(row, dtype=np.int64) for row in rows]


def _count(text: str) -> tuple[int, int]:
    # Words as lm-evaluation-harness counts them, which at a border of white space is one too many.
    return len(re.split(r"\s+", text)), len(text.encode("utf-8"))


def _open_val(path: str, tokenizer) -> HeldOut:
    prepared = open_prepared(path)
    _require_same_tokenizer(path, prepared, tokenizer)
    ids, separator = prepared.val.ids, _separator(tokenizer)
    if (Path(path) / "val.idx").is_file():
        starts = np.asarray(read_starts(path, "val"))
    else:
        ends = np.flatnonzero(ids == separator[-1]) if tokenizer.eos_token_id is not None else []
        starts = np.unique([0, *(np.asarray(ends) + 1), len(ids)])
    documents = []
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        row = np.asarray(ids[begin:end], dtype=np.int64)
        separated = tokenizer.eos_token_id is not None or end < len(ids)
        if separated and np.array_equal(row[-len(separator) :], separator):
            row = row[: -len(separator)]
        if len(row):
            text = tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False)
            documents.append(Document(row, *_count(text)))
    return HeldOut(documents, prepared.val)


def _require_same_tokenizer(path: str, prepared: PreparedData, tokenizer) -> None:
    if prepared.tokenizer is not None:
        theirs = AutoTokenizer.from_pretrained(prepared.tokenizer)
        same = theirs.get_vocab() == tokenizer.get_vocab() and theirs.eos_token_id == tokenizer.eos_token_id
    else:
        same = np.array_equal(_encode(tokenizer, ["\n~"])[0], [ord("\n"), ord("~")])
    if not same:
        raise ValueError(
            f"{path} was prepared with another tokenizer than the model's; give the text itself, or prepare "
            "it with the tokenizer of the model"
        )

"""A tokenizer on disk: a directory that plain `AutoTokenizer` loads, and `tokenizer_meta.json` beside it.

What belongs here: how a tokenizer is wrapped and written. It is written aside, loaded again with
`AutoTokenizer`, compared, and only then renamed into place, so that what has the name is whole and right.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

META_FILE = "tokenizer_meta.json"

# What the loaded tokenizer must encode and decode as the one in memory does.
_PROBES = (
    "The quick brown fox, it's 12345 o'clock.\n\n  Indented\tline\r\n",
    "  naïve Straße — 東京 🙂 e\u0301 \x00\u2028\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "",
)


def wrap(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a backend.

    Args:
        backend: of the `tokenizers` library.
        **roles: special tokens, such as `eos_token`.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        # the default of transformers 5, written into the file for readers whose default has token_type_ids
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )


def check_output(folder: str | Path) -> Path:
    """The directory to write, if it can be: call this before hours of work.

    Raises:
        ValueError: if something is there already.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty directory; remove it or give another")
    return folder


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    meta: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes the directory of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        folder: a directory that does not exist yet, or is empty.
        meta: what to tell of its origin, such as `type` and `source`; JSON. Size, ids and hash are added.
        files: further files by name, such as the SentencePiece model.

    Returns:
        The directory.

    Raises:
        ValueError: if something is there already, or `AutoTokenizer` makes something else of the directory.
    """
    folder = check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        tokenizer.save_pretrained(aside)
        for name, data in (files or {}).items():
            (aside / name).write_bytes(data)
        text = json.dumps(_describe(tokenizer, aside) | dict(meta or {}), indent=2, ensure_ascii=False)
        (aside / META_FILE).write_text(text + "\n", encoding="utf-8")
        _require_equal(tokenizer, AutoTokenizer.from_pretrained(aside))
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _describe(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    special = {
        token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return {
        "vocab_size": len(tokenizer),
        "special_tokens": dict(sorted(special.items(), key=lambda item: item[1])),
        "sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    } | tokenizer.special_tokens_map


def _require_equal(tokenizer: PreTrainedTokenizerBase, loaded: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both have the same vocabulary and make the same of the probes."""
    same = tokenizer.get_vocab() == loaded.get_vocab()
    for text in _PROBES if same else ():
        for split in (False, True):
            ids = tokenizer(text, split_special_tokens=split)["input_ids"]
            same &= ids == loaded(text, split_special_tokens=split)["input_ids"]
            same &= tokenizer.decode(ids) == loaded.decode(ids)
    if not same:
        raise ValueError(
            "the tokenizer is not the same after saving and loading with AutoTokenizer; nothing was written"
        )

"""A tokenizer on disk: a directory that plain `AutoTokenizer` loads, and `tokenizer_meta.json` beside it.

What belongs here: how a tokenizer is wrapped and written. It is written aside, loaded again with
`AutoTokenizer`, compared, and only then renamed into place, so that what has the name is whole and right.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .reference_codecs import Codec, huggingface_codec, sentencepiece_codec
from .verify import require_same

META_FILE = "tokenizer_meta.json"
MODEL_FILE = "tokenizer.model"

# Text with special tokens, which must be found in it after loading as before.
_SPECIAL_PROBES = (
    "The quick brown fox, it's 12345 o'clock.\n\n  Indented\tline\r\n",
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
    original: Codec | None = None,
) -> Path:
    """Writes the directory of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        folder: a directory that does not exist yet, or is empty.
        meta: what to tell of its origin, such as `type` and `source`; JSON. Size, ids and hash are added.
        files: further files by name, such as the SentencePiece model.
        original: what the tokenizer was made from, run by its own library: what is written must encode and
            decode as it does, on the texts of `probes`. If not given, a `tokenizer.model` among the files is.

    Returns:
        The directory.

    Raises:
        ValueError: if something is there already, or `AutoTokenizer` makes something else of the directory
            than the tokenizer or the original is.
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
        if original is None and MODEL_FILE in (files or {}) and find_spec("sentencepiece"):
            original = sentencepiece_codec(files[MODEL_FILE], MODEL_FILE)
        loaded = AutoTokenizer.from_pretrained(aside)
        described = _describe(tokenizer, aside) | dict(meta or {}) | _verify(tokenizer, loaded, original)
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (aside / META_FILE).write_text(text + "\n", encoding="utf-8")
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


def _verify(
    tokenizer: PreTrainedTokenizerBase, loaded: PreTrainedTokenizerBase, original: Codec | None
) -> dict[str, Any]:
    """What to tell of the comparison with the original; raises ValueError where anything is not the same."""
    written = huggingface_codec(loaded, "what AutoTokenizer loads")
    if tokenizer.get_vocab() != loaded.get_vocab():
        raise ValueError(
            "the tokenizer is not the same after saving and loading with AutoTokenizer: its vocabulary "
            "differs; nothing was written"
        )
    require_same(huggingface_codec(tokenizer, "the tokenizer in memory"), written, written.name)
    for text in _SPECIAL_PROBES:
        if tokenizer(text)["input_ids"] != loaded(text)["input_ids"]:
            raise ValueError(
                "the tokenizer is not the same after saving and loading with AutoTokenizer: "
                f"{text!r} becomes other ids; nothing was written"
            )
    if original is None:
        return {}
    same = require_same(original, written, written.name)
    return {"verified": {"against": original.library, "documents": same.documents, "bytes": same.num_bytes}}

"""Token ids on disk: `train.bin`, `val.bin` and what is known of them.

What belongs here: the format, and reading it with every check that saves a training run from wrong data
(`data/token_writer.py` writes it). A prepared folder holds

- `train.bin`, `val.bin`: token ids one after the other, little-endian uint8, uint16 or uint32, whichever is
  the smallest that holds the vocabulary;
- `train.idx`, `val.idx`: where each document starts, in tokens, and the end: little-endian uint64. A document
  includes the separator after it;
- `data_meta.json`: type, counts, sha256 of each file, tokenizer, sources and filters (`data/prepare.py`);
- `tokenizer/`: what `AutoTokenizer` loads.

Folders that others have tokenized need less: both `.bin`, a `data_meta.json` that may be nearly empty, and
`tokenizer/` with a `tokenizer.json` or a SentencePiece model.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .hashing import file_sha256
from .text import Tokens

FORMAT = 1
META = "data_meta.json"
SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")  # of a split
# Names that in a folder of somebody else's mean something else.
OUR_NOTES = ("sha256", "tokenizer_sha256", "sources", "filters")
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, opened.

    Attributes:
        train: tokens to train on; `ids` is a memory map. Where the folder does not say how many bytes they
            stand for, `num_bytes` is estimated by the rate of `val`.
        val: held-out tokens.
        meta: `data_meta.json`, with the counts that it lacks.
        tokenizer: directory that `AutoTokenizer` loads; None for bytes.
    """

    train: Tokens
    val: Tokens
    meta: dict
    tokenizer: Path | None


def smallest_dtype(vocab_size: int) -> str:
    """Name of the smallest type that holds every id of a vocabulary."""
    return next(name for name, code in DTYPES.items() if vocab_size <= np.iinfo(np.dtype(code)).max + 1)


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a folder of tokens, whole or not, rather than one of text."""
    path = Path(path)
    return path.is_dir() and ((path / META).is_file() or (path / "train.bin").is_file())


def open_prepared(folder: str | Path, *, verify: bool = False) -> PreparedData:
    """Opens a folder of tokens as memory maps.

    Args:
        folder: what `tessera data prepare` or `tessera data download` wrote, or the like.
        verify: read everything: hash each file, and look at every id instead of a sample.

    Raises:
        ValueError: if files are missing, cut short, of unknown type or not those that were written; if ids
            are beyond the vocabulary.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    ids = {split: _map_ids(folder, split, meta) for split in SPLITS}
    if verify:
        _verify_hashes(folder, meta)
    for split in SPLITS:
        _check_ids(folder / f"{split}.bin", ids[split], meta.get("vocab_size"), whole=verify)
    tokenizer = _find_tokenizer(folder)
    _check_tokenizer(folder, tokenizer, meta)
    val_bytes = meta.get("val", {}).get("bytes")
    if val_bytes is None:
        val_bytes = _count_bytes(ids["val"], tokenizer, meta, folder)
    train_bytes = meta.get("train", {}).get("bytes")
    if train_bytes is None:
        train_bytes = round(len(ids["train"]) * val_bytes / len(ids["val"]))
    for split, num_bytes in (("train", train_bytes), ("val", val_bytes)):
        meta[split] = {**meta[split], "tokens": len(ids[split]), "bytes": num_bytes}
    return PreparedData(Tokens(ids["train"], train_bytes), Tokens(ids["val"], val_bytes), meta, tokenizer)


def decode_start(data: PreparedData, split: str, characters: int) -> str:
    """The beginning of a split as text, control tokens and all."""
    # No tokenizer has fewer than a quarter of a character a token for long.
    ids = getattr(data, split).ids[: 4 * characters]
    if data.tokenizer is None:
        return ids.tobytes().decode("utf-8", errors="replace")[:characters]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data.tokenizer).decode(ids.tolist())[:characters]


def _read_meta(folder: Path) -> dict:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; write it with tessera data prepare")
    if not (folder / META).is_file():
        raise ValueError(f"{folder} has no {META}: it is no prepared data, or not all of it is there")
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / META} is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{folder / META} holds a {type(meta).__name__}, expected an object")
    if isinstance(meta.get("format"), int) and meta["format"] > FORMAT:
        raise ValueError(
            f"{folder} is in format {meta['format']}, this version reads up to {FORMAT}: update tessera-lm"
        )
    # Others write "<u2" or "numpy.uint16" for the same.
    given = str(meta.get("dtype", "uint16"))
    names = {code: name for name, code in DTYPES.items()}
    dtype = names.get(given, given.removeprefix("numpy.").removeprefix("np."))
    if dtype not in DTYPES:
        raise ValueError(f"{folder / META} names the type {given!r}, expected one of {', '.join(DTYPES)}")
    # Other packages have a split's name for a number, and their own account of sources and filters.
    of_others = () if isinstance(meta.get("format"), int) else OUR_NOTES
    meta = {name: value for name, value in meta.items() if name not in of_others}
    counts = {split: meta[split] if isinstance(meta.get(split), dict) else {} for split in SPLITS}
    numbers = {f"{split}.{name}": counts[split].get(name) for split in SPLITS for name in COUNTS}
    for name, value in {**numbers, "vocab_size": meta.get("vocab_size")}.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{folder / META} says that {name} is {value!r}, expected a number")
    return {**meta, **counts, "dtype": dtype}


def _map_ids(folder: Path, split: str, meta: dict) -> np.ndarray:
    path = folder / f"{split}.bin"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}")
    dtype = np.dtype(DTYPES[meta["dtype"]])
    size = path.stat().st_size
    counts = meta[split]
    tokens = counts.get("tokens", size // dtype.itemsize)
    if size != tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, but {tokens} tokens of {meta['dtype']} are {tokens * dtype.itemsize}: "
            "it is cut short or not the file that was written"
        )
    if tokens < 2:
        raise ValueError(f"{path} holds {tokens} tokens, too few to learn or to score anything")
    idx = folder / f"{split}.idx"
    if idx.is_file():
        starts = read_starts(folder, split)
        documents = counts.get("documents", len(starts) - 1)
        if len(starts) != documents + 1 or starts[0] != 0 or starts[-1] != tokens:
            raise ValueError(
                f"{idx} does not fit {path.name}: it is cut short or not the file that was written"
            )
    elif "documents" in counts:
        raise ValueError(f"{folder} has no {idx.name}")
    return np.memmap(path, dtype=dtype, mode="r")


def read_starts(folder: str | Path, split: str) -> np.ndarray:
    """Where the documents of a split start, in tokens, and the end: a memory map [documents + 1], uint64.

    Raises:
        ValueError: if the file is missing or not whole numbers of 8 bytes.
    """
    path = Path(folder) / f"{split}.idx"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}")
    if path.stat().st_size % 8 or not path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected a multiple of 8: it is cut short")
    return np.memmap(path, dtype="<u8", mode="r")


def _verify_hashes(folder: Path, meta: dict) -> None:
    for name, expected in (meta.get("sha256") or {}).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
        if (found := file_sha256(folder / name)) != expected:
            raise ValueError(f"{folder / name} is damaged: its sha256 is {found}, {META} says {expected}")


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int | None, whole: bool) -> None:
    if vocab_size is None:
        return
    block = 2**12 if not whole else 2**22
    # Of a large file 256 places, evenly spread.
    step = block if whole else max(len(ids) // 256, block)
    for start in range(0, len(ids), step):
        if (found := int(ids[start : start + block].max())) >= vocab_size:
            raise ValueError(
                f"{path} holds the id {found}, beyond the vocabulary of {vocab_size}: "
                "another tokenizer wrote it, or its type is not the one that is named"
            )


def _check_tokenizer(folder: Path, tokenizer: Path | None, meta: dict) -> None:
    """Whether it is the one that the tokens were made with, as far as that was written down."""
    expected = meta.get("tokenizer_sha256")
    if expected is None:
        return
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer/, so that nobody knows what its ids mean")
    if file_sha256(tokenizer / "tokenizer.json") != expected:
        raise ValueError(
            f"{tokenizer / 'tokenizer.json'} is not the tokenizer that the tokens of {folder} were made with"
        )


def _find_tokenizer(folder: Path) -> Path | None:
    """The directory of the tokenizer; a SentencePiece model alone is converted beside it, once."""
    given = folder / "tokenizer"
    if (given / "tokenizer.json").is_file() or not given.is_dir():
        return given if given.is_dir() else None
    models = sorted(given.glob("*.model"))
    if not models:
        raise ValueError(f"{given} holds neither tokenizer.json nor a SentencePiece model")
    converted = folder / "tokenizer-converted"
    if not (converted / "tokenizer.json").is_file():
        from tessera.tokenization import import_tokenizer

        # Several processes of one run, on several machines, may get here at once: each has its own name, the
        # first to end wins.
        naming = {"prefix": ".tokenizer-", "suffix": ".partial", "dir": folder}
        with tempfile.TemporaryDirectory(**naming, ignore_cleanup_errors=True) as scratch:
            # One below it, as a temporary folder itself is closed to other users.
            aside = Path(scratch) / "tokenizer"
            # Without chat tokens, which would be ids that the tokens were not made with.
            import_tokenizer(str(models[0]), chat=False).save_pretrained(aside)
            try:
                aside.rename(converted)
            except OSError:
                if not (converted / "tokenizer.json").is_file():
                    raise
    return converted


def _count_bytes(ids: np.ndarray, tokenizer: Path | None, meta: dict, folder: Path) -> int:
    """Bytes of the text that ids stand for, by decoding them document by document."""
    if tokenizer is None:
        if meta["dtype"] == "uint8":
            return len(ids)
        raise ValueError(f"{folder} has no tokenizer/, so that nobody knows what its ids mean")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ends = np.flatnonzero(np.isin(ids, [loaded.eos_token_id])) if loaded.eos_token_id is not None else []
    total = documents = start = 0
    for end in [*map(int, ends), len(ids)]:
        if end > start:
            text = loaded.decode(ids[start:end].tolist(), skip_special_tokens=True)
            total += len(text.encode("utf-8"))
            documents += 1
        start = end + 1
    return total + max(documents - 1, 0)

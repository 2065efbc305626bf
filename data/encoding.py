"""Text to ids, in several processes: what a corpus is encoded with.

What belongs here: loading a tokenizer for that purpose, encoding a batch of texts with filters before it, and
the pool of processes. The work depends on the batch alone, so that any number of processes gives the same
ids.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from .filters import Dropped, Filters
from .hub_errors import TOKENIZER_FILES, why_missing
from .token_files import smallest_dtype
from .word_encoding import WordEncoder, known_pattern


@dataclass(frozen=True)
class Encoder:
    """How texts become ids; small, as it goes to every process with every batch.

    Attributes:
        backend: file of the tokenizer's backend; None for bytes, where a byte is its id.
        filters: what comes before.
        vocab_size: of the tokenizer, with its special tokens.
        separator: ids between documents.
        eos: end-of-text token, which then is the separator and also follows the last document.
        pattern: where the ids can be found faster than by the backend, what it splits text by
            (`word_encoding.known_pattern`).
    """

    backend: str | None
    filters: Filters
    vocab_size: int
    separator: tuple[int, ...]
    eos: int | None
    pattern: str | None = None

    @property
    def dtype(self) -> str:
        """Smallest type for the ids."""
        return smallest_dtype(self.vocab_size)

    def encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of UTF-8 texts, one after the other, and how many each has. Spelled control tokens are text."""
        dtype = np.dtype(self.dtype)
        if self.backend is None:
            ids = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(dtype)
            return ids, np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        if self.pattern is not None:
            return _load_words(self.backend, self.pattern, self.dtype).encode(texts)
        backend = _load_backend(self.backend)
        encodings = backend.encode_batch_fast(
            [str(text, "utf-8") for text in texts], add_special_tokens=False
        )
        parts = [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate([np.zeros(0, dtype), *parts]), lengths

    def work(self, texts: list[str]) -> "EncodedBatch":
        """Filters and encodes a batch."""
        examined = [self.filters.examine(text) for text in texts]
        batch = self.encode_batch([one.text for one in examined], [one.dropped for one in examined])
        numbered = list(enumerate(zip(texts, examined, strict=True)))
        return replace(
            batch,
            changed={i: one.text for i, (text, one) in numbered if one.text != text and not one.dropped},
            lines={i: dict(one.lines) for i, (_, one) in numbered if one.lines},
            signatures={i: one.signature for i, (_, one) in numbered if one.signature is not None},
        )

    def encode_batch(self, texts: list[str], dropped: list[Dropped | None] | None = None) -> "EncodedBatch":
        """Encodes a batch, but what is to be dropped."""
        dropped = dropped or [None] * len(texts)
        encoded = [text.encode("utf-8") for text in texts]
        kept = np.array([one is None for one in dropped], dtype=bool)
        lengths = np.zeros(len(texts), dtype=np.int64)
        ids, lengths[kept] = self.encode([encoded[i] for i in np.flatnonzero(kept)])
        if self.separator:
            ids = self._separate(ids, lengths[kept])
            lengths[kept] += len(self.separator)
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        digests = b"".join(hashlib.sha256(text).digest() for text in encoded)
        return EncodedBatch(dropped, sizes, digests, ids, np.cumsum(lengths))

    def _separate(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The separator behind each text."""
        size = len(self.separator)
        first = np.cumsum(lengths + size) - size
        separated = np.empty(len(ids) + size * len(lengths), dtype=ids.dtype)
        of_text = np.ones(len(separated), dtype=bool)
        for i, id in enumerate(self.separator):
            separated[first + i] = id
            of_text[first + i] = False
        separated[of_text] = ids
        return separated


@dataclass(frozen=True)
class EncodedBatch:
    """What became of some texts.

    Attributes:
        dropped: for each text why it is to go, or None.
        num_bytes: UTF-8 bytes of what the filters left of each text [texts].
        digests: sha256 of that, one after the other.
        ids: of the texts that no filter dropped, each followed by the separator [N].
        ends: where in `ids` each text ends, dropped ones having none [texts].
        changed: what the filters left of a text, where that is something else.
        lines: of texts that lost some, how many lines each rule took out.
        signatures: what near duplicates are found by, if anyone asked.
    """

    dropped: list[Dropped | None]
    num_bytes: np.ndarray
    digests: bytes
    ids: np.ndarray
    ends: np.ndarray
    changed: dict[int, str] = field(default_factory=dict)
    lines: dict[int, dict[str, int]] = field(default_factory=dict)
    signatures: dict[int, np.ndarray] = field(default_factory=dict)

    def lengths_of(self, chosen: np.ndarray) -> np.ndarray:
        """Ids of some texts, with their separators."""
        return np.diff(self.ends, prepend=0)[chosen]

    def select(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of some texts, which are given in their order, and where each of them ends."""
        lengths = np.diff(self.ends, prepend=0)
        ids, ends = self.ids, np.cumsum(lengths[chosen])
        if ends[-1] < len(ids):
            is_chosen = np.zeros(len(lengths), dtype=bool)
            is_chosen[chosen] = True
            ids = ids[np.repeat(is_chosen, lengths)]
        return ids, ends

    def digest(self, i: int) -> bytes:
        """sha256 of a text."""
        return self.digests[32 * i : 32 * (i + 1)]

    @property
    def draws(self) -> np.ndarray:
        """A number in [0, 1) for each text, which depends on it alone and draws its split (data/text.py)."""
        return np.frombuffer(self.digests, dtype="<u8")[::4].astype(np.float64) / 2**64


@lru_cache(maxsize=2)
def _load_backend(path: str):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


@lru_cache(maxsize=2)
def _load_words(path: str, pattern: str, dtype: str) -> WordEncoder:
    return WordEncoder(_load_backend(path), pattern, dtype)


def build_encoder(folder: Path | None, filters: Filters, scratch: Path) -> Encoder:
    """The encoder of a tokenizer.

    Args:
        folder: directory that `AutoTokenizer` loads; None for bytes, with a line break between documents.
        filters: what comes before.
        scratch: folder for a file that the processes read.

    Raises:
        ValueError: if there is no tokenizer that can be loaded.
    """
    if folder is None:
        return Encoder(None, filters, 256, (ord("\n"),), None)
    tokenizer = load_tokenizer(str(folder))
    # What transformers made of the files, which for some classes is not what they say.
    backend = tokenizer.backend_tokenizer.to_str()
    path = scratch / "backend.json"
    path.write_text(backend, encoding="utf-8")
    vocab_size = max(len(tokenizer), *(id + 1 for id in tokenizer.get_vocab().values()))
    eos = tokenizer.eos_token_id
    encoder = Encoder(str(path), filters, vocab_size, () if eos is None else (eos,), eos)
    if eos is None:
        encoder = replace(encoder, separator=tuple(encoder.encode([b"\n"])[0].tolist()))
    if _is_bytes(folder, backend):
        return replace(encoder, backend=None)
    return replace(encoder, pattern=known_pattern(backend))


def load_tokenizer(given: str):
    """A fast tokenizer from a directory or the Hub.

    Raises:
        ValueError: if it cannot be loaded, or is none of the fast ones.
    """
    from transformers import AutoTokenizer

    if "/" not in given.strip("/") and not Path(given).exists():
        raise ValueError(f"there is no tokenizer directory {given}; make one with tessera tokenizer")
    if reason := why_missing(given, TOKENIZER_FILES):
        raise ValueError(f"tokenizer {given} cannot be loaded: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(given)
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        reason = str(error).splitlines()[0]
        if Path(given).is_dir():
            reason = "that directory holds no tokenizer that transformers can read"
        raise ValueError(f"tokenizer {given} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {given} has no tokenizer.json; convert it with tessera tokenizer import")
    return tokenizer


def _is_bytes(folder: Path, backend: str) -> bool:
    """Whether ids are bytes, which the backend takes a second and 100 MB for each megabyte to find."""
    if json.loads(backend)["model"].get("merges") != []:
        return False
    from tessera.tokenization import ByteTokenizer

    try:
        ByteTokenizer.from_pretrained(folder)
    except ValueError:
        return False
    return True


class EncodingPool:
    """Encodes batches in processes of its own, or with one worker in this process.

    Args:
        encoder: what each does.
        workers: processes.
    """

    def __init__(self, encoder: Encoder, workers: int):
        self._encoder = encoder
        self._pool = None
        if workers > 1:
            # Started anew instead of forked: a copy of a process that has threads (of Arrow, of the Hub's
            # client) may wait forever for a lock that no thread of its own will open.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> "EncodingPool":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, texts: list[str]) -> Callable[[], EncodedBatch]:
        """Begins a batch; what it returns waits for the result."""
        if self._pool is None:
            return lambda: self._encoder.work(texts)
        return partial(_result, self._pool.submit(self._encoder.work, texts))


def _result(future: Future) -> EncodedBatch:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that encodes has died, perhaps for want of memory; try with fewer --workers"
        ) from error


def _start_worker() -> None:
    """Ctrl-C is the parent's affair; without a parent there is nothing left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread each: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

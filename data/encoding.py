"""Text to ids, in several processes: what a corpus is encoded with.

What belongs here: loading a tokenizer for that purpose, encoding a batch of texts with filters before it, and
the pool of processes. The work depends on the batch alone, so that any number of processes gives the same
ids.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from .deduplication import fingerprint
from .filters import Dropped, Filters
from .token_files import smallest_dtype


@dataclass(frozen=True)
class Encoder:
    """How texts become ids; small, as it goes to every process with every batch.

    Attributes:
        backend: file of the tokenizer's backend; None for bytes, where a byte is its id.
        filters: what comes before.
        vocab_size: of the tokenizer, with its special tokens.
        separator: ids between documents.
        eos: end-of-text token, which then is the separator and also follows the last document.
    """

    backend: str | None
    filters: Filters
    vocab_size: int
    separator: tuple[int, ...]
    eos: int | None

    @property
    def dtype(self) -> str:
        """Smallest type for the ids."""
        return smallest_dtype(self.vocab_size)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, without separators. Text that spells a control token is text."""
        dtype = np.dtype(self.dtype)
        if self.backend is None:
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(dtype) for text in texts]
        encodings = _load_backend(self.backend).encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def work(self, texts: list[str]) -> list["Encoded"]:
        """Filters and encodes a batch."""
        examined = [self.filters.examine(text) for text in texts]
        kept = iter(self.encode([one.text for one in examined if not one.dropped]))
        return [
            Encoded(
                one.dropped,
                None if one.dropped else next(kept),
                len(one.text.encode("utf-8")),
                fingerprint(one.text),
                None if one.dropped or one.text == text else one.text,
                dict(one.lines),
                one.signature,
            )
            for text, one in zip(texts, examined, strict=True)
        ]


@dataclass(frozen=True)
class Encoded:
    """What became of a text: ids, or the filter that dropped it.

    Attributes:
        dropped: why it is to go.
        ids: its tokens, if it stays.
        num_bytes, digest: of what the filters left of it.
        changed: what they left of it, where that is something else.
        lines: how many lines each rule took out.
        signature: what near duplicates are found by, if anyone asked.
    """

    dropped: Dropped | None
    ids: np.ndarray | None
    num_bytes: int
    digest: bytes
    changed: str | None = None
    lines: dict[str, int] = field(default_factory=dict)
    signature: np.ndarray | None = None

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the text alone and draws its split, as in data/text.py."""
        return int.from_bytes(self.digest[:8], "little") / 2**64


@lru_cache(maxsize=2)
def _load_backend(path: str):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


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
        encoder = Encoder(str(path), filters, vocab_size, tuple(map(int, encoder.encode(["\n"])[0])), None)
    if _is_bytes(folder, backend):
        encoder = Encoder(None, filters, vocab_size, encoder.separator, eos)
    return encoder


def load_tokenizer(given: str):
    """A fast tokenizer from a directory or the Hub.

    Raises:
        ValueError: if it cannot be loaded, or is none of the fast ones.
    """
    from transformers import AutoTokenizer

    if "/" not in given.strip("/") and not Path(given).exists():
        raise ValueError(f"there is no tokenizer directory {given}; make one with tessera tokenizer")
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

    def submit(self, texts: list[str]) -> Callable[[], list[Encoded]]:
        """Begins a batch; what it returns waits for the result."""
        if self._pool is None:
            return lambda: self._encoder.work(texts)
        return partial(_result, self._pool.submit(self._encoder.work, texts))


def _result(future: Future) -> list[Encoded]:
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

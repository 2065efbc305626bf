"""Writes safetensors files of which never more than a tensor is in memory.

Where each tensor goes is known from its shape before any is computed, so several files can be open at once
and their tensors come in any order. A file has another name until it is complete, so nothing loads it. What
belongs here: bytes on their way to disk. Which tensors make a file is said by the caller.
"""

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tessera.data.journal import sync_folder

from .journal import Journal
from .safetensors_format import METADATA, Place, as_bytes, lay_out, read_tensor

# Bytes between two times that files are forced to disk and the journal is told. Rewritten after a kill is
# at most this much; each time costs some milliseconds.
FLUSH_EVERY = 2**28
_UNFINISHED = ".part"
_BLOCK = 4096


class WeightWriter:
    """Writes the files of a checkpoint, tensor by tensor; a context that finishes them when it ends well.

    Args:
        folder: an existing directory.
        files: name of each file -> its tensors, by name; only dtype and shape are looked at.
        journal: of what is written already.
        metadata: what the files say beside their tensors.

    Raises:
        OSError: if there is no room, or a file cannot be written; it may come with a later tensor.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, torch.Tensor]],
        journal: Journal | None = None,
        metadata: Mapping[str, str] = METADATA,
    ):
        self._folder, self._journal, self._metadata = folder, journal, metadata
        self._handles: dict[str, int] = {}
        self._places: dict[str, dict[str, Place]] = {}
        self._missing: dict[str, set[str]] = {}
        self._entries: list[tuple[str, str, int]] = []
        self._unflushed = 0
        # Writing, checksum and forcing to disk go on while the next tensor is read and computed.
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        for file, tensors in files.items():
            self._prepare(file, tensors)

    def __enter__(self) -> "WeightWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._wait()
                missing = {name for names in self._missing.values() for name in names}
                assert not missing, f"never written: {sorted(missing)[:3]}"
                sync_folder(self._folder)
        finally:
            self._worker.shutdown()
            for handle in self._handles.values():
                os.close(handle)

    def is_written(self, file: str, name: str) -> bool:
        """Whether a tensor is in its file already."""
        return name not in self._missing[file]

    def write(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor, if it is not in its file already."""
        if self.is_written(file, name):
            return
        place = self._places[file][name]
        if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
            raise ValueError(
                f"{name} came out as {tuple(tensor.shape)} in {tensor.dtype}, and was announced as "
                f"{place.shape} in {place.dtype}"
            )
        self._missing[file].discard(name)
        self._wait()
        self._pending = self._worker.submit(self._store, file, name, tensor, not self._missing[file])

    def _prepare(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lays a file out and finds what is in it; it is not kept open, as a model may have very many."""
        unfinished = self._folder / (file + _UNFINISHED)
        if (self._folder / file).is_file():
            (self._folder / file).rename(unfinished)
        start, places = lay_out(tensors, unfinished, self._metadata)
        self._places[file], self._missing[file] = places, set(places)
        try:
            handle = self._open(file)
            try:
                known = os.pread(handle, len(start), 0) == start
                if not known:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, start, 0)
            finally:
                os.close(self._handles.pop(file))
        except OSError as error:
            raise self._refused(file, error) from error
        if known and self._journal is not None:
            for name, place in places.items():
                checksum = self._journal.find(file, name)
                if checksum is not None and checksum == _checksum(read_tensor(place, name)):
                    self._missing[file].discard(name)
                    self._journal.bytes_found += place.end - place.begin
                    self._journal.on_bytes(place.end - place.begin)
        if not self._missing[file]:
            self._open(file)
            self._finish(file)

    def _open(self, file: str) -> int:
        """A file's handle: from its first tensor to its last."""
        if file not in self._handles:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._handles[file] = os.open(self._folder / (file + _UNFINISHED), flags, 0o666)
        return self._handles[file]

    def _store(self, file: str, name: str, tensor: torch.Tensor, last: bool) -> None:
        data = as_bytes(tensor)
        try:
            handle = self._open(file)
            view, at = memoryview(data.numpy()), self._places[file][name].begin
            # One write takes two gigabytes at most.
            while view:
                count = os.pwrite(handle, view, at)
                view, at = view[count:], at + count
            _start_writing_back(handle, at - len(data), len(data))
            self._unflushed += len(data)
            if self._journal is not None:
                self._entries.append((file, name, _checksum(data)))
                self._journal.on_bytes(len(data))
            if last or self._unflushed >= FLUSH_EVERY:
                self._flush()
            if last:
                self._finish(file)
        except OSError as error:
            raise self._refused(file, error) from error

    def _flush(self) -> None:
        for handle in self._handles.values():
            os.fsync(handle)
        if self._journal is not None:
            self._journal.add(self._entries)
        self._entries, self._unflushed = [], 0

    def _finish(self, file: str) -> None:
        os.fsync(self._handles[file])
        os.close(self._handles.pop(file))
        (self._folder / (file + _UNFINISHED)).rename(self._folder / file)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _refused(self, file: str, error: OSError) -> OSError:
        if error.strerror is None:  # said already
            return error
        return OSError(f"{self._folder / file} cannot be written: {error.strerror}")


def _start_writing_back(handle: int, begin: int, count: int) -> None:
    """Has the system begin with what would otherwise all be waited for when the file is forced to disk."""
    if hasattr(os, "posix_fadvise"):
        # Linux starts to write pages that cannot be dropped yet, and goes on.
        os.posix_fadvise(handle, begin, count, os.POSIX_FADV_DONTNEED)


def _checksum(data: torch.Tensor) -> int:
    """The CRC of sums over blocks: ten times as fast as that of all bytes, and every flip changes it."""
    data = as_bytes(data).numpy()
    whole = len(data) // _BLOCK * _BLOCK
    sums = data[:whole].view(np.int64).reshape(-1, _BLOCK // 8).sum(axis=1)
    return zlib.crc32(data[whole:], zlib.crc32(sums))

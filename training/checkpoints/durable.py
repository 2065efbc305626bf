"""Files that are there whole after a crash, or not at all: written, hashed while they are written, fsynced.

A rename is atomic, but after a power cut it may have outlived the data it names: so a file is fsynced before
its folder is renamed, and the folders that hold the names after it. What belongs here: bytes and names on a
disk. What is in them is `snapshots.py`, and which of them stay is `policy.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from tessera.conversion.safetensors_format import WORDS, as_bytes, lay_out

BLOCK = 2**24  # bytes that are hashed and written at a time


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Writes a new file and waits until the disk has it.

    Args:
        path: of the file, which is not there yet.
        parts: its bytes.

    Returns:
        `bytes` and `sha256` of what was written.

    Raises:
        OSError: if the disk is full, read-only or gone.
    """
    digest, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            size += len(view)
            for first in range(0, len(view), BLOCK):
                block = view[first : first + BLOCK]
                digest.update(block)
                while block:
                    block = block[os.write(file, block) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def safetensors_parts(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, without a copy of the tensors.

    The library's own writer neither hashes nor fsyncs, and holds Python's lock while it writes.

    Args:
        tensors: on the CPU.
        metadata: for the header.

    Raises:
        ValueError: for a dtype that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in WORDS:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors cannot hold")
    start, places = lay_out(tensors, Path(), metadata or {})
    yield start
    for name in places:
        if tensors[name].numel():
            yield memoryview(as_bytes(tensors[name]).numpy())


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below a folder, or below the nearest one above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free

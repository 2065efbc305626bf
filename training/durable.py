"""Files that are there whole after a crash, or not at all: written, hashed while they are written, fsynced.

A rename is atomic, but after a power cut it may have outlived the data it names: so a file is fsynced before
its folder is renamed, and the folders that hold the names after it. What belongs here: bytes and names on a
disk. What is in them is `snapshots.py`, and which of them stay is `checkpoint_policy.py`.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

BLOCK = 2**24  # bytes that are hashed and written at a time

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def replace_text(path: Path, text: str) -> None:
    """Gives a small file another content, or leaves it as it was."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    write_file(aside, [text.encode("utf-8")])
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until the disk has the names in a folder."""
    if os.name == "nt":  # which has no such call, and journals names itself
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        if tensors[name].numel():
            yield memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below a folder, or below the nearest one above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free

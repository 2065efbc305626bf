"""The safetensors format: a header in JSON that says where each tensor's bytes are, and those bytes.

The library maps files into memory, where they count against a limit of the address space, and needs all
tensors of a file at once to write it. Here each tensor is read and written by itself, and a file that is
damaged is described. The bytes are the same as the library's. What belongs here: one file. Which files make
up a checkpoint is said in `tensor_files.py`.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .buffers import Buffers

# What a header is told to be at most by the library.
_LONGEST_HEADER = 10**8
_ALIGNMENT = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}
# What transformers wants a file to say of itself.
METADATA = {"format": "pt"}
# The library's order of tensors in a file: the last of these first, and then by name.
_BUFFERS = Buffers()
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Place:
    """Where a tensor is, and what it is.

    Attributes:
        file: that holds it.
        dtype, shape: of the tensor.
        begin, end: of its bytes, from the beginning of the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Place]:
    """Reads where each tensor of a file is.

    Raises:
        ValueError: if the file is missing, truncated, or its header is not one.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(
                    f"{file} cannot be read: it has {size:,} bytes, and its header should take {length:,} of "
                    "them; it is truncated or no safetensors file"
                )
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no words by name")
        places = {name: _read_entry(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: its header is damaged: {error}") from error
    _check_places(file, places, 8 + length, size)
    return places


def read_metadata(file: Path) -> dict[str, str]:
    """What a file's header says beside the tensors, once `read_header` has found it sound."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)).get("__metadata__", {})


def read_tensor(
    place: Place, name: str, dimension: int = 0, begin: int = 0, end: int | None = None
) -> torch.Tensor:
    """Reads a tensor, or a range of its first or second dimension, into memory of its own.

    Args:
        place: of the tensor.
        name: for the error.
        dimension: 0 or 1.
        begin, end: of the range; default: all of it.

    Raises:
        ValueError: if the file ends before the tensor does, or cannot be read.
    """
    shape = list(place.shape)
    if shape:
        end = shape[dimension] if end is None else min(end, shape[dimension])
        shape[dimension] = max(0, end - begin)
    if 0 in shape:
        return torch.empty(shape, dtype=place.dtype)
    item = place.dtype.itemsize
    memory = _BUFFERS.take(math.prod(shape) * item)
    data, buffer = torch.from_numpy(memory), memoryview(memory)
    # Contiguous runs of the file, `step` bytes apart.
    inner = math.prod(place.shape[dimension + 1 :]) * item if shape else item
    length = inner * (shape[dimension] if shape else 1)
    step = inner * (place.shape[dimension] if shape else 1)
    runs = len(data) // length
    if step == length:
        runs, length = 1, len(data)
    try:
        with place.file.open("rb", buffering=0) as stream:
            for run in range(runs):
                stream.seek(place.begin + begin * inner + run * step)
                _fill(stream, buffer[run * length : (run + 1) * length], place, name)
    except OSError as error:
        raise ValueError(f"{place.file}: {name} cannot be read: {error.strerror}") from error
    return data.view(place.dtype).reshape(shape)


def lay_out(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str] = METADATA
) -> tuple[bytes, dict[str, Place]]:
    """What a file with these tensors is going to be, as the library writes it.

    Args:
        tensors: with the dtypes and shapes that will be written; meta tensors do.
        file: where it will be.
        metadata: what its header says beside the tensors.

    Returns:
        Everything before the tensors' bytes, and each tensor's place.
    """
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header, at = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    start = struct.pack("<Q", len(text)) + text
    places = {
        name: Place(
            file,
            tensors[name].dtype,
            tuple(tensors[name].shape),
            *(len(start) + offset for offset in header[name]["data_offsets"]),
        )
        for name in order
    }
    return start, places


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in the order of a file; a view where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same in type, shape and every bit: equal numbers may differ in sign."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = as_bytes(one), as_bytes(other)
    # Eight at a time, and what is left.
    whole = len(one) // 8 * 8
    aligned = one.data_ptr() % 8 == other.data_ptr() % 8 == 0
    kind = torch.int64 if aligned else torch.uint8
    return torch.equal(one[:whole].view(kind), other[:whole].view(kind)) and torch.equal(
        one[whole:], other[whole:]
    )


def _fill(stream, buffer: memoryview, place: Place, name: str) -> None:
    filled = 0
    # One read gives two gigabytes at most.
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])
        if not count:
            raise ValueError(
                f"{place.file} is truncated: {name} should take {place.end - place.begin:,} bytes up to byte "
                f"{place.end:,}, but the file has {place.file.stat().st_size:,}"
            )
        filled += count


def _read_entry(file: Path, name: str, entry: object, start: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {word!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape and data_offsets of {name} are not all numbers from 0 on")
    # Sizes beside a 0 cost no byte, and still have no tensor.
    if math.prod(size for size in shape if size) * DTYPES[word].itemsize >= 2**63:
        raise ValueError(f"{name} of shape {tuple(shape)} is larger than any tensor")
    needed = math.prod(shape) * DTYPES[word].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{name} of shape {tuple(shape)} and dtype {word} takes {needed:,} bytes, not the "
            f"{offsets[1] - offsets[0]:,} of its data_offsets"
        )
    return Place(file, DTYPES[word], tuple(shape), start + offsets[0], start + offsets[1])


def _check_places(file: Path, places: dict[str, Place], start: int, size: int) -> None:
    at = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != at:
            raise ValueError(
                f"{file} cannot be read: its header is damaged: {name} begins at byte {place.begin:,}, not "
                f"where the one before ends, at {at:,}"
            )
        if place.end > size:
            raise ValueError(
                f"{file} is truncated: {name} should take {place.end - place.begin:,} bytes up to byte "
                f"{place.end:,}, but the file has {size:,}"
            )
        at = place.end
    if at != size:
        raise ValueError(
            f"{file} cannot be read: its tensors end at byte {at:,}, but the file has {size:,}; its header "
            "or its end is damaged"
        )


def _is_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values

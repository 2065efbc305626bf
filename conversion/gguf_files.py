"""GGUF files: written some rows at a time, and read back to be compared.

What belongs here: types of numbers, where they are used, how far each may be from the weights, and the file
itself, through the `gguf` package of llama.cpp's project. What the tensors are called and what the metadata
say is in `gguf_architectures.py` and `gguf_tokenizer.py`.
"""

import importlib.util
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .gguf_architectures import Architecture, rope_factors
from .gguf_tokenizer import TokenizerMetadata
from .rules import model_shapes, to_theirs

# --dtype -> type of the format, and its number in `general.file_type`.
TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp keeps these in fp32: vectors, and what it looks positions up in or routes by.
_FP32 = ("position_embd.weight", "ffn_gate_inp.weight", ROPE_FACTORS)
_BLOCK = 32  # numbers that share a scale in Q8_0
_AT_ONCE = 2**22  # numbers that are rounded or compared
_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Rounding:
    """What the numbers of a file are to those of the model.

    Attributes:
        counts: tensors by type.
        largest: change of a weight, as a share of the largest weight of its tensor.
    """

    counts: Mapping[str, int]
    largest: float

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        if not self.largest:
            return f"{kinds}; equal"
        return f"{kinds}; apart by at most {self.largest:.2g} of a tensor's largest, as far as that rounds"


def require_gguf() -> None:
    """Refuses where the package that writes the format is missing.

    Raises:
        ValueError: with what to install.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files need gguf, which is not installed: pip install 'tessera-lm[gguf]'")


def choose_type(name: str, shape: torch.Size, dtype: str) -> str:
    """The type of a tensor in a file of a `--dtype`: F32, F16, BF16 or Q8_0."""
    if len(shape) == 1 or name.endswith(_FP32):
        return "F32"
    wanted = TYPES[dtype][0]
    if wanted == "Q8_0" and shape[-1] % _BLOCK:
        return "F16"
    return wanted


def write_gguf(
    file: Path,
    architecture: Architecture,
    config: TesseraConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: TokenizerMetadata,
    dtype: str,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes a model.

    Tensors are read one after the other, in the order of the file, and rounded some rows at a time.

    Args:
        file: that does not exist yet.
        architecture: that the model fits.
        config, tensors: the model under Tessera's names, as `gguf_architectures.prepare` gives it.
        tokenizer: what to state of it.
        dtype: one of `TYPES`.
        on_bytes: told of the size of each tensor that is written.

    Raises:
        ValueError: if a weight is not finite, or beyond what its type can hold.
    """
    import gguf

    shapes = _shapes(config, architecture)
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in architecture.describe(config).items():
        _add(writer, f"{architecture.name}.{key}", value)
    for key, value in tokenizer.values.items():
        _add(writer, key, value)
    theirs = _tensors_of_file(tensors, config, architecture)
    for name in theirs:
        _announce(writer, name, shapes[name], dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in theirs:
            numbers = _Encoded(name, theirs[name], choose_type(name, shapes[name], dtype))
            writer.write_tensor_data(numbers)
            if on_bytes is not None:
                on_bytes(numbers.nbytes)
    finally:
        writer.close()


def tensors_size(architecture: Architecture, config: TesseraConfig, dtype: str) -> int:
    """Bytes of a file's tensors, by their shapes alone."""
    shapes = _shapes(config, architecture)
    return sum(_size(shape, choose_type(name, shape, dtype)) for name, shape in shapes.items())


class GGUFTensors(Mapping):
    """Tensors of a GGUF file in fp32, read and dequantised when asked for.

    Raises:
        ValueError: if the file cannot be read.
    """

    def __init__(self, file: Path):
        import gguf

        try:
            self.reader = gguf.GGUFReader(file)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self._dequantize = gguf.quants.dequantize

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name).reshape(self.shape_of(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Some of the rows of a tensor, all dimensions but the last taken as one."""
        tensor = self._tensors[name]
        data = tensor.data.reshape(-1, tensor.data.shape[-1])[start:stop]
        # A copy: what is read must not depend on the mapped file.
        return torch.from_numpy(np.array(self._dequantize(data, tensor.tensor_type)))

    def shape_of(self, name: str) -> torch.Size:
        """As torch has it: the last dimension is that of a row."""
        return torch.Size(int(size) for size in reversed(self._tensors[name].shape))

    def type_of(self, name: str) -> str:
        """F32, F16, BF16 or Q8_0."""
        return self._tensors[name].tensor_type.name

    def value(self, key: str) -> Any:
        """A value of the metadata; None if the file does not state it."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()


def compare_file(
    file: Path,
    architecture: Architecture,
    config: TesseraConfig,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: TokenizerMetadata,
    dtype: str,
) -> Rounding:
    """Reads a file with the package's own reader and compares all that it states and every number.

    Args:
        file, architecture, config, tensors, tokenizer, dtype: as for `write_gguf`.

    Raises:
        ValueError: if a tensor, a size or a value of the tokenizer is missing or another, or a number is
            farther from the model's than its type's rounding.
    """
    found = GGUFTensors(file)
    _compare_metadata(found, file, architecture, config, tokenizer, dtype)
    theirs = _tensors_of_file(tensors, config, architecture)
    missing = [name for name in theirs if name not in found]
    if missing or len(found) != len(theirs):
        raise ValueError(f"{file} has {len(found)} tensors, not {len(theirs)}")
    counts: dict[str, int] = {}
    largest = 0.0
    for name in theirs:
        expected, kind, shape = theirs[name], found.type_of(name), found.shape_of(name)
        if kind != choose_type(name, expected.shape, dtype) or shape != expected.shape:
            raise ValueError(f"{name} is {kind} {tuple(shape)} in {file}, not {tuple(expected.shape)}")
        counts[kind] = counts.get(kind, 0) + 1
        largest = max(largest, _compare_tensor(found, name, expected, kind))
    return Rounding(counts, largest)


def _compare_metadata(
    found: GGUFTensors,
    file: Path,
    architecture: Architecture,
    config: TesseraConfig,
    tokenizer: TokenizerMetadata,
    dtype: str,
) -> None:
    expected = {f"{architecture.name}.{key}": value for key, value in architecture.describe(config).items()}
    expected |= {"general.architecture": architecture.name, "general.file_type": TYPES[dtype][1]}
    expected |= tokenizer.values
    for key, value in expected.items():
        there = found.value(key)
        if isinstance(value, list):
            if type(there) is not list or len(there) != len(value):
                raise ValueError(f"{file} does not state {key} with {len(value)} entries; nothing is kept")
            pairs = zip(there, value, strict=True)
            place = next((place for place, pair in enumerate(pairs) if not _is_stated(*pair)), None)
            if place is not None:
                raise ValueError(
                    f"{file} states {there[place]!r} as entry {place} of {key}, not {value[place]!r}; "
                    "nothing is kept"
                )
        elif not _is_stated(there, value):
            raise ValueError(f"{file} states {there!r} as {key}, not {value!r}; nothing is kept")
    more = [key for key in found.reader.fields if key.startswith("tokenizer.") and key not in expected]
    if more:
        raise ValueError(f"{file} states {', '.join(more)}, which the tokenizer does not have")


def _is_stated(there: Any, value: Any) -> bool:
    """Whether a value that was read is the one that was to be written; floats have 32 bits."""
    return type(there) is type(value) and there == (np.float32(value) if isinstance(value, float) else value)


def _compare_tensor(found: GGUFTensors, name: str, expected: torch.Tensor, kind: str) -> float:
    """Compares some rows at a time; the largest change, as a share of the largest weight."""
    start, apart, scale, near = 0, 0.0, 0.0, True
    for rows in _row_blocks(expected):
        rows = rows.float()
        difference = (found.rows(name, start, start + len(rows)) - rows).abs()
        near = near and bool((difference <= _rounding(kind, rows)).all())
        start += len(rows)
        apart = max(apart, float(difference.nan_to_num(torch.inf).max()))
        scale = max(scale, float(rows.abs().max()))
    if not near:
        raise ValueError(f"{name} read back differs by up to {apart:.3g}; nothing is kept")
    return apart / scale if scale else 0.0


def _tensors_of_file(
    tensors: Mapping[str, torch.Tensor], config: TesseraConfig, architecture: Architecture
) -> Mapping[str, torch.Tensor]:
    """All that a file has, in its order; the model's are read when asked for."""
    theirs, factors = to_theirs(tensors, config, architecture.names(config)), rope_factors(config)
    return theirs if factors is None else ChainMap(theirs, {ROPE_FACTORS: factors})


def _row_blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tensor as rows, all dimensions but the last taken as one, as many together as are handled at once."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.split(max(1, _AT_ONCE // rows.shape[1]))


def _shapes(config: TesseraConfig, architecture: Architecture) -> dict[str, torch.Size]:
    """Shapes of the file's tensors, by the rules themselves on tensors without numbers."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in model_shapes(config).items()}
    theirs = _tensors_of_file(empty, config, architecture)
    return {name: theirs[name].shape for name in theirs}


def _add(writer, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _announce(writer, name: str, shape: torch.Size, dtype: str) -> None:
    import gguf

    kind = choose_type(name, shape, dtype)
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), _size(shape, kind), raw_dtype=raw)


def _size(shape: torch.Size, kind: str) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return shape.numel() // block * size


class _Encoded:
    """A tensor in its type as the package's writer takes it: an array that is made while it is written."""

    def __init__(self, name: str, tensor: torch.Tensor, kind: str):
        self._name, self._tensor, self._kind = name, tensor, kind
        self.nbytes = _size(tensor.shape, kind)

    def tofile(self, stream: BinaryIO) -> None:
        for rows in _row_blocks(self._tensor):
            _encode(self._name, rows, self._kind).tofile(stream)


def _encode(name: str, rows: torch.Tensor, kind: str) -> np.ndarray:
    """The bytes of some rows of a tensor in its type."""
    import gguf

    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} has weights that are not finite; the model cannot be written")
    if kind == "F16" and float(rows.abs().max()) > _LARGEST_FP16:
        raise ValueError(
            f"{name} has weights up to {float(rows.abs().max()):.3g}, which float16 cannot hold; "
            "choose --dtype bfloat16 or float32"
        )
    if kind == "BF16":
        return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if kind == "F16":
        return rows.to(torch.float16).contiguous().numpy()
    numbers = rows.to(torch.float32).contiguous().numpy()
    return numbers if kind == "F32" else gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)


def _rounding(kind: str, expected: torch.Tensor) -> torch.Tensor:
    """How far each number may be from the one that it stands for."""
    if kind == "F32":
        return torch.zeros(())
    if kind in ("F16", "BF16"):
        bits, smallest = (11, 2.0**-24) if kind == "F16" else (8, 2.0**-133)
        return expected.abs() * 2.0**-bits + smallest / 2
    blocks = expected.unflatten(-1, (-1, _BLOCK)).abs()
    scale = blocks.amax(-1, keepdim=True) / 127
    # Half a step, and the scale's own rounding to fp16 as often as the largest number has it.
    error = scale * 0.5001 + 127 * torch.maximum(scale * 2.0**-11, torch.tensor(2.0**-25))
    return error.expand_as(blocks).reshape(expected.shape)

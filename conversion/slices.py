"""Tensors that are read in part: what one process needs of them, and no more of the disk.

A slice is what `safe_open(...).get_slice` gives: it knows its shape and type, and reads what it is indexed
with. What belongs here: slices of stored tensors, and slices that are put together from other slices, or
computed from them, with the same three methods. transformers' loader takes any of these in the place of a
tensor and asks each process for its own part.
"""

from abc import ABC, abstractmethod
from types import EllipsisType

import torch

from .fp8 import BLOCK, dequantize_blocks
from .safetensors_format import WORDS
from .tensor_files import TensorFiles

Ranges = tuple[tuple[int, int], ...]


class Slice(ABC):
    """A tensor that is read when it is indexed with slices, or with `...` for all of it.

    Args:
        shape: of the whole.
        dtype: of the numbers.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype

    def get_shape(self) -> list[int]:
        """The shape of the whole, as safetensors says it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The type of the numbers, as safetensors calls it."""
        return WORDS[self.dtype]

    def __getitem__(self, index: slice | tuple[slice, ...] | EllipsisType) -> torch.Tensor:
        given = () if index is ... else index if isinstance(index, tuple) else (index,)
        if len(given) > len(self.shape) or not all(isinstance(part, slice) for part in given):
            raise TypeError(f"a slice of shape {self.shape} takes slices, not {index!r}")
        given += (slice(None),) * (len(self.shape) - len(given))
        ranges = []
        for part, size in zip(given, self.shape, strict=True):
            start, stop, step = part.indices(size)
            if step != 1:
                raise TypeError(f"a slice is read without gaps, not with {part}")
            ranges.append((start, max(start, stop)))
        return self.read(tuple(ranges))

    @abstractmethod
    def read(self, ranges: Ranges) -> torch.Tensor:
        """Reads a part.

        Args:
            ranges: first and one past the last index in each dimension.
        """


class StoredSlice(Slice):
    """A tensor of a file.

    Args:
        files: that hold it.
        name: of the tensor.
    """

    def __init__(self, files: TensorFiles, name: str):
        place = files.header(name)
        super().__init__(place.shape, place.dtype)
        self._files, self._name = files, name

    def read(self, ranges: Ranges) -> torch.Tensor:
        """Reads a part; of ranges in several dimensions, along the one that leaves the least to be read."""
        shares = [
            (stop - start) / max(1, size) for (start, stop), size in zip(ranges, self.shape, strict=True)
        ]
        if all(share == 1 for share in shares) or not shares:
            return self._files[self._name]
        # Those past the second are no place to cut in a file of rows.
        dimension = min(range(min(2, len(shares))), key=shares.__getitem__)
        part = self._files.read_slice(self._name, dimension, *ranges[dimension])
        return part[tuple(slice(None) if i == dimension else slice(*each) for i, each in enumerate(ranges))]


class AssembledSlice(Slice):
    """A tensor whose parts are other slices; only those that a reader asks for are read.

    Args:
        shape: of the whole.
        parts: where each part begins, and the part; together they cover the whole.
    """

    def __init__(self, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Slice]]):
        super().__init__(shape, parts[0][1].dtype)
        self._parts = parts

    def read(self, ranges: Ranges) -> torch.Tensor:
        """Reads what the parts have of a part."""
        sizes = [stop - start for start, stop in ranges]
        found = [
            (within, place, part)
            for offset, part in self._parts
            for within, place in [_overlap(ranges, offset, part.shape)]
            if all(start < stop for start, stop in within)
        ]
        if len(found) == 1 and [stop - start for start, stop in found[0][0]] == sizes:
            return found[0][2].read(found[0][0])
        whole = torch.empty(sizes, dtype=self.dtype)
        for within, place, part in found:
            whole[tuple(slice(*each) for each in place)] = part.read(within)
        return whole


class StackedSlice(Slice):
    """A slice as the only entry of a leading dimension, for stacks to be assembled of.

    Args:
        entry: of shape [...].
    """

    def __init__(self, entry: Slice):
        super().__init__((1, *entry.shape), entry.dtype)
        self._entry = entry

    def read(self, ranges: Ranges) -> torch.Tensor:
        """Reads a part of the entry."""
        (start, stop), *rest = ranges
        return self._entry.read(tuple(rest)).unsqueeze(0)[: stop - start]


class DequantizedSlice(Slice):
    """A matrix in FP8 as the numbers that it stands for.

    Args:
        weight: [R, C].
        scale: [ceil(R / 128), ceil(C / 128)], factors of its blocks.
        dtype: of what is read.
    """

    def __init__(self, weight: Slice, scale: Slice, dtype: torch.dtype):
        super().__init__(weight.shape, dtype)
        self._weight, self._scale = weight, scale

    def read(self, ranges: Ranges) -> torch.Tensor:
        """Reads a part, and the factors of the blocks that it touches."""
        blocks = tuple(
            (start // BLOCK, -(-stop // BLOCK) if stop > start else start // BLOCK) for start, stop in ranges
        )
        first = (ranges[0][0], ranges[1][0])
        return dequantize_blocks(self._weight.read(ranges), self._scale.read(blocks), self.dtype, first)


def _overlap(ranges: Ranges, offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Ranges, Ranges]:
    """What a part at an offset has of some ranges: within the part, and within the ranges."""
    within, place = [], []
    for (start, stop), begin, size in zip(ranges, offset, shape, strict=True):
        low, high = max(start, begin), min(stop, begin + size)
        within.append((low - begin, high - begin))
        place.append((low - start, high - start))
    return tuple(within), tuple(place)

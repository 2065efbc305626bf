"""The files of a native directory, one a rank: who holds what of each tensor, and all of it together again.

What belongs here: how tensors are shared among model-parallel ranks, which `native.py` says by name and this
file in numbers, and reading them back, whole or in part, whatever the number of ranks that wrote them. FP8
weights are shared with the factors of their blocks. Where the rows (or columns) of a rank are whole blocks,
so are its factors; where several ranks share a block, each has its factor; what would tear a block apart is
refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .fp8 import BLOCK, block_grid
from .safetensors_format import read_metadata, same_bytes
from .slices import AssembledSlice, Ranges, Slice, StoredSlice
from .tensor_files import TensorFiles

# The dimension along which ranks share a tensor, by the last two parts of its name.
SPLIT = {
    **dict.fromkeys(("embed.weight", "head.weight", "value_gate.weight"), 0),
    **{f"{name}.{kind}": 0 for name in ("wq_b", "wkv_b") for kind in ("weight", "scale")},
    **{f"{n}.{kind}": 0 for n in ("wq", "wk", "wv", "w1", "w3") for kind in ("weight", "scale", "bias")},
    **{f"{name}.{kind}": 1 for name in ("wo", "w2") for kind in ("weight", "scale")},
    "value_embed.weight": 1,
}
# Last part of a name -> that of the weight whose blocks it is about.
SCALE, WEIGHT = ".scale", ".weight"

_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_EXPERT = re.compile(r".*\.ffn\.experts\.(\d+)\..*")


def rank_file(rank: int, world: int) -> str:
    """The name of a rank's file."""
    return f"model{rank}-mp{world}.safetensors"


def has_rank_files(folder: Path) -> bool:
    """Whether a directory has a file with the name of a rank's."""
    return any(_RANK_FILE.fullmatch(file.name) for file in folder.glob("model*.safetensors"))


def expert_number(name: str) -> int | None:
    """Which routed expert a tensor is of, if it is of one."""
    found = _EXPERT.fullmatch(name)
    return int(found[1]) if found else None


def split_dimension(name: str) -> int | None:
    """The dimension along which ranks share the tensor of this native name; None where each has all of it."""
    return SPLIT.get(".".join(name.split(".")[-2:]))


def holds(name: str, rank: int, world: int, experts: int) -> bool:
    """Whether a rank holds anything of a tensor: of routed experts those of its range, else everything.

    Args:
        name: native name.
        rank, world: of the model-parallel group.
        experts: routed experts of the model.
    """
    expert = expert_number(name)
    return expert is None or expert * world // experts == rank


def share_of(name: str, shape: tuple[int, ...], weight: tuple[int, ...], rank: int, world: int) -> Ranges:
    """Where in a tensor a rank's share is.

    Args:
        name: native name.
        shape: of the whole tensor.
        weight: its shape too, or that of the FP8 weight whose factors it has.
        rank, world: of the model-parallel group.

    Returns:
        First and one past the last index in each dimension.

    Raises:
        ValueError: if it cannot be shared among that many.
    """
    ranges = [(0, size) for size in shape]
    dimension = split_dimension(name)
    if dimension is None or world == 1 or expert_number(name) is not None:
        return tuple(ranges)
    if dimension >= min(len(shape), len(weight)) or weight[dimension] % world:
        raise ValueError(f"mp {world} does not divide dimension {dimension} of {name} {tuple(weight)}")
    share = weight[dimension] // world
    if name.endswith(SCALE):
        _require_whole_blocks(name, share, world)
        ranges[dimension] = (rank * share // BLOCK, -(-(rank + 1) * share // BLOCK))
    else:
        ranges[dimension] = (rank * share, (rank + 1) * share)
    return tuple(ranges)


def take_share(
    name: str, tensor: torch.Tensor, weight: tuple[int, ...], rank: int, world: int
) -> torch.Tensor:
    """What one rank holds of a tensor (see `share_of`); of a routed expert, all."""
    return tensor[tuple(slice(*each) for each in share_of(name, tensor.shape, weight, rank, world))]


class RankFiles(Mapping):
    """The native tensors of all ranks together, joined when asked for.

    Args:
        folder: directory in the native layout.

    Attributes:
        world: ranks that the files are of.

    Raises:
        ValueError: if ranks are missing, there are several sets of them, or a file cannot be read.
    """

    def __init__(self, folder: Path):
        found = {}
        for path in folder.glob("model*.safetensors"):
            if match := _RANK_FILE.fullmatch(path.name):
                found[int(match[2]), int(match[1])] = path
        worlds = sorted({world for world, _ in found})
        if not worlds:
            raise ValueError(f"{folder} has no {rank_file(0, 1)}, so it is not in the native layout")
        if len(worlds) != 1:
            raise ValueError(
                f"{folder} holds files of {' and of '.join(map(str, worlds))} ranks; keep one set"
            )
        self.world = worlds[0]
        missing = [rank for rank in range(self.world) if (self.world, rank) not in found]
        past = [rank for _, rank in found if rank >= self.world]
        if past:
            raise ValueError(f"{folder} holds files of ranks {past}, but there are {self.world} from 0 on")
        if missing:
            raise ValueError(f"{folder} lacks the files of ranks {missing} of {self.world}")
        self._folder = folder
        self._paths = [found[self.world, rank] for rank in range(self.world)]
        self._ranks = [TensorFiles([path]) for path in self._paths]
        self._names = dict.fromkeys(name for rank in self._ranks for name in rank)

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of the files says beside the tensors.

        Raises:
            ValueError: if the ranks' files say different things.
        """
        said = [read_metadata(path) for path in self._paths]
        if any(one != said[0] for one in said):
            raise ValueError(f"{self._folder}: the metadata of the ranks' files differ")
        return said[0]

    def open_slice(self, name: str) -> Slice:
        """A tensor, to be read in part from the files that have that part.

        Of a tensor that every rank has, the first rank's is taken; `self[name]` compares them.

        Raises:
            ValueError: if it is not on every rank that must have it, or their shares do not fit together.
        """
        parts = self._parts(name)
        dimension = split_dimension(name)
        self._require_alike(name, parts)
        if len(parts) == 1 or dimension is None:
            return parts[0]
        if dimension >= len(parts[0].shape):
            raise ValueError(f"{self._folder}: {name} of shape {parts[0].shape} cannot be of several ranks")
        if name.endswith(SCALE):
            parts = self._without_repetitions(name, parts, dimension)
        offset, placed = 0, []
        for part in parts:
            placed.append((tuple(offset if i == dimension else 0 for i in range(len(part.shape))), part))
            offset += part.shape[dimension]
        shape = list(parts[0].shape)
        shape[dimension] = offset
        return AssembledSlice(tuple(shape), placed)

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        part = self.open_slice(name)
        return torch.empty(part.shape, dtype=part.dtype, device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        if split_dimension(name) is not None or expert_number(name) is not None:
            return self.open_slice(name)[...]
        first, *others = (part[...] for part in self._parts(name))
        if not all(same_bytes(other, first) for other in others):
            raise ValueError(f"{self._folder}: {name} differs between ranks, which should hold the same")
        return first

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _parts(self, name: str) -> list[StoredSlice]:
        parts = [StoredSlice(rank, name) for rank in self._ranks if name in rank]
        if expert_number(name) is not None:
            if len(parts) != 1:
                raise ValueError(f"{self._folder}: {len(parts)} ranks hold {name}, not one")
        elif len(parts) != self.world:
            raise ValueError(f"{self._folder}: only {len(parts)} of {self.world} ranks hold {name}")
        return parts

    def _require_alike(self, name: str, parts: list[StoredSlice]) -> None:
        first = parts[0]
        for rank, part in enumerate(parts):
            if part.shape != first.shape or part.dtype != first.dtype:
                raise ValueError(
                    f"{self._folder}: rank {rank} holds {name} as {part.get_dtype()} {part.shape}, rank 0 as "
                    f"{first.get_dtype()} {first.shape}; shares must be alike"
                )

    def _without_repetitions(self, name: str, parts: list[StoredSlice], dimension: int) -> list[StoredSlice]:
        """The factors of each block once, where ranks share blocks."""
        weight = self._parts(name.removesuffix(SCALE) + WEIGHT)[0]
        share = weight.shape[dimension]
        _require_whole_blocks(name, share, self.world)
        if parts[0].shape != block_grid(weight.shape):
            raise ValueError(
                f"{self._folder}: {name} has shape {parts[0].shape}; the blocks of {weight.shape} are "
                f"{block_grid(weight.shape)}"
            )
        kept: list[StoredSlice] = []
        for rank, part in enumerate(parts):
            if rank * share % BLOCK == 0:
                kept.append(part)
            elif not same_bytes(part[...], kept[-1][...]):
                raise ValueError(
                    f"{self._folder}: {name} differs between ranks that share a block of {BLOCK}, so there "
                    "is no one FP8 tensor of them"
                )
        return kept


def _require_whole_blocks(name: str, share: int, world: int) -> None:
    """Each rank's share must begin where a block does, or lie within one."""
    for begin in (rank * share for rank in range(world)):
        if begin % BLOCK and begin // BLOCK != (begin + share - 1) // BLOCK:
            raise ValueError(
                f"{name.removesuffix(SCALE) + WEIGHT} cannot be shared by {world} ranks in FP8: {share} rows "
                f"or columns of each would tear blocks of {BLOCK} apart; convert it to bfloat16 first"
            )

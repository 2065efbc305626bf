"""From k model-parallel ranks to n: the files of a native directory, cut anew.

What belongs here: reading the parts that a new rank needs from the files that have them, and the new
directory around them. Nothing is translated, and nothing but a rank's own part is joined; the same numbers in
the same order give the same bytes, so k -> n -> k comes back to the files that it began with. How a tensor is
shared is in `rank_files.py`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tessera

from .aside import claimed, keep, require_space
from .checkpoints import Checkpoint
from .journal import Journal
from .native import check_world, open_slices, read_native_config
from .rank_files import SCALE, WEIGHT, RankFiles, holds, rank_file, share_of
from .rules import name_some
from .safetensors_format import same_bytes
from .slices import Ranges
from .weight_writer import WeightWriter

_SETTINGS = ("config.json", "params.json")


@dataclass(frozen=True)
class Share:
    """What a new rank holds of a tensor.

    Attributes:
        ranges: where in the tensor it is.
        meta: its type and shape, on the meta device.
    """

    ranges: Ranges
    meta: torch.Tensor


@dataclass(frozen=True)
class Resharded:
    """What was cut.

    Attributes:
        before, after: ranks.
        tensors: of the model.
        largest_file: bytes of the largest new file.
    """

    before: int
    after: int
    tensors: int
    largest_file: int


def shard(source: str | Path, target: str | Path, world: int) -> Resharded:
    """Cuts a native checkpoint for another number of ranks. The target appears complete, or not at all.

    In memory is one rank's share of one tensor, and for the comparison at the end one tensor. FP8 weights are
    cut with their factors. Settings, tokenizer and chat template come along. The same call goes on from one
    that was killed.

    Args:
        source: directory in the native layout, of any number of ranks.
        target: directory that does not exist yet, or is empty.
        world: ranks to cut it for.

    Raises:
        ValueError: if the source is not a complete native checkpoint, heads, experts or sizes cannot be
            shared among so many ranks, or the target is in the way.
    """
    source, target = Path(source), Path(target).resolve()
    if not source.is_dir():
        raise ValueError(f"there is no directory {source}")
    if target == Path.cwd():
        raise ValueError(f"{target} is the current directory, which cannot be replaced; name a new one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; choose another target")
    files = RankFiles(source)
    config = read_native_config(source, files)
    check_world(config, world)
    try:
        # For the refusal of what is missing, too much or misshapen.
        open_slices(files, config)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
    shares = _plan(files, world, config.n_routed_experts)
    require_space(target, sum(_size(held) for held in shares.values()))
    with claimed(target) as aside:
        journal = Journal(aside, _identify(source, world))
        _write(files, shares, aside, journal)
        Checkpoint(source, "native", config, files).copy_side_files(aside)
        for name in _SETTINGS:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        _require_same(files, RankFiles(aside))
        largest = max((aside / name).stat().st_size for name in shares)
        keep(aside, target)
    return Resharded(files.world, world, len(files), largest)


def _plan(files: RankFiles, world: int, experts: int) -> dict[str, dict[str, Share]]:
    """For each new file what it holds of which tensors; refused here, before anything is written."""
    shares: dict[str, dict[str, Share]] = {rank_file(rank, world): {} for rank in range(world)}
    for name in files:
        whole = files.outline(name)
        weight = whole.shape
        if name.endswith(SCALE) and (of := name.removesuffix(SCALE) + WEIGHT) in files:
            weight = files.outline(of).shape
        for rank, held in enumerate(shares.values()):
            if holds(name, rank, world, experts):
                ranges = share_of(name, whole.shape, weight, rank, world)
                held[name] = Share(ranges, whole[tuple(slice(*each) for each in ranges)])
    return shares


def _size(shares: dict[str, Share]) -> int:
    return sum(share.meta.numel() * share.meta.dtype.itemsize for share in shares.values())


def _write(files: RankFiles, shares: dict[str, dict[str, Share]], folder: Path, journal: Journal) -> None:
    """Writes all new files together, tensor by tensor, and of each what each of them holds."""
    outlines = {file: {name: share.meta for name, share in held.items()} for file, held in shares.items()}
    # The metadata are those that the source has, as its order is the library's.
    with WeightWriter(folder, outlines, journal, files.metadata) as writer:
        for name in files:
            tensor = files.open_slice(name)
            for file, held in shares.items():
                if name in held and not writer.is_written(file, name):
                    writer.write(file, name, tensor.read(held[name].ranges))


def _identify(source: Path, world: int) -> dict[str, Any]:
    """What makes two calls the same, so that one goes on where a killed one was."""
    files = sorted(file for file in source.resolve().iterdir() if file.is_file())
    return {
        "source": str(source.resolve()),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "ranks": world,
        "version": tessera.__version__,
    }


def _require_same(before: RankFiles, after: RankFiles) -> None:
    """Reads both, tensor by tensor; this also finds tensors that differ between ranks and should not."""
    wrong = [name for name in before if name not in after or not same_bytes(before[name], after[name])]
    if wrong or len(before) != len(after):
        raise ValueError(f"{len(wrong)} tensors read back are not what they were ({name_some(wrong)})")

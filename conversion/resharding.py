"""From k model-parallel ranks to n: the files of a native directory, cut anew.

What belongs here: reading the parts that a new rank needs from the files that have them, and the new
directory around them. Nothing is translated, and nothing but a rank's own part is joined; the same numbers in
the same order give the same bytes, so k -> n -> k comes back to the files that it began with. How a tensor is
shared is in `rank_files.py`.
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

import tessera
from tessera.modeling.configuration_tessera import TesseraConfig

from .aside import claimed, keep, require_space, resolve_target
from .checkpoints import Checkpoint
from .fp8_checkpoints import NATIVE_FP8, Dequantized
from .journal import Journal
from .native import check_world, open_slices, read_native_config
from .rank_files import SCALE, WEIGHT, RankFiles, holds, rank_file, share_of
from .report import Check, Report, check_against_report, hash_files
from .slices import Ranges
from .sound_weights import require_one_dtype, sound
from .tensor_files import planned_size
from .verify import require_same_weights
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
        report: as it is stored with the result.
    """

    before: int
    after: int
    tensors: int
    largest_file: int
    report: Report


def shard(source: str | Path, target: str | Path, world: int) -> Resharded:
    """Cuts a native checkpoint for another number of ranks. The target appears complete, or not at all.

    In memory is one rank's share of one tensor, and for the comparison at the end one tensor. FP8 weights are
    cut with their factors. Settings, tokenizer and chat template come along. What a conversion would refuse
    as damaged is refused here: numbers that are not finite, types that do not belong together, files that
    are not those of their report. The same call goes on from one that was killed.

    Args:
        source: directory in the native layout, of any number of ranks.
        target: directory that does not exist yet, or is empty.
        world: ranks to cut it for.

    Raises:
        ValueError: if the source is not a complete and sound native checkpoint, heads, experts or sizes
            cannot be shared among so many ranks, or the target is in the way.
    """
    began = time.monotonic()
    source, target = Path(source), resolve_target(target)
    if not source.is_dir():
        raise ValueError(f"there is no directory {source}")
    files = RankFiles(source)
    config = read_native_config(source, files)
    check_world(config, world)
    try:
        # For the refusal of what is missing, too much or misshapen.
        open_slices(files, config)
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
    stored = Dequantized(files, NATIVE_FP8, config.dtype)
    require_one_dtype(stored)
    shares = _plan(files, world, config.n_routed_experts)
    outlines = {file: {name: share.meta for name, share in held.items()} for file, held in shares.items()}
    require_space(target, planned_size(outlines))
    checkpoint = Checkpoint(source, "native", config, files)
    with claimed(target) as aside:
        journal = Journal(aside, _identify(checkpoint, world))
        # The metadata are those that the source has, as its order is the library's.
        with WeightWriter(aside, outlines, journal, files.metadata) as writer:
            _write(files, shares, writer)
        wrote = time.monotonic()
        check_against_report(source)
        checkpoint.copy_side_files(aside)
        for name in _SETTINGS:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        _verify(files, stored, aside)
        report = Report(
            source={"name": source.resolve().name, "kind": "native"},
            target={"name": target.name, "kind": "native"},
            parameters=sum(stored.outline(name).numel() for name in stored),
            dtype=_dtype(stored, config),
            files=hash_files([aside / name for name in shares]),
            checks=[
                Check("weights, read back", True, "equal bit for bit"),
                Check("numbers that are not finite", True, "none"),
            ],
            notes=[f"cut from {files.world} to {world} ranks"],
            seconds={"writing": round(wrote - began, 2), "verifying": round(time.monotonic() - wrote, 2)},
            versions={
                "tessera": tessera.__version__,
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
            },
        )
        report.write(aside)
        keep(aside, target)
    largest = max(entry["bytes"] for entry in report.files.values())
    return Resharded(files.world, world, len(files), largest, report)


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


def _write(files: RankFiles, shares: Mapping[str, Mapping[str, Share]], writer: WeightWriter) -> None:
    """Writes all new files together, tensor by tensor, and of each what each of them holds."""
    for name in files:
        tensor = files.open_slice(name)
        for file, held in shares.items():
            if name in held and not writer.is_written(file, name):
                writer.write(file, name, tensor.read(held[name].ranges))


def _verify(files: RankFiles, stored: Dequantized, aside: Path) -> None:
    """Reads both, tensor by tensor; this also finds tensors that differ between ranks and should not."""
    require_same_weights(sound(files), RankFiles(aside))
    products = sound(stored)
    for name in stored.scales:
        products[name]


def _dtype(stored: Dequantized, config: TesseraConfig) -> str:
    """What the weights are in, in the words of `--dtype`."""
    if stored.scales:
        return "fp8"
    found = Counter(stored.outline(name).dtype for name in stored)
    return str(config.dtype or found.most_common(1)[0][0]).removeprefix("torch.")


def _identify(checkpoint: Checkpoint, world: int) -> dict[str, Any]:
    """What makes two calls the same, so that one goes on where a killed one was: what is read, and ranks."""
    folder = checkpoint.folder.resolve()
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    read = [*sorted(folder.glob("model*.safetensors")), *settings, *checkpoint.side_files]
    return {
        "source": str(folder),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in read],
        "ranks": world,
        "version": tessera.__version__,
    }

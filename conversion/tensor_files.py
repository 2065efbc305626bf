"""Tensors of a checkpoint on disk: opened without being read, written in files of bounded size.

What belongs here: which files make up a checkpoint, and which tensor is in which. The format of one file is
in `safetensors_format.py`; which tensors mean the same is said in `rules.py`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tessera.modeling.loading import read_json

from .journal import Journal
from .outlines import outline
from .safetensors_format import Place, lay_out, read_header, read_tensor
from .weight_writer import WeightWriter

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a file: what is copied, sent and fetched as one piece.
LARGEST_FILE = 5 * 10**9


class TensorFiles(Mapping):
    """Tensors of one or several safetensors files, read when asked for.

    Args:
        files: the files; no two may hold a tensor of the same name.

    Raises:
        ValueError: if a file cannot be read, or a name is in two of them.
    """

    def __init__(self, files: list[Path]):
        self._places: dict[str, Place] = {}
        for file in files:
            for name, place in read_header(file).items():
                if name in self._places:
                    raise ValueError(f"{name} is in {self._places[name].file} and in {file.name}; keep one")
                self._places[name] = place

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._places[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def header(self, name: str) -> Place:
        """Dtype, shape and place of a tensor."""
        return self._places[name]

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        place = self._places[name]
        return torch.empty(place.shape, dtype=place.dtype, device="meta")

    def read_slice(self, name: str, dimension: int, begin: int, end: int) -> torch.Tensor:
        """A range of a tensor along dimension 0 or 1; nothing else is read."""
        return read_tensor(self._places[name], name, dimension, begin, end)


def open_safetensors(folder: Path) -> TensorFiles:
    """Opens `model.safetensors`, or the files that its index lists.

    Raises:
        ValueError: if there is none, one cannot be read, or the index says other things than the files.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            hint = (
                f"; {pickles[0]} is a pickle, which is not read: save it as safetensors first"
                if pickles
                else ""
            )
            raise ValueError(f"{folder} has no {SINGLE_FILE}{hint}")
        return TensorFiles([folder / SINGLE_FILE])
    files = _read_index(index)
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in files.values():
        raise ValueError(f"{folder} holds {SINGLE_FILE} and an index of other files; keep one of the two")
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}, which {INDEX} names")
    tensors = TensorFiles([folder / file for file in sorted(set(files.values()))])
    for name, file in files.items():
        if name not in tensors or tensors.header(name).file.name != file:
            raise ValueError(f"{index} says that {name} is in {file}, which does not hold it")
    for name in tensors:
        if name not in files:
            raise ValueError(f"{tensors.header(name).file} holds {name}, which {INDEX} does not name")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    for name, file in files.items():
        # Names of other systems' folders too: an index comes from anywhere.
        if not file or file in (".", "..") or any(sign in file for sign in '/\\:\0"\n'):
            raise ValueError(f"{index} places {name} in {file!r}, which is no file beside it")
    return files


def split_into_files(
    tensors: Mapping[str, torch.Tensor], largest_file: int = LARGEST_FILE
) -> dict[str, dict[str, torch.Tensor]]:
    """Which tensor goes into which file: in their order, each file filled as far as it goes.

    Returns:
        name of each file -> its tensors, on the meta device.
    """
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name in tensors:
        meta = outline(tensors, name)
        nbytes = meta.numel() * meta.dtype.itemsize
        if parts[-1] and size + nbytes > largest_file:
            parts.append({})
            size = 0
        parts[-1][name] = meta
        size += nbytes
    if len(parts) == 1:
        return {SINGLE_FILE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def planned_size(files: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    """Bytes of files with these tensors, headers and all."""
    total = 0
    for file, tensors in files.items():
        start, places = lay_out(tensors, Path(file))
        total += max((place.end for place in places.values()), default=len(start))
    return total


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    largest_file: int = LARGEST_FILE,
    journal: Journal | None = None,
) -> None:
    """Writes tensors one after the other as `model.safetensors`, or as several such files and their index.

    Args:
        folder: an existing directory.
        tensors: read once each, in their order.
        largest_file: bytes of tensors in a file; a larger tensor has a file of its own.
        journal: of what is written already.

    Raises:
        OSError: if there is no room, or a file cannot be written.
    """
    files = split_into_files(tensors, largest_file)
    with WeightWriter(folder, files, journal) as writer:
        for file, part in files.items():
            for name in part:
                if not writer.is_written(file, name):
                    writer.write(file, name, tensors[name])
    if len(files) == 1:
        return
    places = {name: file for file, part in files.items() for name in part}
    total = sum(meta.numel() * meta.dtype.itemsize for part in files.values() for meta in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

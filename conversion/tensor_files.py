"""Tensors on disk: opened without being read, written in files of bounded size.

What belongs here: where a tensor's bytes are. Which tensors mean the same is said in `rules.py`.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tessera.modeling.loading import read_json

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A file's tensors are in memory together while it is written.
LARGEST_FILE = 5 * 10**9


class TensorFiles(Mapping):
    """Tensors of one or several safetensors files, read when asked for.

    Args:
        files: the files; no two may hold a tensor of the same name.

    Raises:
        ValueError: if a file cannot be read.
    """

    def __init__(self, files: list[Path]):
        self._places = {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
                self._places.update(dict.fromkeys(handle.keys(), handle))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_safetensors(folder: Path) -> TensorFiles:
    """Opens `model.safetensors`, or the files that its index lists.

    Raises:
        ValueError: if there is none, or one cannot be read.
    """
    index = folder / INDEX
    if index.is_file():
        places = read_json(index).get("weight_map")
        if (
            not isinstance(places, dict)
            or not places
            or not all(isinstance(name, str) for name in places.values())
        ):
            raise ValueError(f"{index} has no weight_map, which says where each tensor is")
        return TensorFiles([folder / name for name in sorted(set(places.values()))])
    if not (folder / SINGLE_FILE).is_file():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = (
            f"; {pickles[0]} is a pickle, which is not read: save it as safetensors first" if pickles else ""
        )
        raise ValueError(f"{folder} has no {SINGLE_FILE}{hint}")
    return TensorFiles([folder / SINGLE_FILE])


def read_pt(file: Path) -> dict[str, torch.Tensor]:
    """Reads a dictionary of tensors that `torch.save` wrote, and refuses any other object.

    Raises:
        ValueError: if the file holds anything but tensors by name, or cannot be read.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds pickled objects beside tensors, which could run code when read; refused"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is not a dictionary of tensors")
    return tensors


def write_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes one safetensors file.

    Raises:
        OSError: if there is no room, or the file cannot be written.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def write_safetensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], largest_file: int = LARGEST_FILE
) -> None:
    """Writes tensors one after the other as `model.safetensors`, or as several such files and their index."""
    written: list[dict[str, int]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0
    for name in tensors:
        tensor = tensors[name]
        if held and size + tensor.nbytes > largest_file:
            written.append(_write_part(folder, len(written), held))
            held, size = {}, 0
        # A copy: views of one tensor must not end up in two files, or keep a whole stack alive.
        held[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    written.append(_write_part(folder, len(written), held))
    if len(written) == 1:
        _part(folder, 0).rename(folder / SINGLE_FILE)
        return
    places = {}
    for i, part in enumerate(written):
        final = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        _part(folder, i).rename(folder / final)
        places.update(dict.fromkeys(part, final))
    total = sum(sum(part.values()) for part in written)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_part(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    write_file(tensors, _part(folder, number))
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _part(folder: Path, number: int) -> Path:
    return folder / f"model-part-{number}.safetensors"

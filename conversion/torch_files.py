"""Files that `torch.save` writes, of tensors alone: `.pt` and `.pth`.

What belongs here: reading and writing them. Such a file is a zip archive of tensors and a pickle that says
what they are. The pickle is read by torch's own reader for weights, which knows tensors and containers and
runs nothing; what else a pickle could hold is refused.
"""

import pickle
import zipfile
from pathlib import Path

import torch


def read_pt(file: Path) -> dict[str, torch.Tensor]:
    """Reads a dictionary of tensors that `torch.save` wrote. The tensors are mapped, not loaded.

    Every byte is compared with the archive's checksums first, so a damaged file is not taken for a model.

    Raises:
        ValueError: if the file holds anything but tensors by name, is damaged, or cannot be read.
    """
    _check_archive(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds pickled objects beside tensors, which could run code when read; refused"
        ) from error
    except Exception as error:  # of a pickle that torch's reader does not expect, of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read: {reason[:200]}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file} is not a dictionary of tensors")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            word = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {name} holds {word}, which are no weights")
    return tensors


def _check_archive(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of the archive's structure, whatever the library meets there
        raise ValueError(
            f"{file} cannot be read: it is not the zip archive that torch.save writes, or not a whole one "
            f"({error})"
        ) from error
    if damaged is not None:
        raise ValueError(f"{file} cannot be read: {damaged} in it is damaged, its checksum is another")


def write_pt(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a dictionary of tensors as `torch.save` does, for what loads nothing else.

    Raises:
        OSError: if there is no room, or the file cannot be written.
    """
    try:
        torch.save(tensors, file)
    except RuntimeError as error:
        # torch's own writer has no other class for a full disk.
        raise OSError(f"{file} cannot be written: {str(error).splitlines()[0]}") from error

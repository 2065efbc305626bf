"""How far a conversion has come: what lets the same call go on after a kill or a power cut.

A journal lies beside the files that it tells of. Its first line says which conversion it is: source, options
and version. Each further line is a tensor whose bytes were forced to disk before, with their checksum. What
belongs here: the journal. Who writes tensors and asks it is in `tensor_files.py`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera.data.journal import sync_folder

NAME = "journal.jsonl"
# Held by the process that writes in the folder.
LOCK = "lock"


class Journal:
    """Tensors that are written, by file and name.

    Args:
        folder: that the files are written in.
        identity: of the conversion, in values that JSON has.
        on_bytes: told of the size of each tensor that is written, or was before.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], on_bytes: Callable[[int], None] | None = None):
        self.path = folder / NAME
        self.on_bytes = on_bytes or (lambda count: None)
        self.bytes_found = 0
        self.discarded = False
        self._written: dict[tuple[str, str], int] = {}
        first, *lines = self._read() or [None]
        # Through JSON, so that tuples are compared as lists.
        if first == json.loads(json.dumps(identity)):
            self._written = {(file, name): checksum for file, name, checksum in lines}
        else:
            self.discarded = first is not None
            clear(folder)
            self._append([identity])
            sync_folder(folder)

    def find(self, file: str, name: str) -> int | None:
        """The checksum of a tensor that was written, if it was."""
        return self._written.get((file, name))

    def add(self, entries: list[tuple[str, str, int]]) -> None:
        """Tells of tensors whose bytes are on disk: file, name, checksum."""
        if entries:
            self._append(entries)
            self._written.update({(file, name): checksum for file, name, checksum in entries})

    def _read(self) -> list[Any]:
        """Lines up to the first that is not whole."""
        if not self.path.is_file():
            return []
        values = []
        try:
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                values.append(json.loads(line))
        except ValueError:
            pass
        entries = values[1:]
        sound = all(isinstance(entry, list) and len(entry) == 3 for entry in entries)
        if values and not (isinstance(values[0], dict) and sound):
            return [None]
        # What a kill left of a line must not run into the next one.
        with self.path.open("wb") as file:
            file.writelines(json.dumps(value).encode() + b"\n" for value in values)
        return values

    def _append(self, values: list[Any]) -> None:
        try:
            with self.path.open("ab") as file:
                file.writelines(json.dumps(value).encode() + b"\n" for value in values)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error


def clear(folder: Path) -> None:
    """Leaves nothing but the lock. The journal goes last: without it the rest is nobody's."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()

"""How far a run has come, on disk: what lets it go on after a kill, a power cut or a full disk.

Notable:
- files only grow, and what they grow by is forced to disk before the journal speaks of it; the journal is
written aside, forced to disk and renamed. So at any moment it tells of bytes that are there, and what lies
beyond them is cut off when the run goes on;
- a full disk (a quota, a limit on the size of files) is a sentence with file and offset, and spoils nothing
that the journal told of.

What belongs here: files that grow and can be cut back, and the journal. What a run writes into it is its own
business.
"""

import json
import os
from pathlib import Path
from typing import Any

# Bytes held before they are written, so that small documents cost no call of the system each.
HELD = 2**20


def cannot_be_written(path: Path, offset: int, error: OSError) -> ValueError:
    """The sentence for a disk that takes no more."""
    return ValueError(
        f"{path} cannot be written beyond byte {offset:,}: {error.strerror}; what was written before stays: "
        "make room, and the same call goes on from there"
    )


class GrowingFile:
    """A file that is only appended to, and cut back to what a journal tells of.

    Args:
        path: where it is.
        size: bytes of it that stay; 0 begins anew.

    Raises:
        ValueError: if it is shorter than that.
    """

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise cannot_be_written(path, 0, error) from error
        found = os.fstat(self._file).st_size
        if found < size:
            self.close()
            raise ValueError(
                f"{path} has {found:,} bytes, but {size:,} were written before: something has changed it; "
                "begin anew with --restart"
            )
        os.ftruncate(self._file, size)
        os.lseek(self._file, size, os.SEEK_SET)
        self._written = size
        self._held: list[bytes] = []
        self._held_size = 0

    @property
    def size(self) -> int:
        """Bytes, with those that are still held."""
        return self._written + self._held_size

    def append(self, data: bytes | memoryview) -> None:
        """Adds bytes at the end.

        Raises:
            ValueError: if the disk takes no more.
        """
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size >= HELD:
            self._flush()

    def sync(self) -> int:
        """Forces everything to disk and returns how many bytes that is.

        Raises:
            ValueError: if the disk takes no more.
        """
        self._flush()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise cannot_be_written(self.path, self._written, error) from error
        return self._written

    def read(self, start: int, end: int) -> bytes:
        """Bytes of what was written."""
        self._flush()
        os.lseek(self._file, start, os.SEEK_SET)
        parts = []
        while start < end and (part := os.read(self._file, end - start)):
            parts.append(part)
            start += len(part)
        os.lseek(self._file, self._written, os.SEEK_SET)
        return b"".join(parts)

    def cut(self, size: int) -> None:
        """Takes bytes off the end."""
        self._flush()
        os.ftruncate(self._file, size)
        os.lseek(self._file, size, os.SEEK_SET)
        self._written = size

    def close(self) -> None:
        """Closes the file; what is held and was not synced is lost."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _flush(self) -> None:
        data = memoryview(b"".join(self._held))
        self._held, self._held_size = [data], len(data)  # until it is known to be written
        try:
            while data:
                count = os.write(self._file, data)
                data = data[count:]
                self._written += count
                self._held, self._held_size = [data], len(data)
        except OSError as error:
            raise cannot_be_written(self.path, self._written, error) from error
        self._held = []


class Journal:
    """The state of a run: one JSON file that is replaced as a whole.

    Args:
        path: where it is.
        anew: what the user can do where it is damaged.
    """

    def __init__(self, path: Path, anew: str = "begin anew with --restart"):
        self.path, self.anew = path, anew

    def read(self) -> dict[str, Any] | None:
        """What was written last; None if nothing was.

        Raises:
            ValueError: if it is not what `write` wrote.
        """
        if not self.path.is_file():
            return None
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}; {self.anew}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{self.path} holds no object; {self.anew}")
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replaces what is there; on disk when this returns.

        Raises:
            ValueError: if the disk takes no more. What was there stays then.
        """
        write_durably(self.path, json.dumps(state, ensure_ascii=False))


def write_durably(path: Path, text: str) -> None:
    """Writes a file that after a power cut is there as a whole or not at all.

    Raises:
        ValueError: if the disk takes no more.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        with aside.open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_be_written(path, 0, error) from error


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to disk, where the system has a way to."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

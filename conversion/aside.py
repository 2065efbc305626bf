"""The directory beside the target that a conversion writes, and how it becomes the target.

What belongs here: that only one process writes it, that there is room for it, that what is in it is on disk
before it gets its name, and that an error leaves nothing behind. After a kill it stays, and the same call
goes on from it (`journal.py`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.data.journal import sync_folder

from . import journal

LOCK = "lock"
# Configuration, index and report, which are small and written last; and what a file system takes for itself.
_RESERVE = 2**20


def place_aside(target: Path) -> Path:
    """Where a target is written."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Makes the directory aside and keeps other processes out of it. An error removes it, a kill does not.

    Raises:
        ValueError: if another process is writing it.
        OSError: if it cannot be made.
    """
    aside = place_aside(target)
    made = [folder for folder in aside.parents if not folder.exists()]
    aside.mkdir(parents=True, exist_ok=True)
    with (aside / LOCK).open("w") as lock:
        _lock(lock, aside)
        try:
            yield aside
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise


def keep(aside: Path, target: Path) -> None:
    """Gives the directory aside the target's name, once everything in it is on disk."""
    for name in (journal.NAME, LOCK):
        (aside / name).unlink(missing_ok=True)
    for file in aside.iterdir():
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(aside)
    if target.exists():
        target.rmdir()
    aside.rename(target)
    sync_folder(target.parent)


def keep_file(aside: Path, target: Path) -> None:
    """Gives the one file of weights in the directory aside the target's name, and removes the directory."""
    (file,) = aside.glob(f"*{target.suffix}")
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if target.exists():  # an empty directory
        target.rmdir()
    file.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def require_space(target: Path, needed: int) -> None:
    """Checks that there is room for this many bytes, of which some may be written already.

    Raises:
        ValueError: with what is needed and what is there.
    """
    place = next(folder for folder in target.parents if folder.is_dir())
    aside = place_aside(target)
    if aside.is_dir():
        needed -= sum(_bytes_on_disk(file) for file in aside.iterdir())
    available = shutil.disk_usage(place).free
    if needed + _RESERVE > available:
        raise ValueError(
            f"{place} has no room for {target.name}: {needed + _RESERVE:,} bytes are needed, {available:,} "
            "are free"
        )


def _bytes_on_disk(file: Path) -> int:
    found = file.stat()
    # Of a file that is not filled yet, what is filled.
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def _lock(lock, aside: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system; then nobody watches
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is writing {aside}; wait for it, or end it") from error
    # It may have ended, and taken its directory with it, just before.
    if not (aside / LOCK).exists() or not os.path.samestat(os.fstat(lock.fileno()), (aside / LOCK).stat()):
        raise ValueError(f"another process has just written {aside}; look at its result")

"""The directory beside the target that a conversion writes, and how it becomes the target.

What belongs here: that nothing is in the target's way, that only one process writes it, that there is room
for it, that what is in it is on disk before it gets its name, and that an error leaves nothing behind. After
a kill it stays, and the same call goes on from it (`journal.py`).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.data.journal import sync_folder

from . import journal

# Configuration, index and report, which are small and written last; and what a file system takes for itself.
_RESERVE = 2**20


class TargetAppeared(ValueError):
    """The target came to be while it was written; what is written stays for the same call to keep."""


def place_aside(target: Path) -> Path:
    """Where a target is written."""
    return target.with_name(f".{target.name}.partial")


def resolve_target(target: str | Path) -> Path:
    """The full path of a target, once nothing is in its way.

    Raises:
        ValueError: naming what is.
    """
    try:
        place = Path(target).resolve()
    except (OSError, RuntimeError) as error:  # the latter for links that lead to each other
        raise ValueError(f"{target} cannot be a target: its links lead nowhere") from error
    if place == Path.cwd():
        raise ValueError(f"{place} is the current directory, which cannot be replaced; name a new one")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so there can be no {target}; choose another target")
    if not _is_free(place):
        raise ValueError(f"{place} is there already and not empty; choose another target")
    return place


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Makes the directory aside and keeps other processes out of it. An error removes it, a kill does not.

    Raises:
        ValueError: if another process is writing it or has just written the target, or if something else has
            its place.
        TargetAppeared: from `keep`; then it stays.
        OSError: if it cannot be made.
    """
    aside = place_aside(target)
    made = [folder for folder in aside.parents if not folder.exists()]
    if aside.exists() and not aside.is_dir():
        raise ValueError(f"{aside} is a file, where {target.name} is to be written; take it away")
    aside.mkdir(parents=True, exist_ok=True)
    try:
        lock = (aside / journal.LOCK).open("w")
    except FileNotFoundError as error:  # kept, or removed, since the line before
        raise ValueError(f"another process has just written {aside}; look at its result") from error
    with lock:
        _lock(lock, aside)
        try:
            # Who held the lock before may have finished since these were looked at.
            if not _is_free(target):
                raise ValueError(f"another process has just written {target}; choose another target")
            _require_own(aside)
            yield aside
        except TargetAppeared:
            raise
        except Exception as error:
            if _holds(lock, aside):
                _remove(aside, foreign=isinstance(error, _ForeignFiles))
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()
            raise


def keep(aside: Path, target: Path) -> None:
    """Gives the directory aside the target's name, once everything in it is on disk.

    Raises:
        TargetAppeared: if something has the name.
    """
    for path in aside.rglob("*"):
        if path.is_file():
            _force(path)
        else:
            sync_folder(path)
    sync_folder(aside)
    _make_way(target)
    try:
        aside.rename(target)
    except OSError as error:
        if not _is_free(target):  # just now
            raise _appeared(target) from error
        raise
    sync_folder(target.parent)
    # Until here they keep others out, and let the same call go on.
    for name in (journal.NAME, journal.LOCK):
        (target / name).unlink(missing_ok=True)
    sync_folder(target)


def keep_file(aside: Path, target: Path) -> None:
    """Gives the one file of weights in the directory aside the target's name, and removes the directory.

    Raises:
        TargetAppeared: if something has the name.
    """
    (file,) = aside.glob(f"*{target.suffix}")
    _force(file)
    _make_way(target)
    file.rename(target)
    sync_folder(target.parent)
    _remove(aside)


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


class _ForeignFiles(ValueError):
    pass


def _require_own(aside: Path) -> None:
    """Refuses a directory that no conversion has left: one begins with its journal."""
    others = sorted(path.name for path in aside.iterdir() if path.name != journal.LOCK)
    if others and journal.NAME not in others:
        raise _ForeignFiles(
            f"{aside} holds {others[0]} and no {journal.NAME}, so no conversion has left it; move it away"
        )


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _make_way(target: Path) -> None:
    """Removes the empty directory that a target may be."""
    if not _is_free(target):
        raise _appeared(target)
    with suppress(FileNotFoundError):
        target.rmdir()


def _appeared(target: Path) -> TargetAppeared:
    return TargetAppeared(
        f"{target} has appeared meanwhile and is not empty; move it away, and the same call keeps what is "
        f"written in {place_aside(target)}"
    )


def _force(file: Path) -> None:
    """Brings a file's bytes to disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(aside: Path, foreign: bool = False) -> None:
    """Removes the directory aside, the lock last, as others wait for it; of a foreign one only the lock."""
    with suppress(OSError):
        if not foreign:
            journal.clear(aside)
        (aside / journal.LOCK).unlink()
        if not foreign:
            aside.rmdir()


def _bytes_on_disk(file: Path) -> int:
    found = file.stat()
    # A file that is not filled yet has its whole size and fewer blocks.
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
    if not _holds(lock, aside):
        raise ValueError(f"another process has just written {aside}; look at its result")


def _holds(lock, aside: Path) -> bool:
    """Whether the directory's lock is this one, and not that of a later directory of the same name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (aside / journal.LOCK).stat())
    except OSError:
        return False

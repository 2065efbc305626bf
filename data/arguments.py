"""Whether a later call is the one that began what lies on disk: the same arguments, the same files.

What belongs here: comparing both, and the sentence about what differs. What a call writes down, and where, is
its own business.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def file_states(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of every file, by its path."""
    stats = {str(file): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def require_same(before: dict[str, Any], now: dict[str, Any], begun: Path, anew: str) -> None:
    """Whether going on gives what was begun.

    Args:
        before, now: arguments by name, as JSON holds them, with `files` as `file_states` returns them.
        begun: what an earlier call began.
        anew: what else the user can do, for the sentence: "or ...".

    Raises:
        ValueError: if an argument or a file is another.
    """
    other = [name for name in now if name != "files" and before.get(name) != now[name]]
    if other:
        raise ValueError(
            f"{begun} was begun with another value of {', '.join(other)} "
            f"({other[0]}: {before.get(other[0])}, now {now[other[0]]}); give the same, {anew}"
        )
    old, new = before["files"], now["files"]
    if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        what = "is new" if changed[0] not in old else "is gone" if changed[0] not in new else "has changed"
        raise ValueError(f"{changed[0]} {what} since {begun} was begun; put it back as it was, {anew}")

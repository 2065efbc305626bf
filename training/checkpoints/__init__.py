"""Checkpoints: written aside and beside training, hashed, renamed into place, verified before they are read.

What belongs here: what a checkpoint holds (`snapshots.py`, `random_state.py`), how it comes to a disk
(`writer.py`, `durable.py`), which ones stay (`policy.py`), and how they are found and read (`store.py`).
"""

from .store import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_verified,
    save_checkpoint,
    verify,
)

__all__ = [
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "newest_verified",
    "save_checkpoint",
    "verify",
]

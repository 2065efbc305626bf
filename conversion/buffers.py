"""Memory for tensors that pass by, used again for the next.

Pages that are new to a process must be zeroed by the system first, which takes longer than to read into them.
What belongs here: which memory is kept for later, and how much of it.
"""

import threading
import weakref

import numpy as np

# Bytes that are kept in all; larger tensors get memory of their own.
KEPT = 2**28


class Buffers:
    """Memory that comes back when the last array or tensor on it is gone.

    Args:
        kept: bytes to hold for later, at most.
    """

    def __init__(self, kept: int = KEPT):
        self._kept = kept
        self._free: list[np.ndarray] = []
        # Taken again by the same thread where collecting garbage gives memory back.
        self._lock = threading.RLock()

    def take(self, size: int) -> np.ndarray:
        """Bytes [size] of any content."""
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if size <= memory.nbytes <= 2 * size]
            if fitting:
                memory = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
            else:
                memory = np.empty(size, dtype=np.uint8)
        view = memory[:size]
        weakref.finalize(view, self._give_back, memory)
        return view

    def _give_back(self, memory: np.ndarray) -> None:
        with self._lock:
            if memory.nbytes <= self._kept // 2:
                self._free.append(memory)
            # The oldest go first.
            while sum(each.nbytes for each in self._free) > self._kept:
                self._free.pop(0)

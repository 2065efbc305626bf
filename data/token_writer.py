"""Writing `train.bin` or `val.bin` with its `.idx`, so that it can be gone on with after a kill.

What belongs here: one split on disk while it grows. The format is that of `data/token_files.py`.
"""

from pathlib import Path

import numpy as np

from .journal import GrowingFile
from .token_files import DTYPES


class TokenWriter:
    """Writes one split.

    Args:
        folder: where `<split>.bin` and `<split>.idx` go.
        split: `train` or `val`.
        dtype: name of the type, of `DTYPES`.
        between: ids that stand between documents but not after the last one, as a line break does; none
            where an end-of-text token ends every document.
        mark: what `mark` returned; default: an empty split.

    Raises:
        ValueError: if the files are shorter than they were at the mark.
    """

    def __init__(self, folder: Path, split: str, dtype: str, between: list[int], mark: dict | None = None):
        mark = mark or {"documents": 0, "ids": 0, "text_bytes": 0, "max_id": 0}
        self._type = np.dtype(DTYPES[dtype])
        self._between = np.asarray(between, dtype=self._type)
        self.documents: int = mark["documents"]
        self._ids: int = mark["ids"]
        self._text_bytes: int = mark["text_bytes"]
        self.max_id: int = mark["max_id"]
        # The last separator may be gone already: `finish` takes it off.
        self._bin = GrowingFile(folder / f"{split}.bin", self.tokens * self._type.itemsize)
        if self.documents:
            self._bin.append(self._between.tobytes())
        self._idx = GrowingFile(folder / f"{split}.idx", self.documents * 8)

    @property
    def tokens(self) -> int:
        """Tokens, if this is all."""
        return self._ids - (len(self._between) if self.documents else 0)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text so far, with one for each separator that has text on both sides."""
        return self._text_bytes + max(self.documents - 1, 0)

    def add(self, ids: np.ndarray, ends: np.ndarray, num_bytes: int) -> None:
        """Adds documents that follow each other.

        Args:
            ids: their ids [N], each with its separator.
            ends: where in `ids` each document ends [documents].
            num_bytes: of their text.
        """
        starts = np.empty(len(ends), dtype="<u8")
        starts[0] = 0
        starts[1:] = ends[:-1]
        starts += np.uint64(self._ids)
        self._idx.append(starts.tobytes())
        self._bin.append(ids.astype(self._type, copy=False).tobytes())
        self.documents += len(ends)
        self._ids += len(ids)
        self._text_bytes += num_bytes
        if len(ids):
            self.max_id = max(self.max_id, int(ids.max()))

    def take_back(self, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Counts the last documents out, and returns them as `add` takes them.

        Their bytes leave the files with `close`: until a journal says that they are elsewhere they are here.

        Args:
            sizes: bytes of the text of each.
        """
        first = self.documents - len(sizes)
        starts = np.frombuffer(self._idx.read(first * 8, self.documents * 8), dtype="<u8").astype(np.int64)
        size = self._type.itemsize
        ids = np.frombuffer(self._bin.read(int(starts[0]) * size, self._ids * size), dtype=self._type)
        ends = np.append(starts[1:], self._ids) - starts[0]
        self.documents, self._ids = first, int(starts[0])
        self._text_bytes -= sum(sizes)
        return ids, ends

    def mark(self) -> dict:
        """Forces everything to disk; a writer that is given what this returns goes on from here."""
        self._bin.sync()
        self._idx.sync()
        return {
            "documents": self.documents,
            "ids": self._ids,
            "text_bytes": self._text_bytes,
            "max_id": self.max_id,
        }

    def finish(self) -> dict:
        """Writes what is at the end of both files, and returns their counts."""
        self._bin.cut(self.tokens * self._type.itemsize)
        self._idx.cut(self.documents * 8)
        self._idx.append(np.array([self.tokens], dtype="<u8").tobytes())
        self._bin.sync()
        self._idx.sync()
        self.close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "max_id": self.max_id,
        }

    def close(self) -> None:
        """Closes both files as they are."""
        self._bin.close()
        self._idx.close()

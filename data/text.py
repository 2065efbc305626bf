"""From documents to streams of tokens.

What belongs here: the split into training and validation, and what a stream of tokens is. The rows that are
made of it are in `training_rows.py`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

# From this many documents on, whole documents are held out; below it, the tail of the text is.
MANY_DOCUMENTS = 20


def split_documents(documents: list[bytes], fraction: float = 0.1) -> tuple[list[bytes], list[bytes]]:
    """Splits text into training and validation.

    Many documents are split whole, by a hash of their content, so that one document more does not move the
    others. Few are taken as one text, whose end is held out; so are those that the hashes leave on one side.

    Args:
        documents: the texts.
        fraction: share of the bytes (of few) or of the documents (of many) to hold out.
    """
    if len(documents) >= MANY_DOCUMENTS:
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for document in documents:
            draw = int.from_bytes(hashlib.sha256(document).digest()[:8], "little") / 2**64
            parts[draw < fraction].append(document)
        if all(parts):
            return parts
    text = b"\n".join(documents)
    cut = len(text) - int(len(text) * fraction)
    return [text[:cut]], [text[cut:]]


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids.

    Attributes:
        ids: [N].
        num_bytes: of the text that it stands for.
        starts: where documents start, and the end [D + 1]; a document includes the separator after it. None
            if that is not known.
    """

    ids: np.ndarray
    num_bytes: int
    starts: np.ndarray | None = None


def find_starts(ids: np.ndarray, end: int | None) -> np.ndarray | None:
    """Where documents start, and the end [D + 1], by the token that ends them; None if there is none."""
    if end is None:
        return None
    block = 2**24
    blocks = range(0, len(ids), block)
    ends = [np.flatnonzero(ids[first : first + block] == end) + first + 1 for first in blocks]
    starts = np.concatenate([[0], *ends, [len(ids)]])
    if len(starts) == 2:
        return None
    return starts[:-1] if starts[-1] == starts[-2] else starts

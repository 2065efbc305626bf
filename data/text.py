"""From documents to rows of tokens.

What belongs here: the split into training and validation, and the order in which training sees its windows,
which is a pure function of the seed, so that any step can be computed without those before it.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

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
    """A stream of token ids and the number of bytes of text that it stands for."""

    ids: np.ndarray  # [N]
    num_bytes: int


class Windows:
    """Windows of a token stream, shuffled anew each epoch, addressed by their number in the order of
    training.

    An epoch is the non-overlapping windows from a random start; the next epoch starts elsewhere. Row `i` is
    the same whatever the batch size and the number of processes.

    Args:
        ids: token ids [N].
        length: positions in a window; a row is one longer, for the targets.
        seed: of starts and orders.

    Raises:
        ValueError: if the stream is shorter than a window.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int = 0):
        if len(ids) < length + 1:
            raise ValueError(
                f"the text to train on has {len(ids)} tokens, but a window of {length} needs {length + 1}; "
                "give more text or a shorter window"
            )
        self.ids, self.length, self.seed = ids, length, seed
        # Short of one window, so that every start leaves as many whole ones.
        self.per_epoch = max((len(ids) - 1) // length - 1, 1)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def row(self, i: int) -> np.ndarray:
        """Row number `i` [length + 1] as int64."""
        epoch, place = divmod(i, self.per_epoch)
        start, order = self._order(epoch)
        first = start + int(order[place]) * self.length
        return self.ids[first : first + self.length + 1].astype(np.int64)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows `first` to `first + count` [count, length + 1]."""
        return np.stack([self.row(i) for i in range(first, first + count)])

    def _draw_order(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        room = len(self.ids) - 1 - self.per_epoch * self.length
        return int(generator.integers(min(room, self.length) + 1)), generator.permutation(self.per_epoch)

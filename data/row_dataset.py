"""Prepared tokens as a `torch` dataset: rows for Trainer, Accelerate, or a loop of one's own.

What belongs here: the shape in which others read rows. `tessera pretrain` reads them from `training_rows.py`
itself.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .corpora import open_folders
from .training_rows import RowSequence, make_rows


class RowDataset(Dataset):
    """The rows of a whole training run, in the order in which they are to be read.

    Item `i` is a pure function of the arguments: the order is shuffled anew in each epoch already, so read it
    in sequence (`shuffle=False`; for Trainer `train_sampling_strategy="sequential"`) in one pass, and go on
    after any number of items by beginning with the next one. Nothing else is state.

    Args:
        data: prepared folders; several as `folder:weight`, shares of the rows.
        length: positions in a row.
        packing: `best-fit` or `contiguous`.
        isolate_documents: whether position ids restart at documents, which keeps models that understand this
            (all of Tessera's, and transformers' with attention that does) from looking across.
        seed: of the order.
        epochs: how often the data is gone through; of several, the first that is through ends it.
        rows: how many rows there are, instead.

    Raises:
        ValueError: if data cannot be read, do not fit one another, or are too short.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str],
        length: int,
        *,
        packing: str = "best-fit",
        isolate_documents: bool = True,
        seed: int = 0,
        epochs: float = 1,
        rows: int | None = None,
    ):
        self._given = (data, length, packing, isolate_documents, seed, epochs, rows)
        documents = packing != "contiguous" or isolate_documents
        folders = open_folders([data] if isinstance(data, str | Path) else data, documents)
        made = [
            make_rows(one.train, length, packing, seed=seed, isolate=isolate_documents, folder=one.folder)
            for one in folders
        ]
        weights = [one.weight for one in folders]
        self.sequence = RowSequence(made, weights, seed, isolate_documents)
        self.rows = round(self.sequence.rows_in(epochs)) if rows is None else rows
        if self.rows < 1:
            raise ValueError(f"there must be a row or more, got {self.rows}")

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` (to be shifted; -100: none), `position_ids` if isolated [T]."""
        if not -self.rows <= i < self.rows:
            raise IndexError(f"row {i} of {self.rows}")
        batch = self.sequence.batch([i % self.rows])
        row = {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
        return {name: torch.from_numpy(values[0]) for name, values in row.items() if values is not None}

    def __reduce__(self):
        # A worker that is started afresh maps the files itself, instead of being sent what is in them.
        return _reopen, self._given


def _reopen(data, length, packing, isolate_documents, seed, epochs, rows) -> RowDataset:
    return RowDataset(
        data,
        length,
        packing=packing,
        isolate_documents=isolate_documents,
        seed=seed,
        epochs=epochs,
        rows=rows,
    )

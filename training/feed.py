"""What a pretraining run reads, step by step: which rows a process takes, and in what parts.

Row number `g = step * batch_size + i` is a pure function of the data and the seed, and each process takes a
stretch of a step's rows. So a run goes on at the same row on any number of processes, and all that it has to
remember is how many rows it has consumed. What belongs here: from corpora and arguments to tensors. What is
in a row, and their order, are `data/training_rows.py` and `data/order.py`.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from tessera.data.order import share
from tessera.data.packing import RULE
from tessera.data.training_rows import RowSequence, make_rows
from tessera.evaluation.bits_per_byte import TextLoss

from .inputs import Corpus
from .pretrain_arguments import PretrainArguments


class Feed:
    """The rows of a run, as one of its processes reads them.

    Args:
        corpora: one, or several with weights.
        args: of the run.
        length: positions in a row.
        rank, processes: which process of how many this is.

    Raises:
        ValueError: if there is too little text, the rows of a step are fewer than their parts, or documents
            are to be told apart and nobody knows where they start.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        args: PretrainArguments,
        length: int,
        rank: int,
        processes: int,
    ):
        self.corpora, self.args, self.length = corpora, args, length
        self.rank, self.processes = rank, processes
        self.accumulation = self._choose_accumulation()
        rows = [
            make_rows(
                corpus.train,
                length,
                args.packing,
                seed=args.seed,
                isolate=args.isolate_documents,
                folder=corpus.folder,
            )
            for corpus in corpora
        ]
        weights = [corpus.weight for corpus in corpora]
        self.sequence = RowSequence(rows, weights, args.seed, args.isolate_documents)

    def _choose_accumulation(self) -> int:
        """Parts that a process takes its rows of a step in; even ones where that can be."""
        args, count = self.args, self.args.accumulation or 1
        if args.micro_batch_size:
            rows = -(-args.batch_size // self.processes)
            count = -(-rows // args.micro_batch_size)
            if args.batch_size % self.processes == 0:
                count = next(parts for parts in range(count, rows + 1) if rows % parts == 0)
        if args.batch_size // self.processes < count:
            raise ValueError(
                f"batch_size ({args.batch_size}) leaves some of {count} micro-batches on each of "
                f"{self.processes} processes without a row"
            )
        return count

    def numbers(self, step: int) -> range:
        """Numbers of the rows of a step, of all processes."""
        return range(step * self.args.batch_size, (step + 1) * self.args.batch_size)

    def counted(self, step: int) -> int:
        """Targets that count in a step, over all processes."""
        return self.sequence.counted(self.numbers(step))

    def micro_batches(self, step: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The parts of a step that this process takes, as the model's arguments [rows, T]."""
        mine = share(self.numbers(step), self.rank, self.processes)
        for part in range(self.accumulation):
            batch = self.sequence.batch(share(mine, part, self.accumulation))
            # The rows hold their own targets: nothing is shifted inside, and every position counts.
            arrays = {
                "input_ids": batch.input_ids,
                "labels": batch.targets,
                "shift_labels": batch.targets,
                "position_ids": batch.position_ids,
            }
            yield {
                name: torch.from_numpy(array).to(device, non_blocking=True)
                for name, array in arrays.items()
                if array is not None
            }

    def steps_in(self, epochs: float) -> int:
        """Steps until the data, or the first corpus that is through, has been seen so often."""
        return max(1, round(self.sequence.rows_in(epochs) / self.args.batch_size))

    def epochs(self, step: int) -> dict[str, float]:
        """How often the data has been seen, by corpus where there are several; for `metrics.jsonl`."""
        seen = self.sequence.epochs(step * self.args.batch_size)
        if len(seen) == 1:
            return {"epoch": seen[0]}
        names = [corpus.name for corpus in self.corpora]
        return {f"epoch/{name}": value for name, value in zip(names, seen, strict=True)}

    def identity(self) -> dict:
        """What fixes which row a step sees, as JSON."""
        args = self.args
        values = {
            "tokens": [len(corpus.train.ids) for corpus in self.corpora],
            "sha256": [corpus.train_hash for corpus in self.corpora],
            "weights": self.sequence.schedule.turns.tolist(),
            "batch_size": args.batch_size,
            "sequence_length": self.length,
            "packing": args.packing,
            "isolate_documents": args.isolate_documents,
            "seed": args.seed,
        }
        if args.packing == "best-fit":
            values["rule"] = RULE
        if args.packing == "best-fit" or args.isolate_documents:
            values["documents"] = [_hash(corpus.train.starts) for corpus in self.corpora]
        return values

    def mixed(self, losses: list[TextLoss]) -> TextLoss:
        """Held-out losses of all corpora as that of the mixture: per token, by their shares."""
        if len(losses) == 1:
            return losses[0]
        shares = self.sequence.schedule.shares.tolist()
        pairs = list(zip(shares, losses, strict=True))
        tokens = sum(loss.tokens for loss in losses)
        bytes_a_token = sum(share * loss.num_bytes / loss.tokens for share, loss in pairs)
        errors = [loss.stderr for loss in losses]
        known = None not in errors
        return TextLoss(
            sum(share * loss.nats for share, loss in pairs),
            tokens,
            tokens * bytes_a_token,
            math.hypot(*(share * error for share, error in zip(shares, errors, strict=True)))
            if known
            else None,
        )


def _hash(starts: np.ndarray) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(starts), 2**20):
        digest.update(np.asarray(starts[first : first + 2**20], dtype="<u8"))
    return digest.hexdigest()

"""What a pretraining run reads, step by step: which rows a process takes, and in what parts.

Row number `g` is a pure function of the data and the seed; a step has the rows from `rows_before(step)` on,
and each process takes a stretch of them. So a run goes on at the same row on any number of processes, and
all that it has to remember is how many steps it has done. A schedule changes how many rows a step has, or
cuts rows, which are of the longest length, into shorter windows: their order and tokens stay what they are.
What belongs here: from corpora and arguments to tensors. What is in a row, and their order, are
`data/training_rows.py` and `data/order.py`.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from tessera.data.order import share
from tessera.data.packing import RULE
from tessera.data.training_rows import Batch, RowSequence, make_rows
from tessera.evaluation.bits_per_byte import TextLoss

from .inputs import Corpus
from .pretrain_arguments import PretrainArguments
from .schedules import Stage, mean_size, read_stages, sizes_over_steps


class Feed:
    """The rows of a run, as one of its processes reads them.

    Args:
        corpora: one, or several with weights.
        args: of the run.
        length: positions in a row; with a schedule of lengths the longest.
        rank, processes: which process of how many this is.

    Attributes:
        total_steps: of the run; None if it only ends when its minutes are over.
        accumulation: parts that a process takes its rows of a largest step in. A smaller step has so many
            fewer that its parts are not larger.

    Raises:
        ValueError: if there is too little text, the rows of a step are fewer than their parts, documents are
            to be told apart and nobody knows where they start, or a schedule has no steps to go by.
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
        stages, lengths = read_schedules(args, length)
        self.total_steps = self._count_steps(mean_size(stages))
        self._batches = sizes_over_steps(stages, self.total_steps or 0)
        self._lengths = sizes_over_steps(lengths, self.total_steps or 0)
        self.accumulation = choose_accumulation(args, processes)

    def _count_steps(self, rows: float) -> int | None:
        """Steps until the first limit is reached that is no matter of minutes, with so many rows each."""
        args, limits = self.args, []
        if args.steps is not None:
            limits.append(args.steps)
        if args.epochs is not None:
            limits.append(self.sequence.rows_in(args.epochs) / rows)
        if args.tokens is not None:
            limits.append(args.tokens / (rows * self.length))
        return max(1, round(min(limits))) if limits else None

    def rows_before(self, step: int) -> int:
        """Rows of all steps before this one."""
        return self._batches.before(step)

    def rows_of(self, step: int) -> range:
        """Numbers of the rows of a step, of all processes."""
        first = self.rows_before(step)
        return range(first, first + self._batches.at(step))

    def length_at(self, step: int) -> int:
        """Positions in a window of a step."""
        return self._lengths.at(step)

    def tokens_before(self, step: int) -> int:
        """Positions in all rows before a step."""
        return self.rows_before(step) * self.length

    def parts_of(self, step: int) -> int:
        """Parts that a process takes its rows of a step in."""
        rows, largest = len(self.rows_of(step)), self.args.batch_size
        if rows == largest:
            return self.accumulation
        at_once = math.ceil(math.ceil(largest / self.processes) / self.accumulation)
        parts = math.ceil(math.ceil(rows / self.processes) / at_once)
        return min(parts, rows // self.processes)

    def shapes(self, first: int) -> set[tuple[int, int]]:
        """Windows and positions of all micro-batches from a step on, of any process: all get the same."""
        found = set()
        for step in {first, *self._batches.firsts, *self._lengths.firsts}:
            if step < first:
                continue
            parts, length = self.parts_of(step), self.length_at(step)
            for rank in range(self.processes):
                mine = share(self.rows_of(step), rank, self.processes)
                sizes = {len(share(mine, part, parts)) for part in range(parts)}
                found |= {(rows * self.length // length, length) for rows in sizes}
        return found

    def counted(self, step: int) -> int:
        """Targets that count in a step, over all processes."""
        return self.sequence.counted(self.rows_of(step))

    def micro_batches(self, step: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The parts of a step that this process takes, as the model's arguments [windows, T]."""
        mine = share(self.rows_of(step), self.rank, self.processes)
        parts = self.parts_of(step)
        for part in range(parts):
            batch = cut(self.sequence.batch(share(mine, part, parts)), self.length_at(step))
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

    def epochs(self, step: int) -> dict[str, float]:
        """How often the data has been seen, by corpus where there are several; for `metrics.jsonl`."""
        seen = self.sequence.epochs(self.rows_before(step))
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
        if args.batch_schedule:
            values["batch_schedule"] = [list(self._batches.firsts), list(self._batches.sizes)]
        if args.length_schedule:
            values["length_schedule"] = [list(self._lengths.firsts), list(self._lengths.sizes)]
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


def read_schedules(args: PretrainArguments, length: int) -> tuple[list[Stage], list[Stage]]:
    """The rows of a step and the windows that they are cut into, each of one size or of several in turn.

    Args:
        args: of the run.
        length: positions in a row.

    Raises:
        ValueError: if a window does not divide a row, or sizes change and there are no steps to go by.
    """
    stages = read_stages(args.batch_schedule or [f"0:{args.batch_size}"], "batch_schedule")
    lengths = read_stages(args.length_schedule or [f"0:{length}"], "length_schedule")
    for stage in lengths:
        if length % stage.size:
            raise ValueError(
                f"length_schedule: windows of {stage.size} do not divide rows of {length}, the longest"
            )
    if (args.batch_schedule or args.length_schedule) and args.steps is args.epochs is args.tokens is None:
        raise ValueError(
            "batch_schedule and length_schedule need a length in steps, epochs or tokens; minutes may end "
            "the run sooner"
        )
    return stages, lengths


def choose_accumulation(args: PretrainArguments, processes: int) -> int:
    """Parts that a process takes its rows of a largest step in; even ones where that can be.

    Args:
        args: of the run.
        processes: that have rows of their own.

    Raises:
        ValueError: if the rows of a step are fewer than their parts.
    """
    count = args.accumulation or 1
    if args.micro_batch_size:
        rows = -(-args.batch_size // processes)
        count = -(-rows // args.micro_batch_size)
        if args.batch_size % processes == 0:
            count = next(parts for parts in range(count, rows + 1) if rows % parts == 0)
    if args.batch_size // processes < count:
        raise ValueError(
            f"batch_size {args.batch_size} is less than a row for each micro-batch of each process "
            f"({count} x {processes}); give {count * processes} or more"
        )
    stages = read_stages(args.batch_schedule or [f"0:{args.batch_size}"], "batch_schedule")
    if (least := min(stage.size for stage in stages)) < processes:
        raise ValueError(f"batch_schedule: {least} rows leave some of {processes} processes without one")
    return count


def cut(batch: Batch, length: int) -> Batch:
    """Rows cut into shorter windows, one after the other.

    Args:
        batch: [B, T].
        length: positions in a window; it divides T.

    Returns:
        [B * T / length, length]; what goes on from one window to the next starts at position 0 there.
    """
    if length == batch.input_ids.shape[1]:
        return batch
    positions = batch.position_ids
    if positions is not None:
        positions = positions.reshape(-1, length)
        restarted = np.cumsum(np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1, axis=1)
        positions = positions - np.where(restarted, 0, positions[:, :1])
    return Batch(batch.input_ids.reshape(-1, length), batch.targets.reshape(-1, length), positions)


def _hash(starts: np.ndarray) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(starts), 2**20):
        digest.update(np.asarray(starts[first : first + 2**20], dtype="<u8"))
    return digest.hexdigest()

"""Writes checkpoints beside training, and keeps what the policy says.

- at most one is being written; the next one waits for it;
- a checkpoint that cannot be written (a full disk, a folder that is gone) costs a sentence, and training goes
on: the last good one stays, and the next checkpoint is the next attempt. Only the end of a run insists;
- processes but the first have no part in it once the snapshot is taken.

What belongs here: the thread, what becomes of its errors, and the time that all this takes from training.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from transformers import PreTrainedTokenizerBase

from tessera.data.journal import write_durably

from .policy import CheckpointPolicy
from .snapshots import Snapshot, Snapshots
from .store import (
    clear_leftovers,
    list_checkpoints,
    place_of,
    remove_checkpoint,
    step_of,
    write_checkpoint,
)

BEST_FILE = "best.json"


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class CheckpointWriter:
    """The checkpoints of a run, as all of its processes see them; a context, which waits at its end.

    Args:
        folder: `checkpoints/` of the run.
        accelerator: of the run.
        policy: which ones stay.
        background: write beside training; else training waits.
        say: takes a sentence for the user.

    Attributes:
        step: of the newest checkpoint, or of the one that is being written; None before the first.
        cost: seconds that the newest one kept training waiting.
        lost: seconds that all of them did.
        writing: seconds that the last one took to write, beside training or not.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        policy: CheckpointPolicy,
        background: bool = True,
        say: Callable[[str], None] = _to_stderr,
    ):
        self.folder, self.accelerator, self.policy = folder, accelerator, policy
        self.background, self.say = background, say
        self.snapshots = Snapshots(accelerator, lasting=background)
        self.step: int | None = None
        self.cost = self.lost = self.writing = 0.0
        self.best: tuple[int, float] | None = None
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # Whoever interrupts twice does not want to wait.
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()

    def resumed(self, step: int, in_place: bool = True) -> None:
        """Says that the run goes on from a checkpoint, which is one of this folder or not."""
        self.step = step if in_place else None
        try:
            noted = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))
            best = int(noted["step"]), float(noted["bits_per_byte"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        # A better one that lies ahead is not of this run, which will not come by there the same way.
        self.best = best if best[0] <= step and place_of(self.folder, best[0]).is_dir() else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> bool:
        """Takes a snapshot and has it written. All processes call it.

        One that cannot be written costs a sentence. A step that is saved already is not saved again.

        Args:
            step: optimizer steps done.
            model: wrapped or not.
            optimizer: the one inside accelerate's wrapper.
            state: what else a resumed run needs, as JSON.
            tokenizer: goes beside the model.

        Returns:
            Whether there was anything to save.
        """
        started = time.perf_counter()
        self.wait()
        if self.step == step and not self._agree(float(self._problem is not None)):
            return False
        snapshot = self.snapshots.take(step, model, optimizer, state, tokenizer)
        self.step = step
        if snapshot is not None and self.background:
            # A daemon: a second signal is not to wait for a slow disk. Whatever else ends a run waits.
            self._thread = threading.Thread(
                target=self._write, args=(snapshot,), name="checkpoint", daemon=True
            )
            self._thread.start()
        elif snapshot is not None:
            self._write(snapshot)
        if not self.background:
            self.accelerator.wait_for_everyone()
        self.cost = time.perf_counter() - started
        self.lost += self.cost
        return True

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits for the newest checkpoint and insists on it. All processes call it.

        Raises:
            OSError: if it could not be written, in all processes.
        """
        started = time.perf_counter()
        self.wait()
        failed = self._agree(float(self._problem is not None))
        self.lost += time.perf_counter() - started
        if failed:
            raise OSError(self._problem or f"the checkpoint of step {self.step} could not be written")

    def is_due_before_evaluation(self, seconds: float) -> bool:
        """As the policy's, with what checkpoints cost the first process. All processes call it."""
        return bool(self._agree(float(self.policy.is_due_before_evaluation(seconds, self.cost))))

    def is_better(self, bits_per_byte: float) -> bool:
        """Whether a score is the best so far and a policy keeps the best. All processes call it."""
        if not self.policy.keep_best:
            return False
        return bool(self._agree(float(self.best is None or bits_per_byte < self.best[1])))

    def note_best(self, bits_per_byte: float) -> None:
        """Says that the newest checkpoint is the best so far. All processes call it."""
        self.wait()
        if self._problem is not None or self.step is None:
            return
        self.best = self.step, bits_per_byte
        if self.accelerator.is_main_process:
            values = {
                "step": self.step,
                "bits_per_byte": bits_per_byte,
                "checkpoint": place_of(self.folder, self.step).name,
            }
            try:
                write_durably(self.folder / BEST_FILE, json.dumps(values, indent=2) + "\n")
            except ValueError as error:
                self.say(str(error))

    def _agree(self, value: float) -> float:
        """The first process's value."""
        if self.accelerator.num_processes == 1:
            return value
        return broadcast(torch.tensor(value, device=self.accelerator.device)).item()

    # ---- the first process, beside training ----

    def _write(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            write_checkpoint(self.folder, snapshot)
            self._problem = None
        except Exception as error:  # of any kind: a run is worth more than its checkpoint
            last = [step_of(path) for path in list_checkpoints(self.folder)]
            last = [step for step in last if step != snapshot.step]
            there = f"that of step {last[-1]} is there" if last else "there is none before it"
            self._problem = (
                f"the checkpoint of step {snapshot.step} was not written ({_reason(error)}); {there}"
            )
            self.say(self._problem)
            return
        finally:
            self.writing = time.perf_counter() - started
        try:
            self._prune(snapshot.step)
        except OSError as error:
            self.say(f"an old checkpoint was not removed: {_reason(error)}")

    def _prune(self, newest: int) -> None:
        there = {step_of(path): path for path in list_checkpoints(self.folder)}
        best = None if self.best is None else self.best[0]
        for step in there.keys() - self.policy.kept(list(there), newest, best):
            remove_checkpoint(there[step])
        clear_leftovers(self.folder)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return " ".join(str(error).split()) or type(error).__name__

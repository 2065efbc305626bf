"""What a TRL trainer lacks for a Tessera run: plain checkpoints and a journal.

- Checkpoints are those of `checkpoints/store.py`, safetensors and JSON, written aside and renamed into
  place. The Trainer's own are pickles and lie half-written where a run is killed.
- The journal keeps `metrics.jsonl` and says when to evaluate and to save.

What belongs here: only what the trainers of all three kinds of post-training need.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from .checkpoints.random_state import restore_random_state
from .checkpoints.store import save_checkpoint
from .optimizers.state import restore_state
from .records.curves import read_metrics

SECONDS_BETWEEN_LINES = 10.0  # where there is no progress bar


class PlainCheckpoints:
    """For a Trainer, before its class: checkpoints as in `checkpoints/store.py` instead of its own."""

    checkpoint: Path | None = None

    def resume(self, checkpoint: Path) -> None:
        """Trains on from a checkpoint that `_save_checkpoint` wrote."""
        self.checkpoint = checkpoint
        with tempfile.TemporaryDirectory() as folder:
            # The one file of a checkpoint that the Trainer reads itself.
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            (Path(folder) / "trainer_state.json").write_text(json.dumps(state["trainer"]), encoding="utf-8")
            self._total_train_tokens = state["tokens"]
            self.train(resume_from_checkpoint=folder)

    def _save_checkpoint(self, model, trial) -> None:
        state = {
            "tokens": self._total_train_tokens,
            "trainer": asdict(self.state),
            "scheduler": self.lr_scheduler.state_dict(),
        }
        folder, step = Path(self.args.output_dir), self.state.global_step
        optimizer = self.optimizer.optimizer  # inside accelerate's
        save_checkpoint(folder, step, self.accelerator, self.model, optimizer, state, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(str(self.checkpoint), model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        saved = load_file(self.checkpoint / "optimizer.safetensors")
        model = self.accelerator.unwrap_model(self.model)
        restore_state(model, self.optimizer.optimizer, saved, self.checkpoint)
        state = json.loads((self.checkpoint / "state.json").read_text(encoding="utf-8"))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None:
            return
        restore_random_state(self.checkpoint, self.accelerator.process_index)


class Journal(TrainerCallback):
    """Progress on the terminal, `metrics.jsonl`, evaluations and the times of checkpoints."""

    def __init__(self, shop, trainer: Trainer, evaluate: Callable, describe: Callable):
        self.shop, self.trainer = shop, trainer
        self.evaluate, self.describe = evaluate, describe
        self.file = shop.folder / "metrics.jsonl"
        self.step = self.tokens = 0
        self.seconds, self.status = 0.0, ""

    def begin(self) -> dict[str, float]:
        """Begins the run directory; what is measured before training, or was before the run that goes on."""
        is_main, checkpoint = self.shop.processes.is_main_process, self.shop.checkpoint
        if is_main:
            self.shop.write_recipe()
        if checkpoint is None:
            return self.measure()
        self.step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
        kept = [record for record in read_metrics(self.file) if record["step"] <= self.step]
        self.seconds = kept[-1]["seconds"]
        if is_main:
            aside = self.file.with_suffix(".partial")
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            aside.replace(self.file)
        return {key: value for key, value in kept[0].items() if key not in ("step", "tokens", "seconds")}

    def measure(self) -> dict[str, float]:
        """Evaluates and records."""
        self.trainer.model.eval()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            measured = self.evaluate(self.trainer.model)
        self._record(measured)
        return measured

    def _record(self, values: dict[str, float]) -> None:
        if self.shop.processes.is_main_process:
            record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
            record.update({key: round(float(value), 6) for key, value in values.items()})
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Opens the bar."""
        self.started = self.saved = self.said = time.perf_counter()
        self.earlier = self.seconds
        self.every = state.max_steps / (self.shop.args.evaluations + 1)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            # None: no bar where nobody sees it move; there, a line now and then.
            disable=None if self.shop.processes.is_main_process else True,
            desc="training",
            file=sys.stderr,
            mininterval=0.5,
        )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Records what a step measured."""
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        if not math.isfinite(float(logs["loss"])):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower --learning-rate"
            )
        self.tokens = int(logs.get("num_tokens", self.tokens))
        shown = ("loss", "reward", "rewards/accuracies")
        self.status = ", ".join(
            f"{key.split('/')[-1]} {float(logs[key]):.3f}" for key in shown if key in logs
        )
        values = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        self._record({key: v for key, v in values.items() if key != "num_tokens" and math.isfinite(v)})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Moves the bar; evaluates and asks for a checkpoint when it is time."""
        now = time.perf_counter()
        self.step, self.seconds = state.global_step, self.earlier + now - self.started
        self.bar.set_postfix_str(self.status, refresh=False)
        self.bar.update(1)
        share = f"{100 * self.step / state.max_steps:3.0f} %"
        if self.bar.disable and self.shop.processes.is_main_process:
            if now - self.said >= SECONDS_BETWEEN_LINES:
                self.said = now
                print(f"{share}  {self.status}", file=sys.stderr, flush=True)
        due = int(self.step / self.every) > int((self.step - 1) / self.every)
        if due and self.step < state.max_steps:
            described = self.describe(self.measure())
            if self.shop.processes.is_main_process:
                self.bar.write(f"{share}  {described}", file=sys.stderr)
            self.trainer.model.train()
        minutes = self.shop.args.checkpoint_minutes
        if minutes and now - self.saved >= 60 * minutes:
            self.saved = now
            control.should_save = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Closes the bar."""
        self.bar.close()

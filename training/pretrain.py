"""Pretraining on text: `tessera pretrain`, or `accelerate launch -m tessera.training.pretrain`.

Notable:
- the loss is divided by the tokens of the whole step, so neither accumulation nor the number of processes
changes it;
- row `i` of the data is a pure function of the seed, so a run resumes to the sample on any number of
processes;
- progress, and with it the learning rate, is the larger share of steps and of minutes that is used up;
- a run directory is a Hugging Face model at every checkpoint and at its end.

What belongs here: the loop and what it is told. Optimizers, schedules, checkpoints and pictures have their
own files.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, parse_flag_from_env, set_seed
from tqdm import tqdm

from tessera.configs.resolve import is_byte_gpt_file, resolve_config
from tessera.data.text import Windows, read_documents, split_documents
from tessera.evaluation.bits_per_byte import TextLoss, text_loss
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import load_model
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .checkpoints import find_checkpoint, load_checkpoint, newest_verified, save_checkpoint
from .curves import draw_curve, read_metrics
from .inputs import encode, load_tokenizer
from .optimizers import build_optimizer
from .schedules import cosine_with_warmup

LOGITS_AT_A_TIME = 2**26  # of a validation batch; 256 MiB in fp32
SECONDS_BETWEEN_LINES = 10.0  # where there is no progress bar


@dataclass
class PretrainArguments:
    """What a run is told; saved as `recipe.yaml`.

    Attributes:
        config: preset, Tessera config file, or ByteGPT's own JSON.
        data_file: text file or folder of text files.
        save_path: run directory; a name ending in `.safetensors` also gets the final weights as that file.
        ckpt_path: directory of weights or of a run to start from; passed over, with a word, if nothing is
            there yet.
        tokenizer: directory or Hub name; bytes if not given.
        epochs, steps, minutes: length of the run; the first that is reached ends it. Default: one epoch.
        batch_size: windows in an optimizer step, over all processes.
        accumulation: micro-batches that a step is split into on each process.
        sequence_length: positions in a window; default: the model's context, at most 1024.
        optimizer: `muon` or `adamw`; default: muon, but adamw, as in the original, for ByteGPT's own JSON.
        learning_rate, weight_decay, warmup, floor, clip: see `optimizers.py` and `schedules.py`;
            `clip` is the largest gradient norm, 0 for none.
        seed: of weights, data order and dropout.
        evaluations: validation passes during the run, beside those at its start and end.
        eval_tokens: tokens, about, of the validation text that those during the run see; the last sees all.
        checkpoint_minutes: minutes between checkpoints; 0 for none but the last.
        gradient_checkpointing: recompute activations in the backward pass.
        sample_prompt, sample_tokens: text that samples start with, and their length.
    """

    config: str
    data_file: str
    save_path: str = "runs/pretrain"
    ckpt_path: str | None = None
    tokenizer: str | None = None
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    sequence_length: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.02
    floor: float = 0.0
    clip: float = 1.0
    seed: int = 0
    evaluations: int = 4
    eval_tokens: int = 50_000
    checkpoint_minutes: float = 10.0
    gradient_checkpointing: bool = False
    sample_prompt: str = "\n"
    sample_tokens: int = 300

    def __post_init__(self):
        for name in ("batch_size", "accumulation", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "steps", "minutes", "sequence_length", "learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "evaluations", "checkpoint_minutes", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.epochs is None and self.steps is None and self.minutes is None:
            self.epochs = 1


@dataclass
class PretrainResult:
    """What a run leaves: where, and its validation loss before and after."""

    folder: Path
    final: Path
    before: TextLoss
    after: TextLoss
    seconds: float
    tokens: int
    sample: str


def pretrain(args: PretrainArguments, resume: bool = False) -> PretrainResult:
    """Trains a model on text and writes the run directory.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies.

    Raises:
        ValueError: for what cannot work: in the arguments, configuration, text, tokenizer or checkpoint.
            Nothing that was there is touched then.
        FloatingPointError: if the loss is no longer a number.
        KeyboardInterrupt: after Ctrl-C, once the step is done and a checkpoint is written.
    """
    return Run(args, resume).run()


class Run:
    """A run that is ready to start. Making one checks all that it is told and writes nothing.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies.
        replace: what lies in `save_path` goes when the run starts.

    Raises:
        ValueError: as `pretrain`.
    """

    def __init__(self, args: PretrainArguments, resume: bool = False, replace: bool = False):
        if args.optimizer is None:
            args = dataclasses.replace(args, optimizer="adamw" if is_byte_gpt_file(args.config) else "muon")
        self.args, self.resume, self.replace = args, resume, replace
        # Said aloud, because accelerate takes processes on a CPU for so many runs of one process otherwise.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        bf16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no")
        # A launcher's own setting would divide every loss once more.
        self.accelerator.gradient_accumulation_steps = 1
        set_seed(args.seed)
        self.weights_file = Path(args.save_path) if args.save_path.endswith(".safetensors") else None
        self.folder = self.weights_file.with_suffix("") if self.weights_file else Path(args.save_path)
        self._check_folder()
        config = resolve_config(args.config)
        self.tokenizer, config = load_tokenizer(args.tokenizer, config)
        self.length = args.sequence_length or min(config.max_position_embeddings, 1024)
        if self.length > config.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.length} is longer than the model's context of "
                f"{config.max_position_embeddings} positions"
            )
        train, val = split_documents(read_documents(args.data_file))
        if not val:
            raise ValueError(f"{args.data_file} leaves no text for validation; give more of it")
        self.train, self.val = encode(self.tokenizer, train), encode(self.tokenizer, val)
        if len(self.val.ids) < 2:
            raise ValueError(f"{args.data_file} is too short: its last tenth is for validation")
        self.windows = Windows(self.train.ids, self.length, args.seed)
        self.prompt = self._encode_prompt(config)
        self._plan()
        self.model = self._make_model(config)
        self.optimizer = build_optimizer(self.model, args.optimizer, args.learning_rate, args.weight_decay)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.wrapped, self.wrapped_optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.step, self.seconds = 0, 0.0
        # From here on chance is dropout's, which is not to be the same on all processes.
        set_seed(args.seed, device_specific=True)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--save-path {self.folder} is a file")
        if self.resume or self.replace:
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} already holds files; resume that run, or choose another --save-path"
            )
        if self.weights_file and self.weights_file.exists():
            raise ValueError(f"{self.weights_file} is there already; choose another --save-path")

    def _encode_prompt(self, config: TesseraConfig) -> torch.Tensor:
        prompt = self.tokenizer(self.args.sample_prompt, return_tensors="pt")["input_ids"].long()
        if prompt.shape[1] >= config.max_position_embeddings:
            raise ValueError(
                f"sample_prompt has {prompt.shape[1]} tokens and leaves no room in the model's context of "
                f"{config.max_position_embeddings}"
            )
        return prompt

    def _plan(self) -> None:
        """Rows a process takes at a time, and the number of steps (None: until the minutes are over)."""
        args, processes = self.args, self.accelerator.num_processes
        split = args.accumulation * processes
        if args.batch_size % split:
            raise ValueError(
                f"batch_size ({args.batch_size}) does not divide into {args.accumulation} micro-batches on "
                f"each of {processes} processes"
            )
        self.micro = args.batch_size // split
        limits = []
        if args.steps is not None:
            limits.append(args.steps)
        if args.epochs is not None:
            limits.append(max(1, round(args.epochs * self.windows.per_epoch / args.batch_size)))
        self.total_steps = min(limits) if limits else None

    def _make_model(self, config: TesseraConfig) -> TesseraForCausalLM:
        path = self.args.ckpt_path and Path(self.args.ckpt_path)
        if path and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            model = load_model(find_checkpoint(path), config, dtype=torch.float32)
        else:
            if path:
                self.say(f"no checkpoint in {path} yet: starting from random weights")
            model = TesseraForCausalLM(config)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(model.generation_config, name, getattr(self.tokenizer, name))
        return model

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes."""
        self.accelerator.print(text)

    # ---- the run ----

    def run(self) -> PretrainResult:
        """Trains, scores the text before and after, and writes the run directory."""
        self._start()
        before = self._evaluate(whole=True)
        self._record(val_loss=before.nats, val_bits_per_byte=before.bits_per_byte)
        self.say(f"before training: {_describe(before)}")
        self._train()
        after = self._evaluate(whole=True)
        self._record(val_loss=after.nats, val_bits_per_byte=after.bits_per_byte)
        self._checkpoint()
        sample = self._sample()
        final = self._finish(sample)
        self.say(f"after training:  {_describe(after)}")
        return PretrainResult(self.folder, final, before, after, self.seconds, self.tokens, sample)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.step * self.args.batch_size * self.length

    def _start(self) -> None:
        if self.resume:
            newest, refused = newest_verified(self.folder / "checkpoints")
            for sentence in refused:
                self.say(f"passing over {sentence}")
            if newest is None:
                raise ValueError(f"{self.folder} has no checkpoint to resume from")
            state = load_checkpoint(newest, self.accelerator, self.wrapped, self.optimizer)
            if state["rows"] != self._rows_identity():
                raise ValueError(
                    f"{newest} was trained on other data, or with another batch, window, seed or optimizer"
                )
            self.step, self.seconds = state["step"], state["seconds"]
            self.say(f"resuming from {newest}")
        if self.accelerator.is_main_process:
            if self.replace:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(self.folder)
            recipe = yaml.safe_dump(asdict(self.args), sort_keys=False, allow_unicode=True)
            (self.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            if self.resume:
                self._trim_metrics()
                # Its weights are those of an older checkpoint as soon as the run goes on.
                shutil.rmtree(self.folder / "final", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        total = self.model.num_parameters()
        length = f"{self.total_steps} steps" if self.total_steps else f"{self.args.minutes:g} minutes"
        precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        self.say(
            f"{self.args.config}: {total:,} parameters, vocabulary {self.model.config.vocab_size}; "
            f"{len(self.train.ids):,} tokens to train on, {len(self.val.ids):,} held out; {length} of "
            f"{self.args.batch_size} x {self.length} tokens on {self.accelerator.num_processes} x "
            f"{self.accelerator.device.type} in {precision}"
        )

    def _train(self) -> None:
        args, is_main = self.args, self.accelerator.is_main_process
        bar = tqdm(
            total=1000,
            initial=int(1000 * self._progress()),
            # None: no bar where nobody sees it move; there, a line now and then.
            disable=None if is_main else True,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            desc="training",
            file=sys.stderr,
            mininterval=0.5,
        )
        next_eval = 1 + int(self._progress() * (args.evaluations + 1))
        last_checkpoint, average, logged = self.seconds, None, self.step
        last_line = time.perf_counter()
        self.wrapped.train()
        with bar, _first_interrupt() as interrupted:
            while (progress := self._progress()) < 1:
                started = time.perf_counter()
                loss, norm = self._optimizer_step(progress)
                self.step += 1
                self.seconds += time.perf_counter() - started
                stop = self._agree(interrupted)
                average = loss if average is None else 0.95 * average + 0.05 * loss
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss} at step {self.step}; lower the learning rate"
                    )
                if self.step - logged >= 10 or self.step == 1:
                    logged = self.step
                    self._record(loss=average, grad_norm=norm)
                progress = self._progress()
                rate = self.tokens / max(self.seconds, 1e-9)
                status = f"loss {average:.3f}, {rate:,.0f} tok/s, step {self.step}"
                bar.set_postfix_str(f" {status}", refresh=False)
                bar.update(int(1000 * min(progress, 1)) - bar.n)
                if bar.disable and is_main and time.perf_counter() - last_line >= SECONDS_BETWEEN_LINES:
                    last_line = time.perf_counter()
                    print(f"{100 * min(progress, 1):3.0f} %  {status}", file=sys.stderr, flush=True)
                if stop:
                    self._checkpoint()
                    self.say(f"stopped at step {self.step}; its checkpoint is saved, go on with --resume")
                    raise KeyboardInterrupt
                if progress < 1 and progress * (args.evaluations + 1) >= next_eval:
                    next_eval += 1
                    held_out = self._evaluate(whole=False)
                    self._record(val_loss=held_out.nats, val_bits_per_byte=held_out.bits_per_byte)
                    if is_main:
                        bar.write(f"{100 * progress:3.0f} %  {_describe(held_out)}", file=sys.stderr)
                if args.checkpoint_minutes and self.seconds - last_checkpoint >= 60 * args.checkpoint_minutes:
                    last_checkpoint = self.seconds
                    self._checkpoint()

    def _progress(self) -> float:
        shares = [self.step / self.total_steps] if self.total_steps else []
        if self.args.minutes is not None:
            shares.append(self.seconds / (60 * self.args.minutes))
        return max(shares)

    def _agree(self, interrupted: threading.Event) -> bool:
        """Gives all processes the clock of the first, so that they checkpoint and end at the same step.

        Returns:
            Whether to stop.
        """
        if self.accelerator.num_processes == 1:
            return interrupted.is_set()
        shared = [self.seconds, float(interrupted.is_set())]
        shared = torch.tensor(shared, dtype=torch.float64, device=self.accelerator.device)
        self.seconds, stop = broadcast(shared).tolist()
        return bool(stop)

    def _optimizer_step(self, progress: float) -> tuple[float, float]:
        args, accelerator = self.args, self.accelerator
        factor = cosine_with_warmup(progress, args.warmup, args.floor)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        count = args.batch_size * self.length
        first = self.step * args.batch_size + accelerator.process_index * self.micro * args.accumulation
        total = torch.zeros((), device=accelerator.device)
        for i in range(args.accumulation):
            rows = torch.from_numpy(self.windows.rows(first + i * self.micro, self.micro))
            rows = rows.to(accelerator.device, non_blocking=True)
            last = i == args.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                # The rows hold their own targets: nothing is shifted inside, and every position counts.
                loss = self.wrapped(
                    input_ids=rows[:, :-1],
                    labels=rows[:, :-1],
                    shift_labels=rows[:, 1:].contiguous(),
                    num_items_in_batch=count,
                    use_cache=False,
                ).loss
                # Processes average their gradients; the loss is already divided by the tokens of all.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), args.clip) if args.clip else math.nan
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()
        return accelerator.reduce(total, "sum").item(), float(norm)

    def _evaluate(self, whole: bool) -> TextLoss:
        every = 1 if whole else math.ceil(len(self.val.ids) / self.args.eval_tokens)
        fitting = LOGITS_AT_A_TIME // (self.length * self.model.config.padded_vocab_size)
        batch_size = max(1, min(16, fitting))
        ids, num_bytes = self.val.ids, self.val.num_bytes
        return text_loss(self.wrapped, ids, num_bytes, self.length, batch_size, self.accelerator, every)

    # ---- what it writes ----

    def _record(self, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        record.update({key: round(float(value), 6) for key, value in values.items() if not math.isnan(value)})
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _trim_metrics(self) -> None:
        """Drops the records of steps that the resumed run will do again."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = [record for record in read_metrics(path) if record["step"] <= self.step]
            aside = path.with_suffix(".partial")
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            aside.replace(path)

    def _rows_identity(self) -> dict:
        """What fixes which row a step sees, and the optimizer that its state is of."""
        args = self.args
        return {
            "tokens": len(self.train.ids),
            "sha256": hashlib.sha256(np.ascontiguousarray(self.train.ids)).hexdigest(),
            "batch_size": args.batch_size,
            "sequence_length": self.length,
            "seed": args.seed,
            "optimizer": [group["name"] for group in self.optimizer.param_groups],
        }

    def _checkpoint(self) -> None:
        state = {"seconds": self.seconds, "tokens": self.tokens, "rows": self._rows_identity()}
        folder = self.folder / "checkpoints"
        save_checkpoint(
            folder, self.step, self.accelerator, self.wrapped, self.optimizer, state, self.tokenizer
        )

    @torch.no_grad()
    def _sample(self) -> str:
        prompt = self.prompt.to(self.accelerator.device)
        # Some tokenizers make nothing of a line break.
        if not self.accelerator.is_main_process or not self.args.sample_tokens or not prompt.shape[1]:
            return ""
        self.model.eval()
        room = self.model.config.max_position_embeddings - prompt.shape[1]
        with self.accelerator.autocast():
            ids = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(self.args.sample_tokens, room),
                do_sample=True,
                temperature=0.8,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )
        return self.tokenizer.decode(ids[0], skip_special_tokens=True).strip("\n")

    def _finish(self, sample: str) -> Path:
        """Writes `final/`, a complete Hugging Face directory, aside and renamed; then curve and sample."""
        final = self.folder / "final"
        if self.accelerator.is_main_process:
            aside = self.folder / ".final.partial"
            shutil.rmtree(aside, ignore_errors=True)
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            if self.weights_file:
                partial = self.weights_file.with_suffix(".partial")
                shutil.copyfile(final / "model.safetensors", partial)
                os.replace(partial, self.weights_file)
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
            curve = self.folder / "loss.png"
            if draw_curve(read_metrics(self.folder / "metrics.jsonl"), curve, f"{self.args.config}"):
                self.say(f"loss curve: {curve}")
            else:
                self.say("loss curve: not drawn, matplotlib is not installed (extra 'train')")
        self.accelerator.wait_for_everyone()
        return final


@contextmanager
def _first_interrupt() -> Iterator[threading.Event]:
    """Within it, the first Ctrl-C sets the event that it gives; a second one ends the process as always."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number, frame) -> None:
        signal.signal(signal.SIGINT, before)
        event.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _describe(loss: TextLoss) -> str:
    return f"validation {loss.nats:.4f} nats per token, {loss.bits_per_byte:.4f} bits per byte"


if __name__ == "__main__":
    from tessera.cli import run

    run(["pretrain", *sys.argv[1:]])

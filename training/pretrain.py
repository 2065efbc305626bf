"""Pretraining on text: `tessera pretrain`, or `accelerate launch -m tessera.training.pretrain`.

Notable:
- the loss is divided by the tokens of the whole step, so neither accumulation nor the number of processes
changes it;
- row `i` of the data is a pure function of the seed, so a run resumes to the sample on any number of
processes;
- progress, and with it the learning rate, is the larger share of steps and of minutes that is used up;
- a run directory is a Hugging Face model at every checkpoint and at its end.

What belongs here: the loop and what it leaves. What it is told, what it reads, optimizers, schedules,
checkpoints and pictures have their own files.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed

from tessera.configs.recipes import RECIPE_FILE
from tessera.configs.resolve import is_byte_gpt_file
from tessera.evaluation.bits_per_byte import TextLoss, text_loss
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import load_model
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .checkpoint_policy import CheckpointPolicy
from .checkpoint_writer import CheckpointWriter
from .checkpoints import (
    can_go_on,
    find_checkpoint,
    load_checkpoint,
    newest_verified,
    read_state,
    verify,
)
from .clock import Clock
from .curves import draw_course, draw_curve, read_metrics
from .durable import replace_text
from .engine import Engine, describe_groups, start_processes
from .environment import describe_environment
from .feed import Feed
from .gradient_statistics import GradientStatistics
from .guards import BadSteps, SkippedSteps
from .inputs import SPECIAL_IDS, TOKENIZER_META, adopt_vocabulary, open_corpora, read_model_config
from .meter import Meter, Smoothed, find_peak, flops_per_token
from .parallel import save_whole
from .pretrain_arguments import PretrainArguments, run_of
from .progress import Progress
from .report import REPORT_FILE, write_report
from .run_log import METRICS_FILE, RunLog
from .samples import TOKENS_ON_THE_WAY, on_one_line, sample_text
from .scaling import describe_scale, scale_arguments
from .schedules import learning_rate_factor, momentum_at, weight_decay_factor
from .signals import Stopped, StopSignals
from .smoke import small_arguments, small_config
from .step import Outcome, Outcomes
from .trackers import check_trackers

LOGITS_AT_A_TIME = 2**26  # of a validation batch; 256 MiB in fp32


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


def pretrain(args: PretrainArguments, resume: bool | str = False, smoke: bool = False) -> PretrainResult:
    """Trains a model on text or tokens and writes the run directory.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies; or from the checkpoint, or the
            newest one of the run, that this is the path of; "auto": go on if there is something to go on
            from, else start.
        smoke: a few steps of everything, small, beside `save_path`: see `smoke.py`.

    Raises:
        ValueError: for what cannot work: in the arguments, configuration, text, tokenizer or checkpoint.
            Nothing that was there is touched then.
        FloatingPointError: if loss or gradient is no number, and going back to a checkpoint did not help.
        OutOfRows: if memory does not suffice for one row at a time.
        Stopped: a KeyboardInterrupt, after Ctrl-C, SIGTERM or SIGUSR1, once the step is done and a checkpoint
            is written.
        OSError: if the end of the run cannot be saved; the last good checkpoint is there.
    """
    return Run(args, resume, smoke=smoke).run()


class Run:
    """A run that is ready to start. Making one checks all that it is told and writes nothing.

    Args:
        args, resume, smoke: as `pretrain`.
        replace: what lies in `save_path` goes when the run starts.

    Raises:
        ValueError: as `pretrain`.
    """

    def __init__(
        self,
        args: PretrainArguments,
        resume: bool | str = False,
        replace: bool = False,
        smoke: bool = False,
    ):
        if args.optimizer is None:
            args = dataclasses.replace(args, optimizer="adamw" if is_byte_gpt_file(args.config) else "muon")
        self.accelerator, self.layout, precision = start_processes(args)
        if smoke:
            args = small_arguments(args, self.accelerator.num_processes, bool(resume))
            # An earlier smoke run is in nobody's way.
            replace = replace or (not resume and (args.folder / RECIPE_FILE).is_file())
        if resume == "auto":
            resume = can_go_on(args.folder)
            # Killed before its first checkpoint: there is nothing to lose.
            replace = replace or (not resume and _only_begun(args.folder))
        self.args, self.resume, self.replace, self.smoke = args, resume, replace, smoke
        set_seed(args.seed)
        self.weights_file, self.folder = args.weights_file, args.folder
        self.trackers = check_trackers(args.trackers)
        self._check_folder()
        config, is_preset = read_model_config(args.config, args.depth)
        weights = self._weights_to_start_from()
        if is_preset and weights is not None:
            config = adopt_vocabulary(config, weights)
        self.corpora, config = open_corpora(
            args.data_file,
            args.tokenizer,
            config,
            follow=is_preset and weights is None,
            documents=args.packing != "contiguous" or args.isolate_documents,
        )
        self.tokenizer = self.corpora[0].tokenizer
        if smoke and weights is None:
            config = small_config(config)
        self.length = args.sequence_length or min(config.max_position_embeddings, 1024)
        if self.length > config.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.length} is longer than the model's context of "
                f"{config.max_position_embeddings} positions"
            )
        self.args = args = scale_arguments(args, config, self.length, self.layout.data_size)
        self.feed = Feed(self.corpora, args, self.length, self.layout.data_rank, self.layout.data_size)
        self.prompt = self._encode_prompt(config)
        self._plan()
        self.skipped = SkippedSteps()
        self.engine = Engine(
            args,
            self.accelerator,
            self.layout,
            precision,
            config,
            self.feed,
            build=functools.partial(self._make_model, config, weights),
            load=functools.partial(load_model, dtype=torch.float32),
            say=self.say,
            place_of=lambda step: self.skipped.place_of(step),
        )
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        self.base_values = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.log = RunLog(self.folder, self.accelerator.is_main_process, self.say)
        policy = CheckpointPolicy.of(args)
        background = args.async_checkpoints
        self.writer = CheckpointWriter(self.folder / "checkpoints", self.accelerator, policy, background)
        device, processes = self.accelerator.device, self.accelerator.num_processes
        peak = find_peak(args, device, processes, self.engine.precision.compute)
        self.meter = Meter(flops_per_token(config, self.length), peak, device)
        self.gradients = GradientStatistics(self.optimizer)
        self.last: Outcome | None = None
        self.step, self.clock, self.outcomes = 0, Clock(), Outcomes(self.accelerator.device)
        # The clock that all processes go by: that of the first, when the last step was read that was read.
        self.seconds = self.saved_at = 0.0
        self.guard = BadSteps(args.bad_steps, args.rollbacks)
        # From here on chance is dropout's, which is not to be the same for different rows.
        set_seed(args.seed + self.layout.data_rank)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--save-path {self.folder} is a file")
        if self.replace or self._goes_on_in_place():
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} already holds files; resume that run, or choose another --save-path"
            )
        if self.weights_file and self.weights_file.exists():
            raise ValueError(f"{self.weights_file} is there already; choose another --save-path")

    def _goes_on_in_place(self) -> bool:
        if isinstance(self.resume, str):
            return run_of(self.resume).resolve() == self.folder.resolve()
        return self.resume

    def _encode_prompt(self, config: TesseraConfig) -> torch.Tensor:
        given, start = self.args.sample_prompt, self.tokenizer.eos_token_id
        if given is None and start is not None:
            return torch.tensor([[start]])
        prompt = self.tokenizer("\n" if given is None else given, return_tensors="pt")["input_ids"].long()
        if prompt.shape[1] >= config.max_position_embeddings:
            raise ValueError(
                f"sample_prompt has {prompt.shape[1]} tokens and leaves no room in the model's context of "
                f"{config.max_position_embeddings}"
            )
        return prompt

    def _plan(self) -> None:
        """The number of steps (None: until the minutes are over), and the warm-up."""
        args = self.args
        self.total_steps = self.feed.total_steps
        self.warmup = args.warmup
        if args.warmup_steps is not None:
            if self.total_steps is None:
                raise ValueError(
                    "warmup_steps needs a length in steps, epochs or tokens; give warmup, a share"
                )
            self.warmup = min(args.warmup_steps / self.total_steps, 1.0)

    def _weights_to_start_from(self) -> Path | None:
        path = self.args.ckpt_path and Path(self.args.ckpt_path)
        if path and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            return find_checkpoint(path)
        if path:
            self.say(f"no checkpoint in {path} yet: starting from random weights")
        return None

    def _make_model(self, config: TesseraConfig, weights: Path | None) -> TesseraForCausalLM:
        if weights is None:
            # A large model takes a minute to start on a CPU, and a moment where it will be.
            with self.accelerator.device:
                model = TesseraForCausalLM(config)
        else:
            model = load_model(weights, config, dtype=torch.float32)
        for name in SPECIAL_IDS:
            setattr(model.generation_config, name, getattr(self.tokenizer, name))
        return model

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes."""
        self.accelerator.print(text)

    # ---- the run ----

    def run(self) -> PretrainResult:
        """Trains, scores the text before and after, and writes the run directory."""
        self._start()
        try:
            with self.writer, StopSignals() as self.signals:
                before = self._evaluate(whole=not self.smoke)
                self.say(f"before training: {_describe(before)}")
                self._train()
                self._checkpoint()
                after = self._evaluate(whole=not self.smoke)
                self.writer.finish()
                sample = self._sample(self.args.sample_tokens)
                final = self._finish(sample)
        except Exception as error:
            self._leave("failure", text=str(error))
            raise
        self._leave("end")
        self.say(f"report: {self.folder / REPORT_FILE}")
        self.say(f"after training:  {_describe(after)}")
        return PretrainResult(self.folder, final, before, after, self.clock.seconds, self.tokens, sample)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.feed.tokens_before(self.step)

    def _start(self) -> None:
        if self.resume:
            newest = self._checkpoint_to_resume()
            state = read_state(newest, self.model.config)
            if state["rows"] != (ours := self._rows_identity()):
                other = sorted(key for key in ours | state["rows"] if ours.get(key) != state["rows"].get(key))
                raise ValueError(
                    f"{newest} was trained on other data, or with another batch, window, order, seed or "
                    f"optimizer: it differs in {', '.join(other)}"
                )
            self.clock = Clock(state["seconds"])
            self._load(newest)
            self.seconds = self.saved_at = state["seconds"]
            self.writer.resumed(self.step, run_of(newest).resolve() == self.folder.resolve())
            self.say(f"resuming from {newest}")
        if self.accelerator.is_main_process:
            if self.replace:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            # The configuration alone: `final` and the checkpoints have the model with its code.
            self.model.config.to_json_file(self.folder / "config.json")
            recipe = yaml.safe_dump(asdict(self.args), sort_keys=False, allow_unicode=True)
            replace_text(self.folder / RECIPE_FILE, recipe)
            if self.resume:
                self.log.trim(self.step)
                # Its weights are those of an older checkpoint as soon as the run goes on.
                shutil.rmtree(self.folder / "final", ignore_errors=True)
        self.log.event("resume" if self.resume else "start", self.step, **self._facts())
        self.log.track(self.trackers, asdict(self.args), self.step, self.say)
        self.accelerator.wait_for_everyone()
        total = self.model.num_parameters()
        length = f"{self.total_steps} steps" if self.total_steps else f"{self.args.minutes:g} minutes"
        if self.smoke:
            self.say("smoke run: a few small steps to see that everything works; its figures mean nothing")
        self.say(
            f"{self.args.config}: {total:,} parameters, vocabulary {self.model.config.vocab_size}; "
            f"{sum(len(one.train.ids) for one in self.corpora):,} tokens to train on, "
            f"{sum(len(one.val.ids) for one in self.corpora):,} held out; {length} of "
            f"{self.args.batch_size} x {self.length} tokens on {self.accelerator.num_processes} x "
            f"{self.accelerator.device.type} in {self.engine.precision.compute}, {self.args.optimizer}"
        )
        if sentence := describe_scale(self.args):
            self.say(sentence)
        for line in self.engine.describe():
            self.say(line)

    def _load(self, checkpoint: Path) -> dict:
        """Goes to where a checkpoint is, but for the clock; returns its state."""
        state = load_checkpoint(checkpoint, self.accelerator, self.model, self.optimizer)
        self.step, self.skipped.places = state["step"], state.get("skipped", [])
        self.engine.restore(state.get("engine", {}))
        return state

    def _checkpoint_to_resume(self) -> Path:
        path = Path(self.resume) if isinstance(self.resume, str) else self.folder
        if path != run_of(path):
            if problem := verify(path):
                raise ValueError(f"{path} cannot be resumed from: {problem}")
            return path
        newest, refused = newest_verified(path / "checkpoints")
        for sentence in refused:
            self.say(f"passing over {sentence}")
        if newest is None:
            raise ValueError(f"{path} has no checkpoint to resume from")
        return newest

    def _train(self) -> None:
        self.engine.warm_up(self.step)
        self.average, self.logged = Smoothed(), self.step
        self.next_eval = 1 + int(self._progress() * (self.args.evaluations + 1))
        self.model.train()
        self.meter.update(self.tokens, self.clock.seconds)
        is_main = self.accelerator.is_main_process
        self.shown = Progress(self._progress(), is_main, self._bits_of_a_nat(), self.total_steps)
        with contextlib.closing(self.engine), self.shown, self.clock:
            while not self._is_done():
                log = self.step + 1 - self.logged >= self.args.log_steps or not self.step
                self.gradients.take(log)
                self._optimizer_step(self._progress())
                self.step += 1
                # What is logged of a step is read before the next one is queued, else some steps later.
                if self._settle(everything=log):
                    continue
                if log:
                    self._log()
                if self.stopping:
                    self._settle(everything=True)
                    self._checkpoint()
                    self.writer.finish()
                    self._leave("stop")
                    self.say(f"stopped at step {self.step}; its checkpoint is saved, go on with --resume")
                    raise Stopped(self.last.stop)
                self._evaluate_or_save()

    def _is_done(self) -> bool:
        """Whether the run is at its end, with all steps read, which may show that it is not."""
        return self._progress() >= 1 and not self._settle(everything=True) and self._progress() >= 1

    def _evaluate_or_save(self) -> None:
        """Both, either or none, as this step or this minute has it."""
        args, progress = self.args, self._progress()
        if args.eval_steps:
            evaluate = self.step % args.eval_steps == 0
        else:
            evaluate = progress * (args.evaluations + 1) >= self.next_eval
            self.next_eval += evaluate
        evaluate = evaluate and progress < 1
        save = self.writer.policy.is_due(self.step, self.seconds - self.saved_at)
        if not (evaluate or save) or self._settle(everything=True):
            return
        with self.clock.paused():
            # What was learnt is safe before an evaluation, in which memory may run out, and other things. But
            # a run that goes back is to go to where all was well.
            save = save or self.writer.is_due_before_evaluation(self.seconds - self.saved_at)
            if save and not self.guard.bad:
                self._checkpoint()
            if evaluate:
                held_out = self._evaluate(whole=False)
                self.shown.note_validation(held_out.bits_per_byte)
                self.shown.write(f"{100 * progress:3.0f} %  {_describe(held_out)}")
                if self.writer.is_better(held_out.bits_per_byte):
                    self._checkpoint()
                    self.writer.note_best(held_out.bits_per_byte)
                if text := self._sample(TOKENS_ON_THE_WAY):
                    self.log.sample(self.step, self.args.sample_prompt or "", text)
                    self.shown.write(f"       {on_one_line(text)}")
                self._report()

    def _progress(self) -> float:
        shares = [self.step / self.total_steps] if self.total_steps else []
        if self.args.minutes is not None:
            shares.append(self.seconds / (60 * self.args.minutes))
        return max(shares)

    def _optimizer_step(self, progress: float) -> None:
        """Queues a step."""
        args = self.args
        rate = learning_rate_factor(args, progress, self.warmup)
        decay = weight_decay_factor(args, progress)
        momentum = momentum_at(args, self.step, progress, self.warmup)
        for group, (base_rate, base_decay) in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"], group["weight_decay"] = base_rate * rate, base_decay * decay
            if group["kind"] == "muon":
                group["momentum"] = momentum
        values = self.engine.step(self.step, self.clock.seconds, self.signals.number)
        self.outcomes.add(self.step + 1, values)

    @property
    def stopping(self) -> bool:
        """Whether some process was asked to stop, as far as steps were read."""
        return self.last is not None and self.last.stop > 0

    def _settle(self, everything: bool) -> bool:
        """Reads what steps came to: all queued ones, or those that the device has done by now.

        Returns:
            Whether the run has gone back to an earlier step.
        """
        for outcome in self.outcomes.settled(0 if everything else None):
            self.last = outcome
            # Processes go by one clock, so that they save and end at the same step.
            self.seconds = outcome.seconds if self.accelerator.num_processes > 1 else self.clock.seconds
            if outcome.no_memory:
                self.outcomes.forget()
                self.step = outcome.step - 1
                self.log.event("out_of_memory", self.step, text="the micro-batches are halved")
                self.engine.halve()
                return True
            verdict = self.guard.note(outcome) if self.engine.is_bad(outcome) else self.guard.good()
            if verdict == "stop":
                self._give_up(outcome)
            if verdict is not None:
                self.say(f"step {outcome.step} is skipped: {_what_is_wrong(outcome)}")
                self.log.event("skip", outcome.step, text=_what_is_wrong(outcome))
            else:
                self.average.update(outcome.loss)
            if verdict == "back":
                self._roll_back()
                return True
            self.meter.update(self.tokens, self.clock.seconds)
            values = {**self.meter.values(), **self._rates()}
            self.shown.update(self._progress(), outcome.step, self.average.value, **values)
        return False

    def _roll_back(self) -> None:
        """To the last good checkpoint, and past the rows that led here."""
        # All are to see the same newest one, which the first process may still be writing.
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        newest, _ = newest_verified(self.folder / "checkpoints")
        if newest is None:
            # None of these steps was taken: the weights are those of before.
            self.say(f"{self.args.bad_steps} bad steps in a row and no checkpoint yet: going on behind them")
            self.guard.good()
            return
        from_step = self.step
        places = {*self.skipped.places, *(self.skipped.place_of(bad.step - 1) for bad in self.guard.bad)}
        self.guard.good()
        self.outcomes.forget()
        self._load(newest)
        self.writer.resumed(self.step)
        self.skipped.places = sorted(places)
        self.average, self.logged = Smoothed(), self.step
        if self.accelerator.is_main_process:
            self.log.trim(self.step)
        self.log.event("rollback", self.step, text=f"from step {from_step}")
        self.say(f"{self.args.bad_steps} bad steps in a row: back to {newest}, without their rows")

    def _give_up(self, outcome: Outcome) -> None:
        file = self.engine.save_bad_batch(self.folder, outcome.step - 1)
        raise FloatingPointError(
            f"{_what_is_wrong(outcome)} at step {outcome.step}, after {self.args.rollbacks} times back; its "
            f"rows are in {file}; lower the learning rate"
        )

    def _log(self) -> None:
        self.logged = self.step
        self._record(
            loss=self.average.value,
            grad_norm=self.last.norm,
            **self.meter.values(),
            **self._rates(),
            **self.gradients.values(),
            **self._balance(),
            **self.feed.epochs(self.step),
        )

    def _evaluate(self, whole: bool) -> TextLoss:
        """Scores the held-out text, or a sample of it, and records that."""
        tokens = sum(len(one.val.ids) for one in self.corpora)
        every = 1 if whole else math.ceil(tokens / self.args.eval_tokens)
        fitting = LOGITS_AT_A_TIME // (self.length * self.model.config.padded_vocab_size)
        batch_size = max(1, min(16, fitting))
        losses, of_each = [], {}
        for one in self.corpora:
            ids, num_bytes = one.val.ids, one.val.num_bytes
            given = (ids, num_bytes, self.length, batch_size, self.accelerator, every, self.layout.groups)
            with self.engine.evaluating():
                loss = text_loss(self.model, *given)
            losses.append(loss)
            if len(self.corpora) > 1:
                of_each[f"val_loss/{one.name}"] = loss.nats
                of_each[f"val_bits_per_byte/{one.name}"] = loss.bits_per_byte
        mixed = self.feed.mixed(losses)
        self._record(val_loss=mixed.nats, val_bits_per_byte=mixed.bits_per_byte, **of_each)
        return mixed

    # ---- what it writes ----

    def _record(self, **values: float) -> None:
        self.log.record(self.step, self.tokens, self.clock.seconds, **values)

    def _rates(self) -> dict[str, float]:
        """Learning rates of the last step: that of the first group of matrices, and each group's."""
        groups = self.optimizer.param_groups
        main = next((group for group in groups if group["name"].endswith("matrices")), groups[0])
        of_each = {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups}
        return {"learning_rate": float(main["lr"]), **of_each}

    def _bits_of_a_nat(self) -> float:
        """What a nat per token is in bits per byte, by tokens and bytes of the held-out text."""
        losses = [TextLoss(1.0, len(one.val.ids), one.val.num_bytes) for one in self.corpora]
        return self.feed.mixed(losses).bits_per_byte

    def _facts(self) -> dict[str, dict[str, str]]:
        """What the report tells of this start: model, data, machine."""
        names = [one.folder or one.name for one in self.corpora]
        peak = self.meter.peak
        return {
            "model": {
                "parameters": f"{self.model.num_parameters():,}",
                "operations a token": f"{self.meter.flops_per_token:.3g}, forward and backward",
                "groups": describe_groups(self.optimizer),
            },
            "data": {
                "read from": ", ".join(map(str, names)),
                "tokens to train on": f"{sum(len(one.train.ids) for one in self.corpora):,}",
                "tokens held out": f"{sum(len(one.val.ids) for one in self.corpora):,}",
                "bytes a token": f"{1 / (self._bits_of_a_nat() * math.log(2)):.3f}",
            },
            "environment": {
                **describe_environment(self.accelerator.device, self.accelerator.num_processes),
                **({"peak for MFU": f"{peak / 1e12:.4g} TFLOP/s"} if peak else {}),
                "precision": str(self.engine.precision),
                "attention": str(self.engine.attention),
                "compiled": str(self.engine.compiles),
                "layout": str(self.layout),
            },
        }

    def _leave(self, event: str, **told: str) -> None:
        """Notes how the run is left, and writes its page."""
        self.log.event(event, self.step, tokens=self.tokens, seconds=round(self.clock.seconds, 1), **told)
        self._report()
        self.log.close()

    def _report(self) -> None:
        """The page of the run as it stands."""
        if self.accelerator.is_main_process:
            with self.log.going_on():
                write_report(self.folder)

    def _balance(self) -> dict[str, float]:
        """How evenly the experts were used in the last step: the worst layer, and the mean entropy."""
        layers = self.model.router_statistics()
        if not layers:
            return {}
        entropies = [layer["entropy"] for layer in layers]
        return {
            "router_max_violation": max(layer["max_violation"] for layer in layers),
            "router_entropy": sum(entropies) / len(entropies),
        }

    def _rows_identity(self) -> dict:
        """What fixes which row a step sees, and the optimizer that its state is of."""
        return {**self.feed.identity(), "optimizer": [group["name"] for group in self.optimizer.param_groups]}

    def _checkpoint(self) -> None:
        state = {
            "seconds": self.clock.seconds,
            "tokens": self.tokens,
            "rows": self._rows_identity(),
            "skipped": self.skipped.places,
            "engine": self.engine.state(),
        }
        if self.writer.save(self.step, self.model, self.optimizer, state, self.tokenizer):
            self.saved_at = self.seconds
            self._record(checkpoint_seconds=self.writer.cost)
            self.log.event("checkpoint", self.step, seconds=round(self.writer.cost, 3))

    def _sample(self, tokens: int) -> str:
        tokens = min(tokens, self.args.sample_tokens)
        return sample_text(self.model, self.tokenizer, self.prompt, tokens, self.accelerator, self.args.seed)

    def _finish(self, sample: str) -> Path:
        """Writes `final/`, a complete Hugging Face directory, aside and renamed; then curve and sample."""
        final, aside = self.folder / "final", self.folder / ".final.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        save_whole(self.model, aside, self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.tokenizer.save_pretrained(aside)
            if notes := self.corpora[0].tokenizer_meta:
                shutil.copyfile(notes, aside / TOKENIZER_META)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            if self.weights_file:
                partial = self.weights_file.with_suffix(".partial")
                shutil.copyfile(final / "model.safetensors", partial)
                os.replace(partial, self.weights_file)
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
            records, curve = read_metrics(self.folder / METRICS_FILE), self.folder / "loss.png"
            if draw_curve(records, curve, f"{self.args.config}"):
                draw_course(records, self.folder / "course.png", f"{self.args.config}")
                self.say(f"loss curve: {curve}")
            else:
                self.say("loss curve: not drawn, matplotlib is not installed (extra 'train')")
        self.accelerator.wait_for_everyone()
        return final


def _only_begun(folder: Path) -> bool:
    """Whether a run directory holds nothing that anybody would miss: no model, and no checkpoint."""
    if not folder.is_dir() or (folder / "final").exists():
        return False
    there = {path.name for path in folder.iterdir()}
    return RECIPE_FILE in there or there <= {"config.json", f".{RECIPE_FILE}.partial"}


def _what_is_wrong(outcome: Outcome) -> str:
    what, value = "the loss", outcome.loss
    if math.isfinite(value):
        what, value = "the gradient's norm", outcome.norm
    return f"{what} is {value}"


def _describe(loss: TextLoss) -> str:
    return f"validation {loss.nats:.4f} nats per token, {loss.bits_per_byte:.4f} bits per byte"


if __name__ == "__main__":
    from tessera.cli import run

    run(["pretrain", *sys.argv[1:]])

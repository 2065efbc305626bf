"""Pretraining on text: `tessera pretrain`, or `accelerate launch -m tessera.training.pretrain`.

Notable:
- the loss is divided by the tokens of the whole step, so neither accumulation nor the number of processes
changes it;
- row `i` of the data is a pure function of the seed, so a run resumes to the sample on any number of
processes;
- progress, and with it the learning rate, is the larger share of steps and of minutes that is used up;
- a run directory is a Hugging Face model at every checkpoint and at its end.

What belongs here: the loop, top to bottom. What it is told (`pretrain_arguments.py`), what it finds
(`run_folder.py`), its model and steps (`engine.py`), scores (`validation.py`), words (`run_facts.py`) and
what it leaves (`final_model.py`) have their own files, as have checkpoints and pictures.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from tessera.configs.recipes import RECIPE_FILE
from tessera.configs.resolve import is_byte_gpt_file
from tessera.evaluation.bits_per_byte import TextLoss
from tessera.modeling.loading import load_model

from .checkpoints.policy import CheckpointPolicy
from .checkpoints.store import can_go_on, choose_checkpoint, load_checkpoint, read_state
from .checkpoints.writer import CheckpointWriter
from .clock import Clock
from .engine import Engine, start_processes
from .feed import Feed
from .final_model import draw_curves, write_final
from .guards import BadSteps, SkippedSteps
from .inputs import adopt_vocabulary, make_model, open_corpora, read_model_config, row_length
from .pretrain_arguments import PretrainArguments, run_of
from .records.gradient_statistics import GradientStatistics
from .records.meter import Meter, Smoothed, find_peak, flops_per_token
from .records.progress import Progress
from .records.report import REPORT_FILE, write_report
from .records.run_log import RunLog
from .records.trackers import check_trackers
from .run_facts import balance_of, facts_of, first_line, rates_of
from .run_folder import (
    begin_folder,
    check_folder,
    check_rows,
    checkpoint_to_resume,
    claimed,
    goes_on_in_place,
    is_only_begun,
    weights_to_start_from,
)
from .samples import TOKENS_ON_THE_WAY, encode_prompt, on_one_line, sample_text
from .scaling import describe_scale, scale_arguments
from .schedules import learning_rate_factor, momentum_at, warmup_share, weight_decay_factor
from .signals import Stopped, StopSignals
from .smoke import small_arguments, small_config
from .step import Outcome, Outcomes
from .validation import bits_of_a_nat, describe, score_held_out


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
            replace = replace or (not resume and is_only_begun(args.folder))
        self.args, self.resume, self.replace, self.smoke = args, resume, replace, smoke
        set_seed(args.seed)
        self.weights_file, self.folder = args.weights_file, args.folder
        self.trackers = check_trackers(args.trackers)
        in_place = goes_on_in_place(resume, self.folder)
        check_folder(self.folder, self.weights_file, replace or in_place)
        config, is_preset = read_model_config(args.config, args.depth)
        weights = weights_to_start_from(args.ckpt_path, self.say)
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
            config = small_config(config, cpu=self.accelerator.device.type == "cpu")
        self.length = row_length(args, config)
        self.args = args = scale_arguments(args, config, self.length, self.layout.data_size)
        self.feed = Feed(self.corpora, args, self.length, self.layout.data_rank, self.layout.data_size)
        self.prompt = encode_prompt(args.sample_prompt, self.tokenizer, config.max_position_embeddings)
        self.total_steps = self.feed.total_steps  # None: until the minutes are over
        self.warmup = warmup_share(args, self.total_steps)
        self.skipped = SkippedSteps()
        self.engine = Engine(
            args,
            self.accelerator,
            self.layout,
            precision,
            config,
            self.feed,
            build=functools.partial(make_model, config, weights, self.tokenizer, self.accelerator.device),
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

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes."""
        self.accelerator.print(text)

    # ---- the run ----

    def run(self) -> PretrainResult:
        """Trains, scores the text before and after, and writes the run directory."""
        with claimed(self.folder, self.accelerator):
            return self._run()

    def _run(self) -> PretrainResult:
        self._start()
        try:
            with self.writer, StopSignals() as self.signals:
                before = self._evaluate(whole=not self.smoke)
                self.say(f"before training: {describe(before)}")
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
        self.say(f"after training:  {describe(after)}")
        return PretrainResult(self.folder, final, before, after, self.clock.seconds, self.tokens, sample)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.feed.tokens_before(self.step)

    def _start(self) -> None:
        if self.resume:
            newest = checkpoint_to_resume(self.resume, self.folder, self.accelerator, self.say)
            state = read_state(newest, self.model.config)
            check_rows(newest, state["rows"], self._rows_identity())
            self.clock = Clock(state["seconds"])
            self._load(newest)
            self.seconds = self.saved_at = state["seconds"]
            self.writer.resumed(self.step, run_of(newest).resolve() == self.folder.resolve())
            self.say(f"resuming from {newest}")
        if self.accelerator.is_main_process:
            begin_folder(self.folder, self.replace, self.model.config, self.args)
            if self.resume:
                self.log.trim(self.step)
                # Its weights are those of an older checkpoint as soon as the run goes on.
                shutil.rmtree(self.folder / "final", ignore_errors=True)
        facts = facts_of(self.engine, self.meter, self.corpora, bits_of_a_nat(self.feed, self.corpora))
        self.log.event("resume" if self.resume else "start", self.step, **facts)
        self.log.track(self.trackers, asdict(self.args), self.step, self.say)
        self.accelerator.wait_for_everyone()
        if self.smoke:
            self.say("smoke run: a few small steps to see that everything works; its figures mean nothing")
        self.say(first_line(self.args, self.engine, self.corpora, self.length, self.total_steps))
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

    def _train(self) -> None:
        self.engine.warm_up(self.step)
        self.average, self.logged = Smoothed(), self.step
        self.next_eval = 1 + int(self._progress() * (self.args.evaluations + 1))
        self.model.train()
        self.meter.update(self.tokens, self.clock.seconds)
        is_main = self.accelerator.is_main_process
        self.shown = Progress(
            self._progress(), is_main, bits_of_a_nat(self.feed, self.corpora), self.total_steps
        )
        with contextlib.closing(self.engine), self.shown, self.clock:
            while not self._is_done():
                log = self.step + 1 - self.logged >= self.args.log_steps
                log = log or self.step in (0, (self.total_steps or 0) - 1)  # the first and the last
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
            if self.step > self.logged:  # minutes do not say which step is the last
                self._log()

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
                self.shown.write(f"{100 * progress:3.0f} %  {describe(held_out)}")
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
            if self.shown.is_due(self._progress()):
                values = {**self.meter.values(), **rates_of(self.optimizer)}
                self.shown.update(self._progress(), outcome.step, self.average.value, **values)
        return False

    def _roll_back(self) -> None:
        """To the last good checkpoint, and past the rows that led here."""
        # The first process may still be writing the newest one; the others wait for its word.
        self.writer.wait()
        newest, _ = choose_checkpoint(self.folder / "checkpoints", self.accelerator, run=True)
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
            **rates_of(self.optimizer),
            **self.gradients.values(),
            **balance_of(self.model),
            **self.feed.epochs(self.step),
        )

    def _evaluate(self, whole: bool) -> TextLoss:
        """Scores the held-out text, or a sample of it, and records that."""
        most = None if whole else self.args.eval_tokens
        with self.engine.evaluating():
            loss, of_each = score_held_out(
                self.model, self.feed, self.corpora, self.accelerator, self.layout.groups, most
            )
        self._record(val_loss=loss.nats, val_bits_per_byte=loss.bits_per_byte, **of_each)
        return loss

    # ---- what it writes ----

    def _record(self, **values: float) -> None:
        self.log.record(self.step, self.tokens, self.clock.seconds, **values)

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
        """Writes `final/`, then curves and sample."""
        notes = self.corpora[0].tokenizer_meta
        final = write_final(
            self.folder, self.model, self.tokenizer, notes, self.weights_file, self.accelerator
        )
        if self.accelerator.is_main_process:
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
            draw_curves(self.folder, f"{self.args.config}", self.say)
        self.accelerator.wait_for_everyone()
        return final


def _what_is_wrong(outcome: Outcome) -> str:
    what, value = "the loss", outcome.loss
    if math.isfinite(value):
        what, value = "the gradient's norm", outcome.norm
    return f"{what} is {value}"


if __name__ == "__main__":
    from tessera.cli import run

    run(["pretrain", *sys.argv[1:]])

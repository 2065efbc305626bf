"""The model of a run, made ready to be trained: numbers, kernels, compiler, processes, optimizer, steps.

`Engine` puts together what the rooms beside it decide (`precision.py`, `attention_tier.py`, `compiling.py`,
`parallel.py`), tries each shape before the clock starts, and queues steps, with smaller micro-batches where
memory runs out. What belongs here: that order of things. How long a run is, what it logs and what it leaves
is the loop's, `pretrain.py`.
"""

import dataclasses
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import nn

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from . import compiling, guards
from .attention_tier import apply_attention, choose_attention, needs_of
from .cuda_graphs import MOST_LAUNCHING, GraphChoice, GraphedPasses, choose_graphs
from .feed import Feed
from .optimizers.groups import build_optimizer
from .optimizers.in_backward import InBackward
from .optimizers.low_precision import narrow_parameters
from .parallel import Layout, agree, choose_layout, shard, split_by_engine, wrap
from .precision import Precision, choose_precision
from .prefetch import Prefetcher
from .pretrain_arguments import PretrainArguments
from .scaling import table_scale
from .step import Outcome, StepData, StepRunner, free_memory, take_step


def start_processes(args: PretrainArguments) -> tuple[Accelerator, Layout, Precision]:
    """Joins the processes of the launch, and decides what they compute in and how they share the work.

    Raises:
        ValueError: for what this device, or so many processes, cannot do.
    """
    # Said aloud, because accelerate takes processes on a CPU for so many runs of one process otherwise.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # `accelerate config` says it this way; the splitting is done by `parallel.py` all the same.
        os.environ.pop("ACCELERATE_USE_FSDP")
        if args.parallel == "ddp" and args.tensor_parallel == args.expert_parallel == 1:
            args = dataclasses.replace(args, parallel="fsdp")
    state = PartialState(cpu=cpu)
    precision = choose_precision(args.precision, args.weights, state.device)
    layout = choose_layout(args, state.num_processes, state.process_index)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision.mixed_precision:
        # Of an earlier run in this process; Accelerate holds on to it.
        AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision.mixed_precision)
    # A launcher's own setting would divide every loss once more.
    accelerator.gradient_accumulation_steps = 1
    return accelerator, layout, precision


class Engine:
    """The model and the optimizer of a run, and its steps.

    Args:
        args: of the run.
        accelerator, layout, precision: from `start_processes`.
        config: of the model.
        feed: the rows.
        build: makes the model as one process would have it.
        load: loads one from a directory, given a `distributed_config`.
        say: prints once, whatever the number of processes.
        place_of: which rows of the feed a step has.
        backend: of `torch.compile`.

    Raises:
        ValueError: for what cannot be had on this device or with this model.
    """

    def __init__(
        self,
        args: PretrainArguments,
        accelerator: Accelerator,
        layout: Layout,
        precision: Precision,
        config: TesseraConfig,
        feed: Feed,
        build: Callable[[], TesseraForCausalLM],
        load: Callable[..., TesseraForCausalLM],
        say: Callable[[str], None],
        place_of: Callable[[int], int],
        backend: str = "inductor",
    ):
        self.args, self.accelerator, self.layout, self.precision = args, accelerator, layout, precision
        self.feed, self.say = feed, say
        device = accelerator.device
        half = precision.compute != "fp32"
        self.needs = needs_of(config, feed.length, args.isolate_documents, half)
        self.attention = choose_attention(args.attention, self.needs, device)
        self.compiles = compiling.choose_compile(args.compile, device, layout.sharded, backend)
        if args.gradient_checkpointing_every < 1:
            raise ValueError(
                f"gradient_checkpointing_every must be at least 1, got {args.gradient_checkpointing_every}"
            )
        self.model = split_by_engine(build, load, layout) if layout.by_engine else build()
        apply_attention(self.model, self.attention, say)
        if args.gradient_checkpointing:
            checkpoint_layers(self.model, args.gradient_checkpointing_every)
        if precision.weights != "fp32":
            narrow_parameters(self.model)
        self.model.to(device)
        if self.compiles.on and self.compiles.by_layer:
            compiling.compile_layers(self.model, self.compiles)
        if layout.shard_size > 1 and not layout.by_engine:
            shard(self.model, layout, device, bf16=precision.mixed_precision == "bf16")
        self.optimizer = self._build_optimizer()
        self.wrapped_optimizer = accelerator.prepare_optimizer(self.optimizer)
        self.graphs = self._choose_graphs()
        self.runner = self._make_runner()
        self.rows = Prefetcher(feed, device, place_of)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        optimizer = build_optimizer(
            self.model,
            args.optimizer,
            args.learning_rate,
            args.weight_decay,
            momentum=args.momentum,
            muon_features=args.muon_features,
            table_scale=table_scale(args, self.model.config),
            table_decay=args.table_decay,
            weights=args.weights,
            seed=args.seed,
        )
        if args.optimizer_in_backward:
            if self.layout.processes > 1 and not self.layout.sharded:
                raise ValueError("optimizer_in_backward on several processes needs parallel=fsdp")
            if self.accelerator.scaler is not None:
                raise ValueError("optimizer_in_backward cannot wait for the scale of fp16 gradients")
            InBackward(optimizer, args.clip, self.feed.accumulation)
        return optimizer

    def _make_runner(self) -> StepRunner:
        model: nn.Module = self.model
        if self.compiles.on and not self.compiles.by_layer:
            model = compiling.compile_whole(model, self.compiles)
        return StepRunner(
            self.accelerator,
            self.layout,
            self.precision,
            wrap(model, self.layout, self.accelerator.device),
            self.wrapped_optimizer,
            self.args.clip,
            self.attention.context,
            self.args.z_loss,
        )

    def _choose_graphs(self) -> GraphChoice:
        args = self.args
        obstacles = {
            "several processes": self.layout.processes > 1,
            "experts, whose loads are counted": bool(compiling.routers_of(self.model)),
            "documents that are kept apart": args.isolate_documents,
            "gradient_checkpointing": args.gradient_checkpointing,
            "optimizer_in_backward": args.optimizer_in_backward,
            "the scaled gradients of fp16": self.accelerator.scaler is not None,
        }
        return choose_graphs(args.cuda_graphs, self.accelerator.device, obstacles)

    def describe(self) -> Iterator[str]:
        """Lines on what a run is about to do, for its start."""
        yield f"precision: {self.precision}; attention: {self.attention}; {self.compiles}; {self.layout}"
        yield f"optimizer: {describe_groups(self.optimizer)}"

    # ---- steps ----

    def step(self, step: int, seconds: float = 0.0, stop: int = 0) -> torch.Tensor:
        """Queues a step; see `StepRunner.step`. Where memory runs out it is done again in smaller parts.

        Raises:
            OutOfRows: if memory runs out with one row at a time.
        """
        while True:
            try:
                return self.runner.step(self.rows.get(step), seconds, stop)
            except torch.OutOfMemoryError as error:
                if self.args.optimizer_in_backward:
                    raise guards.OutOfRows(
                        "memory ran out in a step that optimizer_in_backward had begun to take; go on with "
                        "--resume and a smaller batch_size"
                    ) from error
                if self.layout.processes > 1:
                    raise guards.OutOfRows(
                        f"memory ran out on process {self.layout.rank} while others waited for its part of "
                        "the model or of the gradients; go on with --resume and a smaller micro_batch_size"
                    ) from error
            # Outside of the handler, which holds on to the frames of the failed step.
            self.halve()

    def halve(self) -> None:
        """Goes on with micro-batches of half the size; all processes call it."""
        for router in compiling.routers_of(self.model):
            router.tally.zero_()
        self.optimizer.zero_grad()
        self.runner.graphs = None  # recordings hold memory
        free_memory(self.accelerator.device)
        self.rows.forget()
        rows = -(-self.args.batch_size // self.layout.data_size)  # of a largest step
        guards.halve(self.feed, rows, self.say, self.accelerator.device)
        self.runner.resume()

    # ---- before the clock starts ----

    def warm_up(self, first: int) -> None:
        """Runs each shape once that the steps have: kernels are compiled, and memory is seen to suffice.

        Weights, optimizer, random numbers and the routers' counts are the same before and after.

        Args:
            first: step that comes next.

        Raises:
            ValueError: if CUDA graphs are asked for and cannot be recorded.
            OutOfRows: if not one row fits into memory.
        """
        if self.accelerator.device.type == "cpu" and not (self.compiles.on or self.graphs.on):
            return
        if self.args.optimizer_in_backward:
            return  # a backward pass is a step there
        self.runner.model.train()
        started = time.perf_counter()
        with compiling.unchanged(self.model, self.optimizer):
            shapes = self._shapes(first)
            if self.compiles.on:
                self.say(compiling.waiting_for(shapes))
            done = set()
            while todo := [shape for shape in shapes if shape not in done]:
                if self._try(todo[0]):
                    done.add(todo[0])
                else:
                    shapes = self._shapes(first)
            if self.graphs.on:
                self._record(shapes)
            self._step_without_effect(shapes[0])
        if self.compiles.on:
            self.say(f"compiled in {time.perf_counter() - started:.0f} s; the clock of the run starts now")

    def _try(self, shape: tuple[int, int]) -> bool:
        """One micro-batch forward and backward; False if memory ran out somewhere and parts are smaller."""

        def run() -> None:
            self.runner.accumulate(self._dummy(shape), sync=False)

        no_memory = failed = False
        try:
            if self.compiles.on:
                failed = not compiling.try_or_go_on_without(run, self.say)
            else:
                run()
        except torch.OutOfMemoryError:
            no_memory = True
        if agree(self.accelerator, no_memory):
            self.halve()
            return False
        if agree(self.accelerator, failed):
            self._without_compiling()
            return self._try(shape)
        self.optimizer.zero_grad()
        return True

    def _record(self, shapes: list[tuple[int, int]]) -> None:
        """Records the pass of each shape, if the host is seen to be slower than the device with one.

        Raises:
            ValueError: if graphs are asked for and the recording fails.
        """
        passes = GraphedPasses(self.runner.run, self.runner.parameters)
        batches = [self._dummy(shape) for shape in shapes]
        try:
            share = max(passes.launching(data.batches[0], data.counted) for data in batches)
            if self.graphs.measured and share < MOST_LAUNCHING:
                why = f"launching takes {share:.0%} of a pass: the GPU is busy"
                self.graphs = GraphChoice(False, why=why)
            else:
                for data in batches:
                    passes.record(data.batches[0], data.counted)
                self.runner.graphs = passes
                self.graphs = GraphChoice(True, why=f"launching took {share:.0%} of a pass")
        except RuntimeError as error:  # memory that runs out is one too
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if not self.graphs.measured:
                raise ValueError(
                    f"cuda_graphs=on: recording failed ({reason}); take cuda_graphs=auto or off"
                ) from error
            self.graphs = GraphChoice(False, why=f"recording failed: {reason}")
        self.optimizer.zero_grad()
        free_memory(self.accelerator.device)
        self.say(f"launching kernels: {self.graphs}")

    def _without_compiling(self) -> None:
        if self.compiles.by_layer:
            for layer in self.model.base_model.layers:
                layer._compiled_call_impl = None
        self.compiles = compiling.CompileChoice(False, why="compiling failed")
        self.optimizer.zero_grad()
        self.runner = self._make_runner()

    def _step_without_effect(self, shape: tuple[int, int]) -> None:
        """A whole step that the optimizer is told not to take; recordings that leave no room for it go."""
        try:
            self._queue_without_effect(shape)
            return
        except torch.OutOfMemoryError:
            if self.runner.graphs is None or self.args.cuda_graphs == "on":
                raise
        self.runner.graphs = None
        self.graphs = GraphChoice(False, why="memory ran out beside the recording")
        self.optimizer.zero_grad()
        free_memory(self.accelerator.device)
        self.say(f"launching kernels: {self.graphs}")
        self._queue_without_effect(shape)

    def _queue_without_effect(self, shape: tuple[int, int]) -> None:
        self.runner.accumulate(self._dummy(shape))
        if hasattr(self.optimizer, "found_inf"):
            take_step(self.wrapped_optimizer, torch.ones((), device=self.accelerator.device))

    def _dummy(self, shape: tuple[int, int]) -> StepData:
        rows, length = shape
        device, vocabulary = self.accelerator.device, self.model.config.vocab_size
        batch = compiling.dummy_batch(rows, length, vocabulary, device, self.args.isolate_documents)
        return StepData(torch.tensor(rows * length, device=device), [batch])

    def _shapes(self, first: int) -> list[tuple[int, int]]:
        """Rows and lengths of the micro-batches of a run, the largest first."""
        return sorted(self.feed.shapes(first), key=lambda shape: (shape[0] * shape[1], shape), reverse=True)

    # ---- beside training ----

    def is_bad(self, outcome: Outcome) -> bool:
        """Whether a step was skipped, and not because the scale of fp16 gradients is still being found."""
        scaler = self.accelerator.scaler
        if not outcome.bad or scaler is None or not math.isfinite(outcome.loss):
            return outcome.bad
        return scaler.get_scale() < 1

    def state(self) -> dict:
        """What a checkpoint needs beside model and optimizer, as JSON."""
        scaler, updates = self.accelerator.scaler, self.optimizer.in_backward
        values = {} if scaler is None else {"scaler": scaler.state_dict()}
        return values if updates is None else values | {"gradient_norm": updates.norm.item()}

    def restore(self, state: dict) -> None:
        """Takes `state` up again."""
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.optimizer.in_backward is not None and "gradient_norm" in state:
            self.optimizer.in_backward.clip_by(state["gradient_norm"])
        self.rows.forget()
        self.runner.resume()

    def close(self) -> None:
        """Ends what runs beside the loop."""
        self.rows.close()

    def evaluating(self) -> AbstractContextManager:
        """The context in which the model is scored: compiled layers would be compiled for its shapes too."""
        return compiling.eager() if self.compiles.on and self.compiles.by_layer else nullcontext()

    def save_bad_batch(self, folder: Path, step: int) -> Path:
        """Writes this process's rows of a step; see `guards.save_bad_batch`."""
        self.rows.forget()
        data = self.rows.get(step)
        return guards.save_bad_batch(folder, step, self.layout.rank, data.batches)


def checkpoint_layers(model: TesseraForCausalLM, every: int) -> None:
    """Recomputes the activations of every n-th layer in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None and "every_n_layers" in inspect.signature(enable).parameters:
        enable(every_n_layers=every)
        return
    # Before transformers 5.21 or so: all of them, of which some are taken out again.
    model.gradient_checkpointing_enable()
    for i, layer in enumerate(model.base_model.layers):
        layer.gradient_checkpointing = i % every == 0


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """The groups of an optimizer with their sizes and rates, on one line."""
    parts = []
    for group in optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        decay = f", decay {group['weight_decay']:g}" if group.get("weight_decay") else ""
        parts.append(
            f"{group.get('name', 'parameters')} {_short(size)} {group.get('kind', '')} "
            f"{group['lr']:.3g}{decay}".replace("  ", " ")
        )
    return " | ".join(parts)


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)

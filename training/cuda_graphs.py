"""A micro-batch's forward and backward pass as one CUDA graph, where the host cannot launch kernels in time.

The kernels of a small model are done before Python has launched the next ones; recorded once and replayed,
they follow each other at once (Gray, Getting Started with CUDA Graphs, 2019). A large model gains nothing,
because its GPU is busy anyway, and would hold a second pool of memory. What belongs here: when a run takes
graphs, their recording, and the gradients that they add to, which stay at one address.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

CHOICES = ("auto", "on", "off")
# Of the time of a pass: above it the GPU waits for the host, which also has optimizer and data to see to.
MOST_LAUNCHING = 0.5
PASSES = 3  # before a recording: libraries choose kernels and get their memory in the first

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GraphChoice:
    """Whether passes are to be recorded, and why (not).

    Attributes:
        on: whether they are.
        measured: only if launching is seen to take longer than computing.
        why: a reason, for the one who asked.
    """

    on: bool
    measured: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{'CUDA graphs' if self.on else 'no CUDA graphs'} ({self.why})"


def choose_graphs(choice: str, device: torch.device, obstacles: dict[str, bool]) -> GraphChoice:
    """What `cuda_graphs` of a run comes to.

    Args:
        choice: one of `CHOICES`.
        device: that the model is trained on.
        obstacles: what a recording cannot hold, in words, and whether the run has it.

    Raises:
        ValueError: for another choice, or if graphs are asked for and cannot be had.
    """
    if choice not in CHOICES:
        raise ValueError(f"cuda_graphs must be 'auto', 'on' or 'off', got '{choice}'")
    if choice == "off":
        return GraphChoice(False, why="cuda_graphs=off")
    if device.type != "cuda":
        found = f"{device.type.upper()} has none"
    else:
        found = next((f"not with {name}" for name, there in obstacles.items() if there), None)
    if found is None:
        return GraphChoice(True, choice == "auto", f"cuda_graphs={choice}")
    if choice == "on":
        raise ValueError(f"cuda_graphs=on: {found}; take cuda_graphs=auto or off")
    return GraphChoice(False, why=found)


class GraphedPasses:
    """Forward and backward passes that are replayed for shapes which were recorded, and run for others.

    Args:
        run: takes a micro-batch and the number of targets in a step (a 0-dim tensor), adds to the gradients
            and returns the loss, without a look at any value.
        parameters: whose gradients it adds to.
    """

    def __init__(self, run: Callable[[Batch, torch.Tensor], torch.Tensor], parameters: list[nn.Parameter]):
        self.run, self.parameters = run, parameters
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor, torch.Tensor]] = {}

    def begin(self) -> None:
        """Puts gradients of zero where recordings add to them; before the first micro-batch of a step."""
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
            for p, gradient in self._gradients.items():
                p.grad = gradient

    def __call__(self, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch, whose gradients are added up; valid until the next call."""
        found = self._recorded.get(_key(batch))
        if found is None:
            return self.run(batch, counted)
        graph, inputs, count, loss = found
        for name, value in inputs.items():
            value.copy_(batch[name], non_blocking=True)
        count.copy_(counted, non_blocking=True)
        graph.replay()
        return loss

    def launching(self, batch: Batch, counted: torch.Tensor) -> float:
        """Share of a pass's time in which the host launches; gradients are worth nothing afterwards.

        Raises:
            torch.OutOfMemoryError: if memory runs out.
        """
        shares = []
        for _ in range(PASSES):
            for p in self.parameters:
                p.grad = None  # a second set of them may be more than there is room for
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.run(batch, counted)
            launched = time.perf_counter()
            torch.cuda.synchronize()
            shares.append((launched - started) / (time.perf_counter() - started))
        return min(shares)

    def record(self, batch: Batch, counted: torch.Tensor) -> None:
        """Records the pass of such a micro-batch; gradients are worth nothing afterwards.

        Raises:
            RuntimeError: if something in it cannot be recorded.
        """
        # One tensor stays one: compiled code is for arguments that are the same where they were the same.
        copies = {id(value): value.clone() for value in batch.values()}
        inputs = {name: copies[id(value)] for name, value in batch.items()}
        count = counted.clone()
        if not self._gradients:
            for p in self.parameters:
                p.grad = None
            self.run(inputs, count)
            self._gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        self.begin()
        torch.cuda.empty_cache()  # what the passes before have used is not the recording's to use
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(PASSES):
                self.run(inputs, count)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # The thread that reads ahead may copy meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = self.run(inputs, count)
        self._recorded[_key(batch)] = graph, inputs, count, loss


def _key(batch: Batch) -> tuple:
    return tuple((name, tuple(value.shape), value.dtype) for name, value in batch.items())

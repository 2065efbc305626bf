"""One optimizer step: micro-batches, their gradients, the update. It is queued and not waited for.

The loss is divided by the tokens of the whole step, so neither accumulation nor the number of processes
changes it. What the host wants to know of a step (its loss, whether it was skipped, the clock that all
processes go by) travels in one small tensor, summed over the processes, and is read when a later step is
queued already; see `Outcomes`. What belongs here: what happens between two steps' data.
"""

import signal
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from .cuda_graphs import GraphedPasses
from .parallel import Layout, gradient_sync
from .precision import Precision

# Places in the tensor of a step.
LOSS, NORM, BAD, NO_MEMORY, SECONDS, *STOPS = range(8)
# Of the signals that ask a run to stop: how many processes got each.
SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))
MOST_STEPS_AHEAD = 1  # that the host queues before it reads what an earlier one came to


@dataclass(frozen=True)
class Outcome:
    """What a step came to, the same on all processes.

    Attributes:
        step: steps done with it.
        loss: nats per token, over all processes.
        norm: of the gradient before clipping.
        bad: whether it was skipped, because one of the two is not finite.
        no_memory: whether memory ran out on some process, and the step is to be done again.
        stop: number of the signal by which some process was asked to stop, 0 for none.
        seconds: of training, by the first process's clock, when the step was queued.
    """

    step: int
    loss: float
    norm: float
    bad: bool
    no_memory: bool
    stop: int
    seconds: float


class Outcomes:
    """The outcomes of steps in the queue of a device, read some steps later; on a CPU at once."""

    def __init__(self, device: torch.device):
        self.ahead = 0 if device.type == "cpu" else MOST_STEPS_AHEAD
        self._waiting: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, values: torch.Tensor) -> None:
        """Notes a queued step.

        Args:
            step: steps done with it.
            values: what `StepRunner` returned.
        """
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, values, event))

    def settled(self, behind: int | None = None) -> Iterator[Outcome]:
        """The outcomes of all steps but the last `behind`, in order; waits for them."""
        behind = self.ahead if behind is None else behind
        while len(self._waiting) > behind:
            step, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            values = values.tolist()
            yield Outcome(
                step,
                values[LOSS],
                values[NORM],
                values[BAD] > 0,
                values[NO_MEMORY] > 0,
                _signal_in(values),
                values[SECONDS],
            )

    def forget(self) -> None:
        """Drops what has not been read: the run goes back to an earlier step."""
        self._waiting.clear()


def _signal_in(values: list[float]) -> int:
    """Number of a signal that some process got."""
    return next((int(sent) for place, sent in zip(STOPS, SIGNALS, strict=True) if values[place] > 0), 0)


@dataclass(frozen=True)
class StepData:
    """The rows of a step on this process.

    Attributes:
        counted: targets that count over all processes, a 0-dim tensor: a compiler would take a number for a
            constant.
        batches: micro-batches, as the model's arguments.
    """

    counted: torch.Tensor
    batches: list[dict[str, torch.Tensor]]


class StepRunner:
    """Queues optimizer steps.

    Args:
        accelerator: of the run.
        layout: over how many processes data and model are spread.
        precision: of the products.
        model: wrapped and compiled, as it is trained.
        optimizer: as accelerate wrapped it.
        clip: largest gradient norm; 0 for none.
        context: what attention runs in.
        z_loss: its weight in the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layout: Layout,
        precision: Precision,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        context: Callable[[], AbstractContextManager],
        z_loss: float = 0.0,
    ):
        self.accelerator, self.layout, self.precision = accelerator, layout, precision
        self.model, self.optimizer, self.clip, self.context = model, optimizer, clip, context
        # A model that knows no such term is not told of none.
        self.terms = {"z_loss": z_loss} if z_loss else {}
        self.in_backward = getattr(getattr(optimizer, "optimizer", optimizer), "in_backward", None)
        self.parameters = [p for p in accelerator.unwrap_model(model).parameters() if p.requires_grad]
        # Doubles hold the clock of a long run; some devices have none.
        kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.values = torch.zeros(8, dtype=kind, device=accelerator.device)
        self.graphs: GraphedPasses | None = None
        # Once memory has run out somewhere no step may be taken until that one is done again.
        self.halted = torch.zeros((), dtype=torch.float32, device=accelerator.device)

    def step(self, data: StepData, seconds: float = 0.0, stop: int = 0) -> torch.Tensor:
        """Trains on the rows of a step.

        Args:
            data: the rows.
            seconds: of training so far, by this process's clock.
            stop: number of the signal by which this process was asked to stop, 0 for none.

        Returns:
            The tensor [8] that `Outcomes.add` takes; nothing has been waited for.

        Raises:
            torch.OutOfMemoryError: if memory ran out and the other processes cannot be told. Gradients are
                gone then, and the weights are as they were.
        """
        no_memory = 0.0
        try:
            total = self.accumulate(data)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            if not self.layout.may_fail_alone or self._in_last_backward:
                raise
            total, no_memory = self._poison(data), 1.0
        return self._update(total, no_memory, seconds, stop)

    def accumulate(self, data: StepData, sync: bool = True) -> torch.Tensor:
        """Adds the gradients of all micro-batches up.

        Returns:
            The loss of this process's rows, divided by the tokens of the step.
        """
        self._in_last_backward = False
        total = torch.zeros((), device=self.accelerator.device)
        if self.graphs is not None:
            self.graphs.begin()
        for i, batch in enumerate(data.batches, start=1):
            if self.graphs is not None:
                total += self.graphs(batch, data.counted)
                continue
            last = sync and i == len(data.batches)
            with gradient_sync(self.model, last):
                total += self.run(batch, data.counted, last)
        return total

    def run(self, batch: dict[str, torch.Tensor], counted: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Forward and backward pass of one micro-batch, the last of a step or not; returns its loss."""
        with self.context():
            with self.precision.autocast(self.accelerator.device):
                loss = self._loss(batch, counted)
            self._in_last_backward = last
            # Processes average their gradients; the loss is already divided by the tokens of all.
            self.accelerator.backward(loss * self.layout.data_size)
        return loss.detach()

    def _loss(self, batch: dict[str, torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
        return self.model(**batch, num_items_in_batch=counted, use_cache=False, **self.terms).loss

    def _poison(self, data: StepData) -> torch.Tensor:
        """Joins the others' gradients with NaN, from a row that fits: so that all skip the step."""
        free_memory(self.accelerator.device)
        row = {name: value[:1] for name, value in data.batches[0].items()}
        with torch.compiler.set_stance("force_eager"), gradient_sync(self.model, True), self.context():
            with self.precision.autocast(self.accelerator.device):
                loss = self._loss(row, data.counted)
            (loss * float("nan")).backward()
        return loss.detach()

    def _update(self, total: torch.Tensor, no_memory: float, seconds: float, stop: int) -> torch.Tensor:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        if self.in_backward is not None:
            # Every parameter has taken its step, but those whose gradient was not finite.
            self.optimizer.step()
            norm = self.in_backward.norm
        else:
            norm = gradient_norm(self.parameters)
        first = self.accelerator.is_main_process
        values = self.values.clone()
        values[LOSS] = total.to(values.dtype) / self.layout.replicas
        host = [no_memory, seconds if first else 0.0, *(float(stop == number) for number in SIGNALS)]
        for place, number in enumerate(host, start=NO_MEMORY):
            if number:
                values[place].fill_(number)  # the launch carries it: nothing is copied from the host
        if self.accelerator.num_processes > 1:
            dist.all_reduce(values)
        self.halted = torch.maximum(self.halted, (values[NO_MEMORY] > 0).float())
        values[NORM] = norm.to(values.dtype)
        finite = torch.isfinite(values[LOSS]) & torch.isfinite(values[NORM])
        values[BAD] = (~finite).to(values.dtype)
        found_inf = torch.maximum(self.halted, values[BAD].float())
        if self.in_backward is not None:
            return values
        if self.clip:
            for same in _by_mesh(self.parameters):
                torch.nn.utils.clip_grads_with_norm_(same, self.clip, norm)
        take_step(self.optimizer, found_inf, scaled=scaler is not None)
        self.optimizer.zero_grad()
        return values

    def resume(self) -> None:
        """Lets steps be taken again after memory ran out."""
        self.halted.zero_()


def take_step(optimizer: torch.optim.Optimizer, found_inf: torch.Tensor, scaled: bool = False) -> None:
    """An optimizer's step, unless `found_inf` > 0: then nothing changes.

    Optimizers with an attribute `found_inf` look at it on the device. For others the host waits for it, and
    so it does for scaled gradients, whose scaler has a look of its own.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if scaled or not hasattr(inner, "found_inf"):
        # The scaler is to see overflowing gradients, and lower its scale.
        if scaled or not found_inf.item():
            optimizer.step()
        return
    inner.found_inf = found_inf
    try:
        optimizer.step()
    finally:
        inner.found_inf = None


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, of whole tensors where processes hold parts; a 0-dim tensor."""
    norms = [torch.nn.utils.get_total_norm([p.grad for p in same]) for same in _by_mesh(parameters)]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that have a gradient, by the processes that share them: torch takes one kind at a time."""
    by_mesh = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_mesh[getattr(p.grad, "device_mesh", None)].append(p)
    return list(by_mesh.values())


def free_memory(device: torch.device) -> None:
    """Gives the device's memory back that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

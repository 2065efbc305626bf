"""Muon for matrices and AdamW for the rest, as one optimizer on one process or many.

What belongs here: the order of a step, its state, and what is compiled. The rules are in `muon.py` and
`adamw.py`, and who does what of several processes is in `matrix_batches.py`.

Notable:
- nothing waits for the GPU: learning rates and momentum reach the compiled programs as tensors, so a schedule
  compiles nothing anew, and where `found_inf` is set the decision stays on the device.
- the update of a matrix is computed on one process, whether the gradients are copies (DDP) or split (FSDP2).
- AdamW works on the part of a tensor that a process has.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import adamw, low_precision, muon
from .matrix_batches import (
    Batch,
    CopiesOnTheWay,
    RowsOnTheWay,
    first_of,
    local,
    make_batches,
    part_of,
    split_like_weights,
)

SMALL = 2**25  # numbers in a batch under which copies into one stack cost less than a kernel for each matrix
COMPILED_FROM = 2**20  # numbers in all matrices under which compiling is not worth the wait


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for groups with `kind="muon"`, AdamW (Loshchilov and Hutter, 2019) for the
    others.

    A parameter with more than two dimensions is a stack of matrices; a group's `parts` says how many matrices
    share the rows of each (2 for a fused gate and up projection). On several processes the parameters are
    DDP's copies or FSDP2's DTensors, and all processes call `step` together.

    Args:
        groups: parameter groups with `kind` ("muon", "adamw" or "adamw-8bit"); `lr` and `weight_decay` for
            all; `momentum`, `beta2`, `parts` and `features` (of `muon.FEATURES`) for Muon; `betas` and `eps`
            for AdamW.
        weights: how bf16 parameters keep what bf16 cannot say, see `low_precision.py`; with "fp32" they do
            not. Parameters in fp32 are not touched by it.
        moments: dtype of AdamW's moments and Muon's momentum beside bf16 parameters, unless `weights` is
            "fp32", where it is that of the parameter.
        seed: of the chances with which numbers are rounded.
        compiled: whether programs are compiled; default: on CUDA, for matrices that are worth it.

    Attributes:
        found_inf: 0-dim tensor or None; where it is over 0, `step` changes nothing.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict],
        weights: str = "fp32",
        moments: torch.dtype = torch.float32,
        seed: int = 0,
        compiled: bool | None = None,
    ):
        if weights not in low_precision.WEIGHTS:
            raise ValueError(
                f"weights must be {' or '.join(map(repr, low_precision.WEIGHTS))}, got '{weights}'"
            )
        self.weights, self.moments, self.seed, self.compiled = weights, moments, seed, compiled
        self._batches: list[Batch] | None = None
        self._seen: tuple[int, ...] = ()
        self._programs: dict[Any, Callable] = {}
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._keys: dict[nn.Parameter, int] = {}
        self.in_backward = None
        defaults = {
            "kind": "adamw",
            "lr": 1e-3,
            "momentum": 0.95,
            "beta2": 0.9,
            "parts": 1,
            "features": muon.FEATURES,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
        super().__init__(groups, defaults)
        if any(group["kind"] == "adamw-8bit" for group in self.param_groups):
            adamw.find_eight_bit()  # missing is better said now

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.in_backward is not None:
            # Routers listen to steps, and are not to move after one whose gradients are no numbers.
            self.found_inf = (~self.in_backward.finish().isfinite()).float()
            return loss
        for group in self.param_groups:
            split_like_weights(group["params"])
        found_inf = self.found_inf
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf > 0:  # nobody waits for a CPU's own number
                return loss
            found_inf = None
        under_way = self._start_muon(self.batches(), found_inf)
        for group in self.param_groups:
            if group["kind"] != "muon":
                self._adamw(group, [p for p in group["params"] if p.grad is not None], found_inf)
        for finish in under_way:
            finish()
        return loss

    @torch.no_grad()
    def step_alone(self, p: nn.Parameter, group: dict, found_inf: torch.Tensor | None) -> None:
        """Updates one parameter that has its gradient, without other processes."""
        if group["kind"] == "muon":
            for finish in self._start_muon([Batch([p], group, "here")], found_inf):
                finish()
        else:
            self._adamw(group, [p], found_inf)

    def batches(self) -> list[Batch]:
        """The batches of matrices; made anew when a wrapper has put other parameters in place."""
        seen = tuple(id(p) for group in self.param_groups for p in group["params"])
        if self._batches is None or seen != self._seen:
            self._seen = seen
            self._batches = make_batches([g for g in self.param_groups if g["kind"] == "muon"])
            self._keys = {}
            for i, group in enumerate(self.param_groups):
                names = group.get("param_names", [f"{i}/{j}" for j in range(len(group["params"]))])
                for name, p in zip(names, group["params"], strict=True):
                    self._keys[p] = low_precision.key_of(self.seed, name)
        return self._batches

    def holds(self, p: nn.Parameter, key: str) -> bool:
        """Whether this process has such a tensor of a parameter's state."""
        for batch in self.batches():
            for i, one in enumerate(batch.params):
                if one is p:
                    owned = (
                        ("second_moment", "momentum_buffer")
                        if batch.layout == "copies"
                        else ("second_moment",)
                    )
                    return key not in owned or i in batch.mine
        return True

    def _narrow(self, p: nn.Parameter) -> bool:
        return self.weights != "fp32" and p.dtype is torch.bfloat16

    def _key(self, p: nn.Parameter) -> int | None:
        return self._keys[p] if self._narrow(p) and self.weights == "bf16" else None

    # ---- Muon ----

    def _start_muon(self, batches: list[Batch], found_inf: torch.Tensor | None) -> list[Callable[[], None]]:
        """Starts what travels first and computes while it does; what comes back ends the step."""
        skip = None if found_inf is None else found_inf > 0
        compiled = self.compiled
        if compiled is None:
            matrices = [p for b in batches for p in b.params]
            compiled = any(p.is_cuda for p in matrices)
            compiled = compiled and sum(local(p).numel() for p in matrices) >= COMPILED_FROM
        jobs = []
        for batch in batches:
            chosen = [i for i, p in enumerate(batch.params) if p.grad is not None]
            if not chosen:
                continue
            if len(chosen) < len(batch.params):
                owners = [batch.owners[i] for i in chosen] if batch.owners else []
                params = [batch.params[i] for i in chosen]
                batch = Batch(params, batch.group, batch.layout, batch.process_group, owners)
            jobs.append(_MuonJob(self, batch, skip, compiled))
        for job in jobs:
            job.start()
        for job in sorted(jobs, key=lambda job: job.batch.layout == "here"):
            job.compute()
        return [job.finish for job in jobs]

    def program(self, function: Callable, signature: Any, compiled: bool) -> Callable:
        """A function, or itself compiled for one kind of batch.

        torch gives up on a function that it has compiled for eight kinds of input; each kind gets a function
        of its own here.
        """
        if not compiled:
            return function
        if signature not in self._programs:
            own = types.FunctionType(
                function.__code__.replace(co_name=f"{function.__name__}_{len(self._programs)}"),
                function.__globals__,
                function.__name__,
                function.__defaults__,
                function.__closure__,
            )
            own.__kwdefaults__ = function.__kwdefaults__
            self._programs[signature] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._programs[signature]

    # ---- AdamW ----

    def _adamw(self, group: dict, params: list[nn.Parameter], found_inf: torch.Tensor | None) -> None:
        if not params:
            return
        if not self._keys:
            self.batches()
        if found_inf is not None:
            found_inf = (found_inf > 0).float()  # torch's kernel asks whether it is 1
        if group["kind"] == "adamw-8bit":
            params = self._eight_bit(group, params, found_inf)
        whole = []
        for p in params:
            if self._narrow(p):
                self._adamw_narrow(group, p, found_inf)
            else:
                state = self.state[p]
                if not state:
                    adamw.start_state(local(p), state, "fp32", p.dtype)
                whole.append(p)
        if whole:
            states = [self.state[p] for p in whole]
            adamw.update_fused(
                [local(p) for p in whole], [local(p.grad) for p in whole], states, group, found_inf
            )

    def _adamw_narrow(self, group: dict, p: nn.Parameter, found_inf: torch.Tensor | None) -> None:
        weight, grad, state = local(p), local(p.grad), self.state[p]
        if not state:
            adamw.start_state(weight, state, self.weights, self.moments)
        key, first = self._key(p), first_of(p)
        if self.weights == "split" and self.moments is torch.bfloat16:
            key = self._keys[p]  # the weight is exact, but its moments are not
        if not (self.compiled or (self.compiled is None and weight.is_cuda)):
            adamw.update_narrow(weight, grad, state, group, found_inf, key, first)
            return
        program = self._programs.get("narrow")
        if program is None:
            program = torch.compile(adamw.narrow_program, fullgraph=True, dynamic=True)
            self._programs["narrow"] = program
        state["step"] += 1 if found_inf is None else 1 - found_inf
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        names = ("exp_avg", "exp_avg_sq", "remainder")
        flat = [state[name].view(-1) if name in state else None for name in names]
        program(
            weight.view(-1),
            grad.reshape(-1),
            *flat,
            state["step"],
            *(torch.tensor(number, dtype=torch.float32) for number in numbers),
            found_inf,
            None if key is None else torch.tensor(key, dtype=torch.int32),
            torch.tensor(first, dtype=torch.int32),
        )

    def _eight_bit(
        self, group: dict, params: list[nn.Parameter], found_inf: torch.Tensor | None
    ) -> list[nn.Parameter]:
        """Updates the larger tensors; the smaller ones come back."""
        library = adamw.find_eight_bit()
        if found_inf is not None and found_inf > 0:  # the library counts steps on the host: one wait
            return []
        left = []
        for p in params:
            if isinstance(p, DTensor):
                raise ValueError(
                    "optimizer 'adamw-8bit' keeps a scale for each block of a whole tensor and does not take "
                    "tensors that are split over processes; choose --parallel ddp, or optimizer 'adamw'"
                )
            if p.numel() < adamw.QUANTIZED_FROM:
                left.append(p)
                continue
            weight, state = local(p), self.state[p]
            if weight.device not in self._maps:
                self._maps[weight.device] = tuple(
                    library.create_dynamic_map(signed=signed).to(weight.device) for signed in (True, False)
                )
            if not state:
                adamw.start_eight_bit(weight, state, self.weights)
            maps = self._maps[weight.device]
            adamw.update_eight_bit(library, maps, weight, p.grad, state, group, self._key(p), 0)
        return left


class _MuonJob:
    """One batch in one step: start, compute, finish."""

    def __init__(self, optimizer: MuonAdamW, batch: Batch, skip: torch.Tensor | None, compiled: bool):
        self.optimizer, self.batch, self.skip, self.compiled = optimizer, batch, skip, compiled
        group = batch.group
        self.parts, features = group["parts"], set(group["features"])
        self.equilibrate, self.renormalize = "equilibrate" in features, "renormalize" in features
        self.normuon, self.cautious = "normuon" in features, "cautious" in features
        rows, columns = batch.shape[-2] // self.parts, batch.shape[-1]
        self.rows, self.columns = rows, columns
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        numbers = (group["momentum"], rate, group["weight_decay"], group["beta2"])
        if compiled:
            numbers = tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)
        self.momentum, self.rate, self.decay, self.beta2 = numbers
        if skip is not None:
            # Both as numbers: a tensor of the host would be copied, and the host would wait for all that is
            # queued, with nothing left to do for the device while it launches the update.
            self.rate = torch.where(skip, 0.0, rate)
        self.dtype = muon.work_dtype(local(batch.params[0]).device)
        for i, p in enumerate(batch.params):
            self._start_state(p, i in batch.mine)

    def _start_state(self, p: nn.Parameter, mine: bool) -> None:
        """Momentum lies with the gradient; under DDP, with the owner."""
        state, weight = self.optimizer.state[p], local(p)
        narrow = self.optimizer._narrow(p)
        if "momentum_buffer" not in state and (mine or self.batch.layout != "copies"):
            dtype = self.optimizer.moments if narrow else p.dtype
            state["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype)
        if "second_moment" not in state and mine and self.normuon:
            shape = (*self.batch.shape[:-2], self.parts, *muon.second_moment_shape(self.rows, self.columns))
            state["second_moment"] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        if narrow and self.optimizer.weights == "split" and "remainder" not in state:
            state["remainder"] = torch.zeros_like(weight, dtype=torch.int16)
        if narrow and self.optimizer.weights == "bf16" and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)

    def start(self) -> None:
        """Sends rows on their way."""
        batch = self.batch
        if batch.layout == "rows":
            ahead = self._look_ahead(range(len(batch.params)))
            self.travelling = RowsOnTheWay(batch, ahead)

    def compute(self) -> None:
        """Orthogonalises what is this process's to orthogonalise and lets the others know."""
        batch = self.batch
        if batch.layout == "here":
            self._update_here()
        elif batch.layout == "rows":
            x = self.travelling.matrices()
            self.travelling.send_back(self._direction(x, batch.mine) if len(x) else x)
        elif batch.layout == "copies":
            updates = None
            if batch.mine:
                updates = self._direction(torch.stack(self._look_ahead(batch.mine)), batch.mine)
            like = torch.empty(0, dtype=self.dtype, device=batch.params[0].device)
            self.travelling = CopiesOnTheWay(batch, updates, like)
        else:
            whole = [
                DTensor.from_local(one, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                for one, p in zip(self._look_ahead(batch.mine), batch.params, strict=True)
            ]
            x = torch.stack([one.full_tensor() for one in whole])
            updates = self._direction(x, batch.mine)
            self.updates = [part_of(one, p) for one, p in zip(updates, batch.params, strict=True)]

    def finish(self) -> None:
        """Applies the updates."""
        batch = self.batch
        if batch.layout == "here":
            return
        updates = self.updates if batch.layout == "scattered" else self.travelling.updates()
        self._apply(updates)

    def _state(self, name: str, places: Iterable[int]) -> list[torch.Tensor | None]:
        return [self.optimizer.state[self.batch.params[i]].get(name) for i in places]

    def _look_ahead(self, places: Iterable[int]) -> list[torch.Tensor]:
        places = list(places)
        grads = [local(self.batch.params[i].grad) for i in places]
        buffers = self._state("momentum_buffer", places)
        program = self._program(_look_ahead, len(places))
        return program(grads, buffers, self.momentum, self.skip, dtype=self.dtype)

    def _direction(self, x: torch.Tensor, places: list[int]) -> torch.Tensor:
        """Whole matrices [k, ..., m, n] before orthogonalisation -> their updates."""
        second = self._stacked_second(places)
        program = self._program(_direction, len(places))
        result = program(
            x,
            second,
            self.beta2,
            self.skip,
            parts=self.parts,
            equilibrate=self.equilibrate,
            renormalize=self.renormalize,
            dtype=self.dtype,
        )
        return result

    def _apply(self, updates: list[torch.Tensor]) -> None:
        params = self.batch.params
        places = range(len(params))
        program = self._program(_apply, len(params))
        program(
            [local(p) for p in params],
            updates,
            self._state("remainder", places),
            *self._chances(),
            self.rate,
            self.decay,
            cautious=self.cautious,
            firsts=[first_of(p) for p in params],
        )

    def _chances(self) -> tuple[list, list]:
        """Keys and steps of parameters that are rounded by chance; this update is counted."""
        keys = [self.optimizer._key(p) for p in self.batch.params]
        steps = self._state("step", range(len(keys)))
        if steps[0] is not None:
            more = 1 if self.skip is None else (~self.skip).float()
            torch._foreach_add_(steps, more)
        if self.compiled:
            keys = [None if key is None else torch.tensor(key, dtype=torch.int32) for key in keys]
        return keys, steps

    def _update_here(self) -> None:
        batch, places = self.batch, range(len(self.batch.params))
        weights = [local(p) for p in batch.params]
        grads = [local(p.grad) for p in batch.params]
        if not weights[0].numel():
            return
        second = self._stacked_second(list(places))
        narrow = self.optimizer._narrow(batch.params[0])
        small = not narrow and len(weights) > 1 and len(weights) * weights[0].numel() <= SMALL
        keys, steps = self._chances()
        remainders = self._state("remainder", places)
        firsts = [first_of(p) for p in batch.params]
        apart = weights
        if small:
            grads, buffers = [torch.stack(grads)], [self._stack("momentum_buffer", places)]
            if self.compiled:  # otherwise the weights are changed in place
                weights = [torch.stack(weights)]
                remainders, keys, steps, firsts = [None], [None], [None], [0]
        else:
            buffers = self._state("momentum_buffer", places)
        program = self._program(_update, (len(apart), small))
        program(
            weights,
            grads,
            buffers,
            second,
            remainders,
            keys,
            steps,
            self.momentum,
            self.rate,
            self.decay,
            self.beta2,
            self.skip,
            parts=self.parts,
            equilibrate=self.equilibrate,
            renormalize=self.renormalize,
            cautious=self.cautious,
            dtype=self.dtype,
            firsts=firsts,
        )
        if small and self.compiled:
            torch._foreach_copy_(apart, list(weights[0].unbind(0)))

    def _stacked_second(self, places: list[int]) -> torch.Tensor | None:
        """[matrices, m or 1, 1 or n]; None without NorMuon."""
        return self._stack("second_moment", places).flatten(0, -3) if self.normuon else None

    def _stack(self, name: str, places: Iterable[int]) -> torch.Tensor:
        """Tensors of the parameters' states in one, of which they are views from then on."""
        states = [self.optimizer.state[self.batch.params[i]] for i in places]
        if len(states) == 1:
            return states[0][name].unsqueeze(0)
        stack = self.batch.stacks.get(name)
        whole = stack is not None and len(stack) == len(states)
        if not whole or any(state[name].data_ptr() != stack[i].data_ptr() for i, state in enumerate(states)):
            stack = torch.stack([state[name] for state in states])
            for state, one in zip(states, stack.unbind(0), strict=True):
                state[name] = one
            self.batch.stacks[name] = stack
        return stack

    def _program(self, function: Callable, count: Any) -> Callable:
        batch = self.batch
        of_state = self.optimizer.state[batch.params[0]]
        signature = (
            function.__name__,
            count,
            batch.layout,
            local(batch.params[0]).shape,
            batch.shape,
            batch.params[0].dtype,
            batch.params[0].grad.dtype,
            self.parts,
            self.equilibrate,
            self.renormalize,
            self.normuon,
            self.cautious,
            self.skip is None,
            "remainder" in of_state,
            "step" in of_state,
            tuple(first_of(p) for p in batch.params[:1]),
            len(batch.mine) if function is _direction else 0,
        )
        return self.optimizer.program(function, signature, self.compiled)


def _look_ahead(grads, buffers, momentum, skip, *, dtype):
    """Nesterov momentum of each gradient, in the dtype to iterate in."""
    return [
        muon.nesterov(grad, buffer, momentum, skip).to(dtype)
        for grad, buffer in zip(grads, buffers, strict=True)
    ]


def _direction(x, second, beta2, skip, *, parts, equilibrate, renormalize, dtype):
    """Updates of whole matrices [k, ..., m, n]."""
    shape = x.shape
    x = muon.normalized(x, parts, equilibrate).to(dtype).unflatten(-2, (parts, -1)).flatten(0, -3)
    return muon.direction(x, second, beta2, skip, renormalize).view(shape)


def _apply(weights, updates, remainders, keys, steps, rate, decay, *, cautious, firsts):
    """Applies updates to the weights, however those are kept."""
    for weight, update, remainder, key, step, first in zip(
        weights, updates, remainders, keys, steps, firsts, strict=True
    ):
        plain = weight.dtype is update.dtype is torch.float32 and isinstance(rate, float)
        if plain and not torch.compiler.is_compiling():
            muon.apply_update_in_place(weight, update, rate, decay, cautious)
            continue
        value = low_precision.load(weight, remainder)
        value = muon.apply_update(value, update, rate, decay, cautious)
        low_precision.store(weight, value, remainder, key, step, first)


def _update(
    weights,
    grads,
    buffers,
    second,
    remainders,
    keys,
    steps,
    momentum,
    rate,
    decay,
    beta2,
    skip,
    *,
    parts,
    equilibrate,
    renormalize,
    cautious,
    dtype,
    firsts,
):
    """The whole update where matrices and gradients lie on this process, as one program."""
    rows = []
    for grad, buffer in zip(grads, buffers, strict=True):
        ahead = muon.nesterov(grad, buffer, momentum, skip).to(dtype)
        rows.append(muon.normalized(ahead, parts, equilibrate).to(dtype))
    x = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
    shape = x.shape
    x = x.unflatten(-2, (parts, -1)).flatten(0, -3)
    updates = muon.direction(x, second, beta2, skip, renormalize).view(shape).unbind(0)
    if len(updates) < len(weights):  # gradients came as one stack
        updates = updates[0].unbind(0)
    _apply(weights, updates, remainders, keys, steps, rate, decay, cautious=cautious, firsts=firsts)

"""Whether the model is compiled, what of it, and the first call of each shape before the clock starts.

On a GPU a compiled step is worth half as much again, so it is the default there. One process and DDP compile
the model as a whole; under FSDP each layer by itself, because the gathering between them cannot be traced.
What belongs here: the decision and its reason, and the warm-up, after which weights, optimizer, random
numbers and the routers' counts are what they were before it.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tessera.modeling.balancing import LoadTally

COMPILES = ("auto", "on", "off")
FIRST_CAPABILITY = (7, 0)  # of the GPUs that Triton has kernels for: Volta
ENTRIES = 64  # compiled variants of one function: layers of several kinds, in the shapes of a schedule


@dataclass(frozen=True)
class CompileChoice:
    """Whether to compile, and why (not).

    Attributes:
        on: whether.
        by_layer: each decoder layer by itself instead of the model.
        why: the reason, for the one who asked.
        backend: of `torch.compile`.
    """

    on: bool
    by_layer: bool = False
    why: str = ""
    backend: str = "inductor"

    def __str__(self) -> str:
        if not self.on:
            return f"not compiled ({self.why})"
        return f"{'each layer' if self.by_layer else 'the model'} compiled ({self.why})"


def choose_compile(
    mode: str, device: torch.device, by_layer: bool = False, backend: str = "inductor"
) -> CompileChoice:
    """What `compile` of a run comes to on a device.

    Args:
        mode: one of `COMPILES`.
        device: that the model is trained on.
        by_layer: for a model that is split over processes.
        backend: of `torch.compile`.

    Raises:
        ValueError: for another mode, or if the model is to be compiled and cannot be.
    """
    if mode not in COMPILES:
        raise ValueError(f"compile must be 'auto', 'on' or 'off', got '{mode}'")
    if mode == "off":
        return CompileChoice(False, why="compile=off")
    missing = _what_is_missing(device) if backend == "inductor" else None
    if mode == "on":
        if missing:
            raise ValueError(f"compile=on: {missing}; take compile=auto or off")
        return CompileChoice(True, by_layer, "compile=on", backend)
    if device.type != "cuda":
        return CompileChoice(False, why=f"{device.type.upper()}: it pays on a GPU")
    return CompileChoice(not missing, by_layer, missing or "a GPU and Triton", backend)


def _what_is_missing(device: torch.device) -> str | None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
            return f"Triton has no kernels for {torch.cuda.get_device_name(device)}"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return "there is no C++ compiler on the PATH"
    return None


def compile_layers(model: nn.Module, choice: CompileChoice) -> None:
    """Compiles each decoder layer in place; to be called before the model is split."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ENTRIES)
    for layer in model.base_model.layers:
        layer.compile(dynamic=False, backend=choice.backend)


def compile_whole(model: nn.Module, choice: CompileChoice) -> nn.Module:
    """The model compiled, over the same parameters; the model itself stays as it is for evaluation."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ENTRIES)
    return torch.compile(model, dynamic=False, backend=choice.backend)


def waiting_for(shapes: list[tuple[int, int]]) -> str:
    """What to tell who waits: the shapes [rows, length] of micro-batches, each of which is compiled."""
    each = ", ".join(f"{rows} x {length}" for rows, length in shapes)
    many = f"{len(shapes)} shapes, one after another" if len(shapes) > 1 else "one shape"
    return f"compiling for {many}: {each} tokens; up to a minute each where it was not done before"


@contextmanager
def eager() -> Iterator[None]:
    """Within it nothing is compiled: an evaluation would compile again for each of its shapes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def dummy_batch(rows: int, length: int, vocabulary: int, device: torch.device, isolated: bool) -> dict:
    """A micro-batch of no meaning, of the shapes and types of a real one [rows, length]."""
    # Of a generator of its own, and of many different tokens: experts are to be used evenly.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    # A compiler looks at which arguments are one tensor: so are the two names of the targets, here and there.
    targets = ids.clone()
    batch = {"input_ids": ids, "labels": targets, "shift_labels": targets}
    if isolated:
        batch["position_ids"] = torch.arange(length, device=device).expand(rows, -1).contiguous()
    return batch


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After it, buffers, counts of the routers, random numbers and the optimizer's state are as before.

    Weights are not looked at: who steps within it sees to it that they stay (`optimizer.found_inf`).
    """
    # Not the state that is there before the first step, which a resumed run has.
    fresh = not optimizer.state
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    routers = routers_of(model)
    tallies = [
        (router.tally.clone(), None if router.last_tally is None else router.last_tally.clone())
        for router in routers
    ]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        optimizer.zero_grad()
        if fresh:
            optimizer.state.clear()
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        for router, (tally, last) in zip(routers, tallies, strict=True):
            router.tally = tally.to(router.tally.device)
            router.last_tally = last
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def routers_of(model: nn.Module) -> list[LoadTally]:
    """What counts the loads of experts."""
    return [module for module in model.modules() if isinstance(module, LoadTally)]


def try_or_go_on_without(run: Callable[[], None], said: Callable[[str], None]) -> bool:
    """Whether the first compiled calls work; a sentence if they do not.

    Memory that runs out is not the compiler's fault and is raised.
    """
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        error = getattr(error, "inner_exception", error)
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else "it does not say why"
        said(f"compiling failed, going on without: {type(error).__name__}: {reason}")
        return False
    return True

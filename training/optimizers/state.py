"""An optimizer's state as whole tensors under the names of the parameters, and back.

What belongs here: that exchange, for checkpoints. A tensor may be whole on each process (DDP's copies), on
its owner alone (Muon's momentum there) or in parts (FSDP2); what is written is the same, so a run goes on
with another layout and another number of processes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .matrix_batches import part_of


def gather_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    everywhere: bool = False,
    keep: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The whole state on the CPU, as `<parameter>:<key>` -> tensor. All processes call it.

    Args:
        model: unwrapped.
        optimizer: the one inside accelerate's wrapper.
        everywhere: whether all processes get it; otherwise the first does, and the others an empty dict.
        keep: makes of a name and a whole tensor, where it is, what is returned; default: a copy on the CPU.
    """
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank = dist.get_rank() if together else 0
    params = dict(model.named_parameters())
    mine = {
        f"{name}:{key}": (tuple(value.shape), value.dtype)
        for name, p in params.items()
        for key, value in optimizer.state.get(p, {}).items()
        if torch.is_tensor(value)
    }
    everyone = [mine]
    if together:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    result = {}
    for name, p in params.items():
        keys = list(dict.fromkeys(f for one in everyone for f in one if f.rsplit(":", 1)[0] == name))
        for full in keys:
            value = optimizer.state.get(p, {}).get(full.rsplit(":", 1)[1])
            bits = value is not None and value.dtype is torch.int16  # on every process, if on any
            # Neither gloo nor NCCL knows 16-bit integers; as bf16 their bits travel unchanged.
            value = _whole(p, value.view(torch.bfloat16) if bits else value, full, everyone)
            value = value.view(torch.int16) if bits else value
            if everywhere or rank == 0:
                result[full] = keep(full, value.detach()) if keep else _copy(value)
    return result


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _whole(p: nn.Parameter, value: torch.Tensor | None, full: str, everyone: list[dict]) -> torch.Tensor:
    """The whole of a tensor of `p`'s state; every process that takes part calls it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    holders = [rank for rank, one in enumerate(everyone) if full in one]
    if len(holders) == len(everyone) and value.ndim and isinstance(p, DTensor):
        shape = _whole_shape(p, value)
        if shape is not None:
            strides = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(
                value, p.device_mesh, p.placements, run_check=False, shape=shape, stride=strides
            ).full_tensor()
    if len(holders) < len(everyone):
        shape, dtype = everyone[holders[0]][full]
        if value is None:
            device = p.to_local().device if isinstance(p, DTensor) else p.device
            value = torch.empty(shape, dtype=dtype, device=device)
        value = value.contiguous()
        dist.broadcast(value, holders[0])
    return value


def _whole_shape(p: DTensor, value: torch.Tensor) -> torch.Size | None:
    """The shape of the whole of which `value` is a part as `p._local_tensor` is one of `p`; None if it is
    whole itself."""
    part = p.to_local().shape
    if value.shape == part:
        return p.shape
    # Second moments of stacked matrices: the stack is split, and the matrices are not.
    if p.ndim > 2 and value.ndim and value.shape[0] == part[0] and part[1:] == p.shape[1:]:
        return torch.Size((p.shape[0], *value.shape[1:]))
    return None


def restore_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor], path: Path
) -> None:
    """Gives an optimizer the state that `gather_state` returned. All processes call it with all of it.

    Raises:
        ValueError: if a parameter or its state is not there.
    """
    params = dict(model.named_parameters())
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    holds = getattr(optimizer, "holds", lambda p, key: True)
    optimizer.state.clear()
    for full, value in saved.items():
        name, key = full.rsplit(":", 1)
        p = params.get(name)
        if p is None or p not in grouped or not _fits(p, key, value):
            raise ValueError(f"{path} holds the optimizer of another model: it has no place for {full}")
        if not holds(p, key):
            continue
        device = p.to_local().device if isinstance(p, DTensor) else p.device
        if isinstance(p, DTensor) and _is_split_like(p, key, value):
            value = part_of(value.to(device), p)
        optimizer.state.setdefault(p, {})[key] = value.to(device, copy=True)


def _fits(p: nn.Parameter, key: str, value: torch.Tensor) -> bool:
    if key == "second_moment":  # a number for each row or column of each matrix
        return value.ndim >= 2 and value.shape[: p.ndim - 2] == p.shape[:-2]
    return value.ndim == 0 or key.endswith("_scale") or value.shape == p.shape


def _is_split_like(p: DTensor, key: str, value: torch.Tensor) -> bool:
    return value.shape == p.shape or (key == "second_moment" and p.ndim > 2)

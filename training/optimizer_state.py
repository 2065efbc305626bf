"""An optimizer's state as tensors under the names of the parameters, and back.

What belongs here: that exchange, for checkpoints. Where the state lies (whole, or a part on each process) is
nobody else's business.
"""

from pathlib import Path

import torch
from torch import nn


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The whole state on the CPU, as `<parameter>:<key>` -> tensor. All processes call it.

    Args:
        model: unwrapped.
        optimizer: the one inside accelerate's wrapper.
    """
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}:{key}": value.detach().contiguous().cpu()
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor], path: Path
) -> None:
    """Gives an optimizer the state that `gather_state` returned.

    Raises:
        ValueError: if a parameter or its state is not there.
    """
    params = dict(model.named_parameters())
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for full, value in saved.items():
        name, key = full.rsplit(":", 1)
        p = params.get(name)
        if p is None or p not in grouped or (value.ndim and value.shape != p.shape):
            raise ValueError(f"{path} holds the optimizer of another model: it has no place for {full}")
        optimizer.state.setdefault(p, {})[key] = value.to(p.device)

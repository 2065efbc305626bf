"""Each parameter updated as its gradient arrives in the backward pass, and the gradient given up.

What belongs here: the hooks, and what they cannot do. At any moment only the gradients of what is being
computed are there, so a model trains with little more memory than its weights and the optimizer's state.

The norm of all gradients is known only when the last has arrived, so they are clipped by that of the step
before; a gradient that is not finite leaves its own parameter as it is.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .matrix_batches import local
from .mixed import MuonAdamW


def require_whole_steps(accumulation: int) -> None:
    """Refuses steps of several backward passes, each of which would be one.

    Raises:
        ValueError: for more than one micro-batch.
    """
    if accumulation > 1:
        raise ValueError(
            f"optimizer_in_backward updates with the gradient of each backward pass, and accumulation "
            f"{accumulation} adds up several; give accumulation 1 or a smaller batch"
        )


class InBackward:
    """Attaches to an optimizer, whose `step` after the backward pass then only ends the step.

    A tied weight is updated once, when the gradients of all its uses are added up. Matrices of Muon are
    orthogonalised one by one: those of a batch would have to wait for one another with their gradients.

    Args:
        optimizer: as it trains, after a wrapper has put its parameters in place.
        clip: largest norm of all gradients; 0 for none.
        accumulation: micro-batches of a step.

    Attributes:
        norm: 0-dim tensor, the norm of the gradients of the step that `step` has ended; `inf` or NaN if one
            of them was not finite.

    Raises:
        ValueError: with accumulation, with Muon on split matrices, or with copies on several processes.
    """

    def __init__(self, optimizer: MuonAdamW, clip: float = 0.0, accumulation: int = 1):
        groups = {p: group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        require_whole_steps(accumulation)
        split = [p for p in groups if isinstance(p, DTensor)]
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if together and len(split) < len(groups):
            raise ValueError(
                "optimizer_in_backward sees gradients before DDP has averaged them over the processes; "
                "choose --parallel fsdp, or one process"
            )
        if any(groups[p]["kind"] == "muon" and p.ndim == 2 for p in split):
            raise ValueError(
                "optimizer_in_backward cannot put a split matrix together for Muon in the middle of the "
                "backward pass; choose --optimizer adamw, or one process"
            )
        self.optimizer, self.clip, self._groups = optimizer, clip, groups
        self.norm = torch.zeros((), device=local(next(iter(groups))).device)
        self._squares: dict[torch.device, torch.Tensor] = {}
        self._factor: torch.Tensor | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in groups]
        optimizer.in_backward = self

    def detach(self) -> None:
        """The optimizer's `step` updates all parameters again."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.in_backward = self.optimizer.found_inf = None

    @torch.no_grad()
    def _update(self, p: nn.Parameter) -> None:
        grad = local(p.grad)
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        self._squares[grad.device] = self._squares.get(grad.device, 0.0) + square
        if self._factor is not None:
            grad.mul_(self._factor)
        # Of this parameter: the others may be updated already.
        found_inf = (~square.isfinite()).float()
        self.optimizer.step_alone(p, self._groups[p], found_inf)
        p.grad = None

    def finish(self) -> torch.Tensor:
        """Ends a step: its norm is known and comes back, and the next one is clipped by it."""
        if not self._squares:
            return self.norm
        total = sum(square.to(next(iter(self._squares.values())).device) for square in self._squares.values())
        if any(isinstance(p, DTensor) for p in self._groups):
            dist.all_reduce(total)
        self._squares.clear()
        self.clip_by(total.sqrt())
        return self.norm

    def clip_by(self, norm: torch.Tensor | float) -> None:
        """Takes a norm for that of the step before."""
        self.norm = torch.as_tensor(norm, device=self.norm.device)
        if self.clip:
            factor = (self.clip / (self.norm + 1e-6)).clamp(max=1.0)
            self._factor = torch.where(self.norm.isfinite(), factor, 1.0)

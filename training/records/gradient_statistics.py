"""Gradients and updates of each group of parameters, at the steps that are recorded.

Of a group: the norm of its gradient as the optimizer sees it (after clipping), and by how much a step
changes its weights, relative to them. The second is measured on a part of one parameter, because a copy of
all weights is a lot to hold for a figure. What belongs here: figures that cost little, and nothing at other
steps.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

SAMPLED_WEIGHTS = 2**20  # of a group; 4 MiB in fp32


class GradientStatistics:
    """Watches the steps of an optimizer; `take` before a step asks for its figures.

    All processes take the figures of the same steps: where gradients are sharded, their norm is a collective.

    Args:
        optimizer: the one inside accelerate's wrapper; its groups have names.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.wanted = False
        self.found: dict[str, torch.Tensor] = {}
        self.sampled: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def take(self, wanted: bool) -> None:
        """Whether the next step is measured."""
        self.wanted = wanted

    def values(self) -> dict[str, float]:
        """`grad_norm/<group>` and `update_ratio/<group>` of the step that was measured last, once."""
        found, self.found = self.found, {}
        if not found:
            return {}
        # One transfer for all of them.
        numbers = torch.stack([value.float() for value in found.values()]).tolist()
        return dict(zip(found, numbers, strict=True))

    @torch.no_grad()
    def _before(self, *_) -> None:
        if not self.wanted:
            return
        self.found, self.sampled = {}, {}
        for i, group in enumerate(self.optimizer.param_groups):
            name = str(group.get("name", i))
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self.found[f"grad_norm/{name}"] = _norm([p.grad for p in params])
            weights = _local(max(params, key=lambda p: p.numel()))[:SAMPLED_WEIGHTS]
            if weights.numel():
                self.sampled[name] = (weights, weights.clone())

    @torch.no_grad()
    def _after(self, *_) -> None:
        if not self.wanted:
            return
        self.wanted = False
        for name, (now, before) in self.sampled.items():
            size = torch.linalg.vector_norm(before.float()).clamp_min(1e-12)
            self.found[f"update_ratio/{name}"] = torch.linalg.vector_norm(now.float() - before.float()) / size
        self.sampled = {}


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm over all of them; those of one mesh and placement at a time, which torch has one call for."""
    alike: dict[tuple, list[torch.Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else ()
        alike.setdefault(key, []).append(gradient)
    norms = [get_total_norm(some) for some in alike.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


def _local(p: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter, flat, as a view."""
    p = p.detach()
    return (p.to_local() if isinstance(p, DTensor) else p).reshape(-1)

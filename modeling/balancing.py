"""Load of the experts: counted while training, evened out after each optimizer step, reported.

Routers with a correction bias are balanced without an auxiliary loss (DeepSeek-V3, section 2.1.2): after each
step the bias of an expert that had more than its share of the tokens falls by `router_bias_update_speed`, and
that of one that had less rises. It works by itself in any loop over a torch optimizer, because one hook
listens to all of them:

- tokens are counted where they are trained on: when the gradient of their router logits arrives. So neither
evaluation nor generation counts, a checkpointed layer that runs twice counts once, and the micro-batches of
an accumulated step add up. In compiled code the count is part of the forward pass;
- after an optimizer has stepped, the routers whose weights it holds are updated. A router that is frozen, or
whose step a gradient scaler skipped, is not; `update_router_biases` is for those who want it all the same,
and for engines that step without a torch optimizer;
- where there are several processes, the counts of all are summed in one collective. So all of them must
take the step, as they do for their gradients.

The counts are no buffers: data parallelism overwrites buffers with those of the first process before each
forward pass. They are empty after each step, so a checkpoint needs only the bias. What belongs here: nothing
that changes an output of the model before the next step.
"""

import functools
import itertools
import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Hooks on optimizers hold for the whole process, so what they reach does too. Both forget dead routers.
_routers: "weakref.WeakSet[LoadTally]" = weakref.WeakSet()
_serial = itertools.count()


class LoadTally(nn.Module):
    """What a router counts, as a part of it: a base class with `weight`, `config`, `num_experts`, and
    `e_score_correction_bias`.

    Attributes:
        tally: [E + 2] in fp32: choices of each expert, sum of the entropies, tokens; since the last step.
        last_tally: that of the last step.
    """

    def start_tally(self) -> None:
        """Begins to count; for the end of `__init__`."""
        # Named, because models are also built on a device without memory.
        self.tally = torch.zeros(self.num_experts + 2, device="cpu")
        self.last_tally: torch.Tensor | None = None
        self._listen()

    def _listen(self) -> None:
        # Creation order is the same on all processes; that of a set is not.
        self.serial = next(_serial)
        _routers.add(self)
        _hook_optimizers()

    def __setstate__(self, state: dict) -> None:
        # Copies and unpickled routers come in here.
        super().__setstate__(state)
        self._listen()

    def _apply(self, fn, recurse: bool = True) -> "LoadTally":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            # A step of 0.001 is lost in a bf16 bias.
            device = self.e_score_correction_bias.device
            self.e_score_correction_bias = nn.Buffer(bias.to(device=device, dtype=torch.float32))
        self.move_tally(self.weight.device)
        return self

    def move_tally(self, device: torch.device) -> None:
        """Keeps counting on another device."""
        if self.tally.device != device and device.type != "meta":
            self.tally = self.tally.to(device)

    def count(
        self, logits: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> None:
        """Counts tokens that are trained on.

        Args:
            logits: of the router, [N, E].
            indices: of the chosen experts, [N, K].
            token_mask: [...] of N elements, zero where a token is padding and does not count.
        """
        if not (self.training and torch.is_grad_enabled() and logits.requires_grad):
            return
        if torch.compiler.is_compiling():
            self._add(logits, indices, token_mask)
        else:
            seen = logits.detach()
            logits.register_hook(lambda _: self._add(seen, indices, token_mask))

    @torch.no_grad()
    def _add(self, logits: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        self.move_tally(logits.device)
        keep = torch.ones_like(logits[:, 0]) if token_mask is None else token_mask.reshape(-1).to(logits)
        scores = self.scores(logits)
        probabilities = scores / scores.sum(-1, keepdim=True)
        entropies = torch.special.entr(probabilities).sum(-1)
        chosen = torch.zeros_like(logits[0]).index_add(
            0, indices.flatten(), keep.repeat_interleave(indices.shape[1])
        )
        self.tally.add_(torch.cat([chosen, (entropies * keep).sum()[None], keep.sum()[None]]))

    def close_tally(self) -> None:
        """Ends a step: what was counted becomes `last_tally`."""
        self.last_tally = self.tally.clone()
        self.tally.zero_()


@functools.cache
def _hook_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_) -> None:
    if not _routers:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # Where an adapter stands in for the weight, it is no parameter of the router.
    routers = [router for router in _routers if id(router._parameters.get("weight")) in held]
    # Where it is over 0 the optimizer has changed nothing (torch's name for it), and so do we.
    _update(routers, getattr(optimizer, "found_inf", None))


@torch.no_grad()
def _update(routers: Iterable[LoadTally], found_inf: torch.Tensor | None = None) -> None:
    routers = sorted(routers, key=lambda router: router.serial)
    live = [router for router in routers if _speed(router)]
    if live and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # On one device: a model may be spread over several.
        device = live[0].tally.device
        together = torch.cat([router.tally.to(device) for router in live])
        dist.all_reduce(together)
        for router, tally in zip(live, together.split([r.tally.numel() for r in live]), strict=True):
            router.tally.copy_(tally)
    for router in live:
        load = router.tally[: router.num_experts]
        step = _speed(router) * torch.sign(load.mean() - load)
        if found_inf is not None:
            step = step * (found_inf.to(step.device) <= 0)
        router.e_score_correction_bias.add_(step.to(router.e_score_correction_bias))
    for router in routers:
        router.close_tally()


def _speed(router: LoadTally) -> float:
    return 0.0 if router.e_score_correction_bias is None else router.config.router_bias_update_speed


def update_router_biases(model: nn.Module) -> None:
    """Moves the correction biases of a model by what was counted since the last update, and begins anew.

    Optimizers of torch do this themselves for the routers that they train. All processes call it.
    """
    _update(module for module in model.modules() if isinstance(module, LoadTally))


def router_statistics(model: nn.Module) -> list[dict]:
    """How evenly each router of a model spread the tokens of the last optimizer step.

    Before the first step, and for routers that no optimizer holds, of all tokens trained on so far. Counts
    are of all processes where biases are live, else of this one.

    Returns:
        For each router that counted anything, in the order of layers: `name` of the module; `load` [E], the
        share of choices that each expert had; `max_violation`, by how much the largest load exceeds an even
        one, as a share of it (0: balanced); `entropy` in nats of a token's probabilities, on average.
    """
    found = []
    for name, router in model.named_modules():
        if not isinstance(router, LoadTally):
            continue
        tally = router.tally if router.last_tally is None else router.last_tally
        counts, (entropy, tokens) = tally[:-2], tally[-2:].tolist()
        if tokens:
            load = counts / counts.sum()
            found.append(
                {
                    "name": name,
                    "load": load.cpu(),
                    "max_violation": load.max().item() * len(load) - 1,
                    "entropy": entropy / tokens,
                }
            )
    return found

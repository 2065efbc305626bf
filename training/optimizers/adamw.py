"""AdamW's update (Loshchilov and Hutter, 2019) of tensors of one device: torch's fused one, that of weights
and moments in bf16, and the one with 8-bit moments.

What belongs here: the rules and their state, on the part of a tensor that this process has. All are
elementwise, so how a tensor is split does not matter to them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from . import low_precision

QUANTIZED_FROM = 4096  # numbers in a tensor; smaller ones gain nothing and are often the sensitive ones
BLOCK = 256  # numbers that share a scale (Dettmers et al., 2022)


def start_state(weight: torch.Tensor, state: dict[str, Any], weights: str, moments: torch.dtype) -> None:
    """Fills an empty state."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
    state["exp_avg"] = torch.zeros_like(weight, dtype=moments)
    state["exp_avg_sq"] = torch.zeros_like(weight, dtype=moments)
    if weights == "split" and weight.dtype is torch.bfloat16:
        state["remainder"] = torch.zeros_like(weight, dtype=torch.int16)


def update_fused(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    group: dict[str, Any],
    found_inf: torch.Tensor | None,
) -> None:
    """torch's fused kernel, in place; nothing changes where `found_inf` is 1."""
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def update_narrow(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
    found_inf: torch.Tensor | None,
    key: int | None,
    first: int,
) -> None:
    """The same in fp32 on bf16 weights, with their parts widened and narrowed again around the kernel.

    Args:
        weight: bf16.
        grad: of its shape.
        state: with `remainder` for split weights; moments in bf16 are rounded by chance.
        group: lr, betas, eps, weight_decay.
        found_inf: nothing changes where it is 1.
        key: of the parameter, for chance; None to round to the nearest.
        first: place of the first number in the whole tensor.
    """
    wide = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")} | {"step": state["step"]}
    value = low_precision.load(weight, state.get("remainder"))
    update_fused([value], [grad.float()], [wide], group, found_inf)
    step = state["step"]
    low_precision.store(weight, value, state.get("remainder"), key, step, first)
    for salt, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        low_precision.store(state[name], wide[name], None, _salted(state[name], key, salt), step, first)


def narrow_program(
    weight: torch.Tensor,
    grad: torch.Tensor,
    average: torch.Tensor,
    average_sq: torch.Tensor,
    remainder: torch.Tensor | None,
    step: torch.Tensor,
    lr: torch.Tensor,
    beta1: torch.Tensor,
    beta2: torch.Tensor,
    eps: torch.Tensor,
    decay: torch.Tensor,
    found_inf: torch.Tensor | None,
    key: torch.Tensor | None,
    first: torch.Tensor,
) -> None:
    """`update_narrow` in one pass over flat tensors, to be compiled; the settings are 0-dim tensors.

    `step` counts this update already.
    """
    wide, grad = low_precision.load(weight, remainder), grad.float()
    old, old_sq = average.float(), average_sq.float()
    new = old + (grad - old) * (1 - beta1)
    new_sq = old_sq + (grad * grad - old_sq) * (1 - beta2)
    denominator = (new_sq / (1 - beta2**step)).sqrt() + eps
    value = wide * (1 - lr * decay) - lr / (1 - beta1**step) * new / denominator
    if found_inf is not None:
        bad = found_inf > 0
        new, new_sq = torch.where(bad, old, new), torch.where(bad, old_sq, new_sq)
        value = torch.where(bad, wide, value)
    low_precision.store(weight, value, remainder, key, step, first)
    low_precision.store(average, new, None, _salted(average, key, 1), step, first)
    low_precision.store(average_sq, new_sq, None, _salted(average_sq, key, 2), step, first)


def _salted(moment: torch.Tensor, key: torch.Tensor | int | None, salt: int) -> torch.Tensor | int | None:
    """Moments in bf16 have chances of their own."""
    return key ^ salt if moment.dtype is torch.bfloat16 and key is not None else None


def find_eight_bit() -> Callable:
    """bitsandbytes' blockwise update (MIT; kernels for CUDA and the CPU, nothing to compile).

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            "optimizer 'adamw-8bit' needs bitsandbytes, which is not installed; "
            "`pip install bitsandbytes`, or choose 'adamw'"
        ) from error
    return functional


def start_eight_bit(weight: torch.Tensor, state: dict[str, Any], weights: str) -> None:
    """Fills an empty state: codes and the scales of their blocks."""
    state["step"] = torch.zeros((), dtype=torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(weight, dtype=torch.uint8)
        blocks = -(-weight.numel() // BLOCK)
        state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=weight.device)
    if weights == "split" and weight.dtype is torch.bfloat16:
        state["remainder"] = torch.zeros_like(weight, dtype=torch.int16)


def update_eight_bit(
    library: Any,
    maps: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
    key: int | None,
    first: int,
) -> None:
    """One tensor's update; `maps` are the library's values of signed and unsigned codes."""
    state["step"] += 1
    narrow = weight.dtype is torch.bfloat16 and (key is not None or "remainder" in state)
    value = low_precision.load(weight, state.get("remainder")) if narrow else weight
    beta1, beta2 = group["betas"]
    library.optimizer_update_8bit_blockwise(
        "adam",  # its weight decay is decoupled
        grad.to(value.dtype).contiguous(),
        value,
        state["exp_avg"],
        state["exp_avg_sq"],
        beta1,
        beta2,
        0.0,
        0.0,
        group["eps"],
        int(state["step"]),
        group["lr"],
        *maps,
        state["exp_avg_scale"],
        state["exp_avg_sq_scale"],
        group["weight_decay"],
    )
    if narrow:
        low_precision.store(weight, value, state.get("remainder"), key, state["step"], first)

"""The experts of a mixture as grouped products over tokens that are sorted by expert.

What belongs here: the way to the experts' order and back, and what happens between. The library's own grouped
path weighs the outputs, and lets gradients find their way back by adding them up one element at a time. Here
the weights meet the narrow states between the two products, and either way of the permutation is the other's
gradient: reads alone. Shapes: N tokens, K chosen experts, S = N * K, E experts, C hidden, I intermediate.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def takes_grouped_products(experts: nn.Module, x: torch.Tensor) -> bool:
    """Whether experts of these weights, asked for "grouped_mm", can be computed here.

    On a GPU in bf16, with whole experts of its own: what other ranks hold is the library's to handle.
    """
    if not x.is_cuda or experts.config._experts_implementation != "grouped_mm" or not len(x):
        return False
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else experts.down_proj.dtype
    plain = all(type(p) in (nn.Parameter, torch.Tensor) for p in experts.parameters(recurse=False))
    whole = experts.down_proj.shape[0] == experts.num_experts == experts.config.n_routed_experts
    aligned = all(size % 8 == 0 for size in experts.down_proj.shape[1:]) and experts.num_experts < 2**15
    return dtype == torch.bfloat16 and plain and whole and aligned


def grouped_experts(
    experts: nn.Module, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Tokens [N, C], indices and weights [N, K] -> [N, C], for either kind of experts."""
    enter, leave = experts.enter_proj, experts.down_proj
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        enter, leave = enter.to(dtype), leave.to(dtype)
    flat, count = indices.flatten(), leave.shape[0]
    # The sort's time goes with the bytes of its keys.
    keys, order = flat.to(
        torch.uint8 if count <= 256 else torch.int16 if count <= 2**15 else flat.dtype
    ).sort()
    ids = torch.arange(count, device=x.device)
    ends = torch.searchsorted(keys.to(flat.dtype), ids, right=True).int()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    chosen = indices.shape[1]

    spread = _Spread.apply(x.to(leave.dtype), order, inverse, chosen)
    hidden = experts.activate(F.grouped_mm(spread, enter.transpose(1, 2), offs=ends))
    hidden = hidden * weights.flatten()[order].unsqueeze(1)
    out = F.grouped_mm(hidden.to(leave.dtype), leave.transpose(1, 2), offs=ends)
    return _Gather.apply(out, order, inverse, chosen).to(x.dtype)


class _Spread(torch.autograd.Function):
    """Tokens [N, C] -> a row for each choice [S, C], in the order of the experts."""

    @staticmethod
    def forward(ctx, x, order, inverse, chosen):
        ctx.save_for_backward(inverse)
        ctx.chosen = chosen
        return x[order // chosen]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.chosen)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """Rows of choices [S, C] in the order of the experts -> their sum for each token [N, C]."""

    @staticmethod
    def forward(ctx, rows, order, inverse, chosen):
        ctx.save_for_backward(order)
        ctx.chosen = chosen
        return rows[inverse].unflatten(0, (-1, chosen)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad[order // ctx.chosen], None, None, None

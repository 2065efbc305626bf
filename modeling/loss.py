"""Head and cross entropy in one, a chunk of tokens at a time, so that the logits never exist as a whole.

For a vocabulary of 32k the logits of a batch are larger than all else that a step keeps, and in fp32, with
their gradient, several times so. Here each chunk's logits become its loss and its gradients at once, and are
gone before the next chunk. The gradients are those of the sum; backward only scales them. What belongs here:
losses over hidden states and the head's weight; the kernel for a GPU is in `loss_kernel.py`. Shapes: N
tokens, C hidden, V vocabulary.
"""

import torch
from torch.autograd.function import once_differentiable

from .loss_kernel import HAS_TRITON, logits_to_gradient

# Logits that exist at once: 4096 tokens of a 32k vocabulary, which keep an H200's matrix units busy. The
# products of a wide model are as fast with half as many.
LOGITS_AT_A_TIME = 2**27
WIDE = 1536
FEWEST_TOKENS = 1024  # below, reading the head and adding to its gradient take longer than the products
# A bf16 head of so many elements has its gradient summed over chunks in bf16, as gradients of micro-batches
# are: in fp32 the sum would take more memory than all else here, and at 128k tokens a tenth more time.
LARGE_HEAD = 2**26


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Summed cross entropy of `softcap(hidden @ weight.T)` against the targets, in nats and fp32.

    The logits are in the dtype of the products (bf16 under autocast), the softmax in fp32, and the weight's
    gradient is summed over chunks in fp32, but for the largest heads (`LARGE_HEAD`). It can be differentiated
    once.

    Args:
        hidden: [..., C].
        weight: [V, C]; of a padded head the rows of the vocabulary.
        targets: [...], ids below V, or `ignore_index` where nothing is to be predicted.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        ignore_index: the target that does not count.
        z_loss: weight of the squared logarithm of the softmax's normalizer, which is added for each target
            that counts and keeps logits from drifting (PaLM, section 5; Chowdhery et al., 2022).

    Raises:
        ValueError: if targets and hidden states are not of the same positions.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets have the shape {tuple(targets.shape)}, hidden states of shape {tuple(hidden.shape)} "
            f"need {tuple(hidden.shape[:-1])}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten().to(hidden.device), softcap, ignore_index, z_loss
    )


def z_term(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Summed squares of the logarithms of the normalizers of logits [..., V] at targets [...] that count."""
    squares = logits.float().logsumexp(-1).square()
    return torch.where(targets.to(squares.device) != ignore_index, squares, 0.0).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, ignore_index, z_loss):
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        loss, hidden_grad, weight_grad = _opaque(
            hidden, weight, targets, softcap, ignore_index, z_loss, of_hidden, of_weight
        )
        ctx.save_for_backward(hidden_grad if of_hidden else None, weight_grad if of_weight else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place, unless somebody may come again: a second gradient of the head is a lot of memory.
        scaled = torch.mul if _may_be_called_again() else torch.Tensor.mul_
        return (
            None if hidden_grad is None else scaled(hidden_grad, scale.to(hidden_grad.dtype)),
            None if weight_grad is None else scaled(weight_grad, scale.to(weight_grad.dtype)),
            None,
            None,
            None,
            None,
        )


def _may_be_called_again() -> bool:
    """Whether the graph of this backward pass is kept; a compiler looks after memory itself."""
    if torch.compiler.is_compiling():
        return True
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return is_kept is None or is_kept()


# A compiler that sees the chunks puts all their products first and keeps every logit: 5 GiB at 64k tokens of
# a 32k vocabulary. It cannot look into an operator.
# Named for the module: code that came with a checkpoint may be of another version.
@torch.library.custom_op(f"tessera::{__name__.replace('.', '_')}_linear_cross_entropy", mutates_args=())
def _opaque(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss and the gradients of hidden states [N, C] and weight [V, C]; empty if not asked for."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    narrow = hidden.is_cuda and hidden.dtype != wide
    cast = weight.to(hidden.dtype)
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    sum_dtype = weight.dtype if weight.dtype == cast.dtype and weight.numel() >= LARGE_HEAD else wide
    weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if of_weight else weight.new_empty(0)
    to_gradient = logits_to_gradient if narrow and HAS_TRITON else _to_gradient
    at_a_time = LOGITS_AT_A_TIME if hidden.shape[1] < WIDE else LOGITS_AT_A_TIME // 2
    tokens = max(FEWEST_TOKENS, at_a_time // weight.shape[0])
    logits = hidden.new_empty(min(tokens, len(hidden)), weight.shape[0])
    for start in range(0, len(hidden), tokens):
        chunk = slice(start, start + tokens)
        h = hidden[chunk]
        grad = torch.mm(h, cast.t(), out=logits[: len(h)])
        to_gradient(grad, targets[chunk], losses[chunk], softcap, z_loss, ignore_index)
        if of_hidden:
            torch.mm(grad, cast, out=hidden_grad[chunk])
        if of_weight and sum_dtype == grad.dtype:
            weight_grad.addmm_(grad.t(), h)
        elif of_weight and narrow:
            torch.addmm(weight_grad, grad.t(), h, out_dtype=wide, out=weight_grad)
        elif of_weight:
            weight_grad += grad.t() @ h
    return losses.sum(), hidden_grad, weight_grad.to(weight.dtype)


@_opaque.register_fake
def _(hidden, weight, targets, softcap, ignore_index, z_loss, of_hidden, of_weight):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
    )


def _to_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
) -> None:
    """What `logits_to_gradient` does, with torch's operators: the losses [N] of logits [N, V], which become
    their gradient in place."""
    counted = (targets != ignore_index).unsqueeze(1)
    targets = torch.where(counted, targets.unsqueeze(1), 0)
    scores = logits.to(losses.dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    normalizer = scores.logsumexp(1, keepdim=True)
    terms = normalizer - scores.gather(1, targets) + z_loss * normalizer.square()
    losses.copy_(torch.where(counted, terms, 0.0).squeeze(1))
    slope = 1.0 if softcap is None else 1 - (scores / softcap) ** 2
    gradient = scores.sub_(normalizer).exp_().mul_(1 + 2 * z_loss * normalizer)
    gradient.scatter_add_(1, targets, torch.full_like(normalizer, -1.0))
    logits.copy_(torch.where(counted, gradient.mul_(slope), 0.0))

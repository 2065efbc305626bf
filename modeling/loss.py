"""Head and cross entropy in one, a chunk of tokens at a time, so that the logits never exist as a whole.

For a vocabulary of 32k the logits of a batch are larger than all else that a step keeps, and in fp32, with
their gradient, several times so. Here each chunk's logits become its loss and its gradients at once, and are
gone before the next chunk. The gradients are those of the sum; backward only scales them. What belongs here:
losses over hidden states and the head's weight. Shapes: N tokens, C hidden, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

# Logits that exist at once: 4096 tokens of a 32k vocabulary, which keep an H200's matrix units busy.
LOGITS_AT_A_TIME = 2**27
FEWEST_TOKENS = 512  # below, products with a large vocabulary are bound by reading the head


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Summed cross entropy of `softcap(hidden @ weight.T)` against the targets, in nats and fp32.

    The logits are in the dtype of the products (bf16 under autocast), the softmax in fp32, and the weight's
    gradient is summed over chunks in fp32. It can be differentiated once.

    Args:
        hidden: [..., C].
        weight: [V, C]; of a padded head the rows of the vocabulary.
        targets: [...], ids below V, or `ignore_index` where nothing is to be predicted.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        ignore_index: the target that does not count.

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
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten().to(hidden.device), softcap, ignore_index
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, ignore_index):
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        compiled = torch.compiler.is_compiling() and hidden.is_cuda
        loss, hidden_grad, weight_grad = _opaque(
            hidden, weight, targets, softcap, ignore_index, of_hidden, of_weight, compiled
        )
        ctx.save_for_backward(hidden_grad if of_hidden else None, weight_grad if of_weight else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale.to(weight_grad.dtype),
            None,
            None,
            None,
        )


# A compiler that sees the chunks puts all their products first and keeps every logit: 5 GiB at 64k tokens of
# a 32k vocabulary. It cannot look into an operator; what is between the products is compiled on its own.
# Named for the module: code that came with a checkpoint may be of another version.
@torch.library.custom_op(f"tessera::{__name__.replace('.', '_')}_linear_cross_entropy", mutates_args=())
def _opaque(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    of_hidden: bool,
    of_weight: bool,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss and the gradients of hidden states [N, C] and weight [V, C]; empty if not asked for."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    weight_grad = torch.zeros_like(weight, dtype=wide) if of_weight else weight.new_empty(0)
    to_gradient = _compiled() if compiled else _to_gradient
    tokens = max(FEWEST_TOKENS, LOGITS_AT_A_TIME // weight.shape[0])
    logits = hidden.new_empty(min(tokens, len(hidden)), weight.shape[0])
    for start in range(0, len(hidden), tokens):
        chunk = slice(start, start + tokens)
        h = hidden[chunk]
        grad = torch.mm(h, weight.t(), out=logits[: len(h)])
        chunk_loss, at, at_target = to_gradient(grad, targets[chunk], softcap, ignore_index)
        loss += chunk_loss
        grad.scatter_(1, at, at_target)
        if of_hidden:
            torch.mm(grad, weight, out=hidden_grad[chunk])
        if of_weight and hidden.is_cuda and hidden.dtype != wide:
            torch.addmm(weight_grad, grad.t(), h, out_dtype=wide, out=weight_grad)
        elif of_weight:
            weight_grad += grad.t() @ h
    return loss, hidden_grad, weight_grad.to(weight.dtype)


@_opaque.register_fake
def _(hidden, weight, targets, softcap, ignore_index, of_hidden, of_weight, compiled):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
    )


def _to_gradient(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross entropy of logits [N, V], which become their gradient in place.

    All but that at the targets: it is returned, with its places [N, 1]. To write it here as well would make
    the compiler do the rest beside the logits and copy it.
    """
    counted = (targets != ignore_index).unsqueeze(1)
    targets = torch.where(counted, targets.unsqueeze(1), 0)
    scores = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    slope = 1.0
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    normalizer = scores.logsumexp(1, keepdim=True)
    chosen = scores.gather(1, targets)
    loss = torch.where(counted, normalizer - chosen, 0.0).sum()
    at_target = torch.where(counted, (chosen - normalizer).exp() - 1, 0.0)
    if softcap is not None:
        at_target = at_target * (1 - (chosen / softcap) ** 2)
    # Where nothing is to be predicted all probabilities are zero.
    normalizer = torch.where(counted, normalizer, torch.inf)
    logits.copy_((scores - normalizer).exp() * slope)
    return loss, targets, at_target.to(logits.dtype)


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable:
    compiled = torch.compile(_to_gradient)
    # Whether this key is on differs between the first step and the others, and the compiler looks at it.
    ignored = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

    def call(*args):
        with torch._C._ExcludeDispatchKeyGuard(ignored):
            return compiled(*args)

    return call

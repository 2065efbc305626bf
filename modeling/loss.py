"""Head and cross entropy in one, a chunk of tokens at a time, so that the logits never exist as a whole.

For a vocabulary of 32k the logits of a batch are larger than all else that a step keeps, and in fp32, with
their gradient, several times so. Here each chunk's logits become its loss and its gradients at once, and are
gone before the next chunk. The gradients are those of the sum; backward only scales them. What belongs here:
losses over hidden states and the head's weight. Shapes: N tokens, C hidden, V vocabulary.
"""

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
        vocabulary = weight.shape[0]
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ids = torch.arange(vocabulary, device=hidden.device)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grads = []
        weight_grad = torch.zeros_like(weight, dtype=wide) if of_weight else None
        chunk = max(FEWEST_TOKENS, LOGITS_AT_A_TIME // vocabulary)
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            counted = (target != ignore_index).unsqueeze(1)
            target = torch.where(target != ignore_index, target, 0).unsqueeze(1)
            logits = (h @ weight.t()).to(wide)
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits = softcap * bent
            # Not log_softmax: compiled, that is slower by 1 % of a step at 135M parameters.
            normalizer = logits.logsumexp(1, keepdim=True)
            loss = loss + torch.where(counted, normalizer - logits.gather(1, target), 0.0).sum()
            if not (of_hidden or of_weight):
                continue
            grad = (logits - normalizer).exp() - (ids == target).to(wide)
            if softcap is not None:
                grad = grad * (1 - bent * bent)
            grad = torch.where(counted, grad, 0.0).to(hidden.dtype)
            if of_hidden:
                hidden_grads.append(grad @ weight)
            if of_weight:
                weight_grad += grad.t() @ h
        hidden_grad = torch.cat(hidden_grads) if of_hidden else None
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
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

"""Logits to their loss and gradient in one Triton kernel, in place.

What belongs here: the kernel that `loss.py` takes on a GPU where Triton is installed, and what launches it.
A compiled version of the same arithmetic reads the logits once more and keeps fp32 copies in eager mode.
Shapes: N tokens, V vocabulary.
"""

import contextlib

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True


def logits_to_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    z_loss: float,
    ignore_index: int,
    block: int | None = None,
    warps: int | None = None,
) -> None:
    """Cross entropy of each row of logits, which become the gradient of the sum of these losses.

    Args:
        logits: [N, V] with contiguous rows, bf16, fp16 or fp32; overwritten.
        targets: [N], ids below V or `ignore_index`; another makes the loss NaN.
        losses: [N] in fp32; written: nats, and the weighted square of the normalizer.
        softcap: the loss is of `softcap * tanh(logits / softcap)`.
        z_loss: weight of the squared logarithm of the normalizer.
        ignore_index: the target of rows that count nothing and get a gradient of zero.
        block, warps: logits that a program holds at once, and what shares them; the default is what was
            fastest on an H200.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return
    capped = softcap is not None
    # Triton launches where torch is, and a model may be spread over several GPUs.
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        _kernel[(rows,)](
            logits,
            targets,
            losses,
            logits.stride(0),
            vocabulary,
            float(softcap) if capped else 1.0,
            float(z_loss),
            ignore_index,
            capped=capped,
            block=block or (4096 if capped else 8192),
            num_warps=warps or (8 if capped else 16),
        )


if HAS_TRITON:

    @triton.jit
    def _cap_scores(x, softcap):
        # tanh by one exponential, which the hardware has.
        bent = 1.0 - 2.0 / (tl.exp(x * (2.0 / softcap)) + 1.0)
        return softcap * bent, 1.0 - bent * bent

    @triton.jit
    def _kernel(
        logits,
        targets,
        losses,
        stride,
        vocabulary,
        softcap,
        z_loss,
        ignore_index,
        capped: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * stride
        target = tl.load(targets + row)
        columns = tl.arange(0, block)
        if target == ignore_index:
            zeros = tl.zeros([block], dtype=logits.dtype.element_ty)
            for first in range(0, vocabulary, block):
                tl.store(start + first + columns, zeros, mask=first + columns < vocabulary)
            tl.store(losses + row, 0.0)
        else:
            largest = -float("inf")
            total = 0.0
            for first in range(0, vocabulary, block):
                inside = first + columns < vocabulary
                x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
                if capped:
                    x, _ = _cap_scores(x, softcap)
                    x = tl.where(inside, x, -float("inf"))
                higher = tl.maximum(largest, tl.max(x, 0))
                total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
                largest = higher
            normalizer = largest + tl.log(total)
            # An id that the vocabulary does not have makes the loss NaN.
            known = (target >= 0) & (target < vocabulary)
            chosen = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32)
            if capped:
                chosen, _ = _cap_scores(chosen, softcap)
            tl.store(losses + row, normalizer - chosen + z_loss * normalizer * normalizer)
            # All threads have read the target's entry before any of them writes.
            tl.debug_barrier()
            weight = 1.0 + 2.0 * z_loss * normalizer
            for first in range(0, vocabulary, block):
                inside = first + columns < vocabulary
                x = tl.load(start + first + columns, mask=inside, other=0.0).to(tl.float32)
                slope = 1.0
                if capped:
                    x, slope = _cap_scores(x, softcap)
                gradient = tl.exp(x - normalizer) * weight - tl.where(first + columns == target, 1.0, 0.0)
                tl.store(start + first + columns, gradient * slope, mask=inside)

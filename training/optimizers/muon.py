"""Muon's update of a stack of matrices: momentum, orthogonalisation, what evens it out, decay.

What belongs here: the mathematics on tensors of one device. Which parameters, and on which process, is the
optimizer's business (`mixed.py`).

An update is taken in four parts, because processes share it between them: `nesterov` and `apply_update` are
elementwise, so they work on any part of a matrix, while `normalized` and `direction` need the whole of it.
Shapes: N matrices of a stack, m rows, n columns.

torch has a Muon too (`torch.optim.Muon`); it takes one matrix at a time and iterates in bf16, which a CPU
emulates. This one stacks matrices of one shape and iterates in fp32 where bf16 is not native.
"""

import torch

# Coefficients of five Newton-Schulz steps that push all singular values towards 1: Polar Express (Amsel et
# al., 2025, algorithm 1), with the margin that nanochat uses.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.01  # rounding must not push a singular value past the interval that the coefficients are made for

FEATURES = ("equilibrate", "renormalize", "normuon", "cautious")


def work_dtype(device: torch.device) -> torch.dtype:
    """What matrices are orthogonalised in: bf16 where it is native, else fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def flops(rows: int, columns: int) -> int:
    """Floating-point operations of orthogonalising one matrix."""
    small, large = sorted((rows, columns))
    return len(POLAR_EXPRESS) * (4 * small**2 * large + 2 * small**3)


def second_moment_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of one matrix: a number for each row, or for each column of a wide one."""
    return (rows, 1) if rows >= columns else (1, columns)


def nesterov(
    grad: torch.Tensor, buffer: torch.Tensor, momentum: torch.Tensor | float, skip: torch.Tensor | None
) -> torch.Tensor:
    """Moves the momentum buffer in place and looks ahead, in fp32.

    Args:
        grad: any shape.
        buffer: of that shape.
        momentum: weight of the past.
        skip: 0-dim bool; where true the buffer stays and what comes back means nothing, but is finite.
    """
    if not torch.compiler.is_compiling() and skip is None and grad.dtype is buffer.dtype is torch.float32:
        buffer.lerp_(grad, 1 - momentum)  # the same with fewer passes
        return torch.lerp(grad, buffer, momentum)
    grad, old = grad.float(), buffer.float()
    weight = 1 - momentum
    if skip is not None:
        grad = torch.where(skip, 0.0, grad)
        weight = torch.where(skip, 0.0, weight)
    new = old + (grad - old) * weight
    buffer.copy_(new)
    return grad + (new - grad) * momentum


def normalized(x: torch.Tensor, parts: int, equilibrate: bool) -> torch.Tensor:
    """Scales matrices [..., m, n], each of `parts` that share its rows by itself, to a Frobenius norm just
    under one, in fp32.

    With `equilibrate` all rows come to one norm (MuonEq, 2026, arXiv 2603.28254); the Frobenius norm is known
    then without another look.
    """
    x = x.float()
    rows = x.shape[-2] // parts
    if equilibrate:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (1 / (MARGIN * rows**0.5) / norms.clamp_min(1e-12))
    whole = x.unflatten(-2, (parts, rows))
    norms = torch.linalg.vector_norm(whole, dim=(-2, -1), keepdim=True)
    return (whole / (norms * MARGIN + 1e-12)).flatten(-3, -2)


def polar_factor(x: torch.Tensor) -> torch.Tensor:
    """Five steps towards U V^T of matrices [N, m, n] whose norm is under one, in their own dtype.

    Each step is X <- (a + b G + c G^2) X with the smaller Gram matrix G of X; `a` goes onto the diagonal of
    the polynomial, which spares a pass over X.
    """
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        if torch.compiler.is_compiling():
            square = torch.bmm(gram, gram)
            size = torch.arange(gram.shape[-1], device=x.device)
            unit = torch.where(size[:, None] == size, a, 0.0)
            polynomial = (unit + b * gram.float() + c * square.float()).to(x.dtype)
        else:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x


def direction(
    x: torch.Tensor,
    second: torch.Tensor | None,
    beta2: torch.Tensor | float,
    skip: torch.Tensor | None,
    renormalize: bool,
) -> torch.Tensor:
    """Orthogonalises normalised matrices and evens the result out.

    Args:
        x: [N, m, n] in the dtype to iterate in.
        second: running mean of squares of each row (or column), [N, m, 1] or [N, 1, n], moved in place; None
            without NorMuon (Li et al., 2025, arXiv 2510.05491).
        beta2: its weight of the past.
        skip: 0-dim bool; where true `second` stays.
        renormalize: bring the Frobenius norm to that of an orthogonal factor, sqrt(min(m, n)) (Muon+, 2026,
            arXiv 2602.21545).

    Returns:
        [N, m, n] in the dtype of `x`.
    """
    rows, columns = x.shape[-2:]
    x = polar_factor(x)
    if second is None and not renormalize:
        return x
    along = -1 if rows >= columns else -2
    squares = torch.linalg.vector_norm(x.float(), dim=along, keepdim=True).square()  # [N, m, 1] or [N, 1, n]
    total = squares.sum((-2, -1), keepdim=True)
    scale = min(rows, columns) ** 0.5 / total.sqrt().clamp_min(1e-12) if renormalize else 1.0
    if second is not None:
        squares = squares * scale**2
        new = second + (squares / x.shape[along] - second) * (1 - beta2)
        if skip is not None:
            new = torch.where(skip, second, new)
        second.copy_(new)
        even = new.clamp_min(1e-10).rsqrt()
        kept = (squares * even.square()).sum((-2, -1), keepdim=True)
        scale = scale * even * (squares.sum((-2, -1), keepdim=True) / kept.clamp_min(1e-20)).sqrt()
    if torch.compiler.is_compiling():
        return (x.float() * scale).to(x.dtype)
    return x.mul_(scale)


def apply_update(
    weight: torch.Tensor,
    update: torch.Tensor,
    rate: torch.Tensor | float,
    decay: torch.Tensor | float,
    cautious: bool,
) -> torch.Tensor:
    """fp32 weights after a step: `update` and the decay, `decay` times the weight, both times `rate`.

    With `cautious` only weights that the update shrinks decay (Liang et al., 2024, arXiv 2411.16085, as
    nanochat uses it).
    """
    update = update.float()
    shrink = decay * weight
    if cautious:
        shrink = torch.where(update * weight >= 0, shrink, 0.0)
    return weight - rate * (update + shrink)


def apply_update_in_place(
    weight: torch.Tensor, update: torch.Tensor, rate: float, decay: float, cautious: bool
) -> None:
    """`apply_update` of fp32 weights in eager mode, where each operator is a pass over memory."""
    if decay and cautious:
        agree = (update * weight).ge_(0)
        weight.addcmul_(weight, agree, value=-rate * decay)
    elif decay:
        weight.mul_(1 - rate * decay)
    weight.add_(update, alpha=-rate)


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of each matrix's polar decomposition, approximately: U V^T of its SVD.

    Args:
        matrices: [..., m, n]; iterated in bf16 on CUDA and in fp32 elsewhere.

    Returns:
        [..., m, n] in the dtype of the iteration, singular values within 0.15 of one (of those that were not
        vanishing).
    """
    x = normalized(matrices, 1, equilibrate=False).to(work_dtype(matrices.device))
    return polar_factor(x.flatten(0, -3) if x.ndim > 3 else x.view(-1, *x.shape[-2:])).view(matrices.shape)

"""FP8 weights in blocks of 128x128, as DeepSeek's releases have them: the arithmetic, and what it costs.

A matrix is stored as float8_e4m3fn and one fp32 factor a block; the grid of factors has a row and a column
for a part of a block at the lower and the right edge, so any size will do. A weight is its FP8 number times
the factor of its block. What belongs here: numbers to FP8 and back, and the error that is made. Which tensors
of a checkpoint are in FP8, and what their factors are called, is in `fp8_checkpoints.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
BLOCK = 128
# The largest number of e4m3fn, which has no infinity: anything above becomes NaN when it is cast.
LARGEST = torch.finfo(FP8).max
# Rows that are in fp32 at a time.
_BAND = 16 * BLOCK


def block_grid(shape: Iterable[int]) -> tuple[int, ...]:
    """Blocks along each dimension, those at the edge counted whole."""
    return tuple(math.ceil(size / BLOCK) for size in shape)


def quantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to FP8.

    The factor of a block is its largest absolute value over 448, so that this becomes 448; a block of zeros
    has the factor 1. Numbers are divided by it in fp32 and rounded to nearest even.

    With the factors that a dequantized matrix had, its FP8 numbers come back bit for bit, from fp32 and from
    bf16: bf16 is off by 2^-9 at most, and half the distance of two FP8 numbers is 2^-5 of them or more.
    Without, numbers come back that had been quantized here, and their factors to within the rounding.

    Args:
        weight: [R, C], of any floating type.
        scale: [ceil(R / 128), ceil(C / 128)], factors to take instead.

    Returns:
        The numbers, float8_e4m3fn [R, C], and the factors, fp32 [ceil(R / 128), ceil(C / 128)].

    Raises:
        ValueError: if a number is not finite, or the factors are of another shape.
    """
    _require_matrix(weight)
    rows, columns = weight.shape
    grid = block_grid(weight.shape)
    if scale is not None and scale.shape != grid:
        raise ValueError(f"{tuple(weight.shape)} has factors of shape {grid}, not {tuple(scale.shape)}")
    numbers = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    factors = torch.empty(grid, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, _BAND):
        band = weight[start : start + _BAND].float()
        if not torch.isfinite(band).all():
            raise ValueError("holds a number that is not finite, which FP8 cannot scale")
        blocks = slice(start // BLOCK, math.ceil((start + len(band)) / BLOCK))
        factors[blocks] = _largest_of_blocks(band) if scale is None else scale[blocks].float()
        divisor = factors[blocks]
        # A factor of zero is of a block of zeros.
        divisor = _spread(torch.where(divisor == 0, 1.0, divisor), len(band), columns)
        numbers[start : start + len(band)] = (band / divisor).clamp(-LARGEST, LARGEST).to(FP8)
    return numbers, factors


def dequantize_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    first: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """The matrix that FP8 numbers and their factors stand for: the product in fp32, then rounded once.

    Args:
        weight: float8_e4m3fn [R, C].
        scale: [ceil(R / 128), ceil(C / 128)] where `first` is zero; else the factors of the blocks that the
            part touches.
        dtype: of the result.
        first: row and column at which a part of a matrix begins, in the whole matrix.

    Returns:
        [R, C] of `dtype`.

    Raises:
        ValueError: if the factors are of another shape.
    """
    _require_matrix(weight)
    rows, columns = weight.shape
    offsets = tuple(start % BLOCK for start in first)
    grid = block_grid(
        size + offset if size else 0 for size, offset in zip(weight.shape, offsets, strict=True)
    )
    if scale.shape != grid:
        raise ValueError(f"{tuple(weight.shape)} has factors of shape {grid}, not {tuple(scale.shape)}")
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, rows, _BAND):
        band = weight[start : start + _BAND].float()
        factors = _spread(scale.float(), len(band), columns, (offsets[0] + start, offsets[1]))
        result[start : start + len(band)] = band * factors
    return result


@dataclass(frozen=True)
class QuantizationError:
    """What FP8 made of one tensor, or of several together.

    Attributes:
        name: of the tensor.
        numbers: how many.
        largest: of the absolute differences.
        signal, noise: sums of squares of the weights and of the differences.
    """

    name: str
    numbers: int
    largest: float
    signal: float
    noise: float

    @property
    def relative_rms(self) -> float:
        """Root mean square of the differences, as a share of that of the weights."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in decibels; infinite where nothing is lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: largest difference {self.largest:.3g}, relative RMS {self.relative_rms:.3%}, "
            f"SQNR {self.sqnr:.1f} dB"
        )


def measure_error(name: str, weight: torch.Tensor, restored: torch.Tensor) -> QuantizationError:
    """Compares a tensor with what came back from FP8. Sums are in fp64.

    Args:
        name: of the tensor.
        weight, restored: of one shape, of any floating types.
    """
    largest = signal = noise = 0.0
    for one, other in zip(weight.split(_BAND), restored.split(_BAND), strict=True):
        one = one.double()
        difference = other.double() - one
        largest = max(largest, float(difference.abs().max()) if difference.numel() else 0.0)
        signal += float(one.square().sum())
        noise += float(difference.square().sum())
    return QuantizationError(name, weight.numel(), largest, signal, noise)


def summarize_errors(errors: Iterable[QuantizationError]) -> QuantizationError:
    """The error of many tensors as if they were one."""
    errors = list(errors)
    return QuantizationError(
        f"{len(errors)} tensors in FP8",
        sum(error.numbers for error in errors),
        max((error.largest for error in errors), default=0.0),
        sum(error.signal for error in errors),
        sum(error.noise for error in errors),
    )


def _require_matrix(weight: torch.Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"blocks are of matrices, not of shape {tuple(weight.shape)}")


def _largest_of_blocks(band: torch.Tensor) -> torch.Tensor:
    """[R, C] -> factors [ceil(R / 128), ceil(C / 128)]."""
    rows, columns = block_grid(band.shape)
    padding = (0, columns * BLOCK - band.shape[1], 0, rows * BLOCK - band.shape[0])
    blocks = torch.nn.functional.pad(band.abs(), padding).view(rows, BLOCK, columns, BLOCK)
    largest = blocks.amax(dim=(1, 3))
    # Not below the smallest normal number: what is left of a subnormal factor says too little.
    factors = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(largest == 0, 1.0, factors)


def _spread(factors: torch.Tensor, rows: int, columns: int, first: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The factor of each number of a part that begins at `first`: [rows, columns]."""
    row = torch.arange(first[0], first[0] + rows, device=factors.device) // BLOCK
    column = torch.arange(first[1], first[1] + columns, device=factors.device) // BLOCK
    return factors[row][:, column]

"""Weights kept in bf16 that learn as fp32 ones do: rounded by chance, or with the missing bits beside them.

What belongs here: how an fp32 number lies in memory, and nothing of update rules.

- "bf16": an updated weight is rounded up or down with chances that make it right on average. The bits of
  chance are a function of (seed, parameter, step, place of the number), so a run that is resumed, or split
  over other processes, draws the same ones.
- "split": the weight is the nearest bf16 number, and the 16 bits that it lacks are an int16 of the
  optimizer's state. Both together are the exact fp32 weight, at two bytes more.

All of it is integer arithmetic that comes out the same on CPU and GPU, eager or compiled.
"""

import zlib

import torch
from torch import nn

WEIGHTS = ("fp32", "bf16", "split")

_HIGH = -65536  # 0xFFFF0000: sign, exponent and seven bits of an fp32 number are a bf16 number


def narrow_parameters(model: nn.Module) -> None:
    """Makes the parameters of a model bf16 in place; buffers (a router's correction) stay as they are."""
    for p in model.parameters():
        if p.dtype is torch.float32:
            p.data = p.data.to(torch.bfloat16)


def key_of(seed: int, name: str) -> int:
    """A signed 32-bit number for a parameter of a run."""
    return zlib.crc32(f"{seed}/{name}".encode()) - 2**31


def random_bits(
    count: int, key: torch.Tensor | int, step: torch.Tensor | int, first: int, device: torch.device
) -> torch.Tensor:
    """Uniform 16-bit numbers [count] as int32, by a counter and the finaliser of MurmurHash3 (Appleby, 2011).

    Args:
        count: how many.
        key: of the parameter, int32.
        step: of the optimizer.
        first: place of the first number in the whole tensor.
        device: where.
    """
    place = torch.arange(count, dtype=torch.int32, device=device) + first
    step = torch.as_tensor(step, device=device).to(torch.int32)
    return _mixed(_mixed(place) ^ _mixed(_mixed(step) ^ key)) & 0xFFFF


def _mixed(x: torch.Tensor) -> torch.Tensor:
    # The constants are those of the finaliser as signed numbers, the masks make the shifts logical.
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def round_by_chance(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 -> bf16 of the same shape, right on average; what bf16 can say stays as it is.

    Args:
        value: fp32.
        bits: int32 of as many numbers, uniform in [0, 65536).
    """
    whole = value.view(torch.int32) + bits.view(value.shape)
    rounded = (whole & _HIGH).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def split(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> the nearest bf16 number and the int16 that it lacks."""
    whole = value.view(torch.int32)
    high = (whole + 0x8000) & _HIGH
    return high.view(torch.float32).to(torch.bfloat16), (whole - high).to(torch.int16)


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 number that `split` took apart."""
    return (weight.float().view(torch.int32) + remainder.to(torch.int32)).view(torch.float32)


def store(
    weight: torch.Tensor,
    value: torch.Tensor,
    remainder: torch.Tensor | None,
    key: torch.Tensor | None,
    step: torch.Tensor | None,
    first: int,
) -> None:
    """Writes fp32 values into a weight: whole, split, or rounded by chance where there is a key."""
    if remainder is not None:
        high, low = split(value)
        weight.copy_(high)
        remainder.copy_(low)
    elif key is not None:
        bits = random_bits(value.numel(), key, step, first, value.device)
        weight.copy_(round_by_chance(value, bits))
    else:
        weight.copy_(value)


def load(weight: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """The fp32 values of a weight."""
    return weight.float() if remainder is None else join(weight, remainder)

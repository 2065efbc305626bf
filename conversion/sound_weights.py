"""Weights that can be a model's: finite numbers, in one dtype.

What belongs here: what is looked at while tensors pass by on their way from source to target.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from .outlines import outline
from .rules import Changed

# The bits of infinity, as an integer of the same width: what is not finite has these or more.
_INFINITIES = {
    torch.float64: (torch.int64, np.uint64, 0x7FF0 << 48),
    torch.float32: (torch.int32, np.uint32, 0x7F80 << 16),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
}
# Numbers that are looked at together, so that they are in the processor's cache for the second look.
_PART = 2**19


def sound(
    tensors: Mapping[str, torch.Tensor], otherwise: str = "holds NaN or infinite numbers"
) -> Mapping[str, torch.Tensor]:
    """The same tensors, refused where one is not finite when it is read.

    Args:
        tensors: of a checkpoint.
        otherwise: what the sentence says of such a tensor.
    """

    def check(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta and not is_finite(tensor):
            raise ValueError(f"{name} {otherwise}; nothing is kept")
        return tensor

    return Changed(tensors, check)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are, found without a tensor of booleans and without torch's threads.

    Those wait for their next work by turning in circles, on a core that the writing of files needs.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype not in _INFINITIES:
        tensor = tensor.float()
    signed, unsigned, infinity = _INFINITIES[tensor.dtype]
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(signed).numpy()
    sign = 1 << (8 * bits.itemsize - 1)
    for begin in range(0, len(bits), _PART):
        part = bits[begin : begin + _PART]
        # Numbers below zero have the sign's bit, and so are the largest without sign and the smallest with.
        if part.max() >= infinity or int(part.view(unsigned).max()) >= sign + infinity:
            return False
    return True


def require_one_dtype(tensors: Mapping[str, torch.Tensor], rounding: torch.dtype | None = None) -> None:
    """Refuses weights that are no floating-point numbers, and ones in half precision beside wider ones.

    Some releases keep norms or routers in fp32 beside bf16: that is no damage. A few tensors in a narrower or
    another half precision than the rest mostly are, and a rounding that is asked for makes them one.

    Args:
        tensors: of a checkpoint.
        rounding: the dtype that all will have, if one was asked for.

    Raises:
        ValueError: naming a tensor.
    """
    dtypes, sizes = {}, Counter()
    for name in tensors:
        meta = outline(tensors, name)
        dtypes[name] = meta.dtype
        sizes[meta.dtype] += meta.numel()
        if not meta.dtype.is_floating_point:
            raise ValueError(f"{name} holds {_word(meta.dtype)}, which are no weights")
    if rounding is not None or not sizes:
        return
    most = sizes.most_common(1)[0][0]
    for name, dtype in dtypes.items():
        if dtype != most and dtype.itemsize <= most.itemsize:
            raise ValueError(
                f"{name} is {_word(dtype)} where most weights are {_word(most)}; if that is meant, say with "
                "--dtype of `tessera convert` what all shall be"
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

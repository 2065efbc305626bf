"""Weights that can be a model's: finite numbers, in one dtype.

What belongs here: what is looked at while tensors pass by on their way from source to target.
"""

from collections import Counter
from collections.abc import Mapping

import torch

from .outlines import outline
from .rules import Changed

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """Whether all numbers are, found in one pass without a tensor of booleans."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype not in _FLOATS:
        tensor = tensor.float()
    smallest, largest = torch.aminmax(tensor)  # a NaN is both
    return bool(torch.isfinite(smallest) and torch.isfinite(largest))


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

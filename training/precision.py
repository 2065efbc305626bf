"""In what numbers a run computes, and in what it keeps its weights.

Three ways to compute (bf16, fp16, fp32) and three to keep the weights (fp32, bf16, or bf16 with the bits that
it lacks beside them, `split`); what of them a device can do, and the sentence for what it cannot. Routers and
losses are fp32 in the model itself, whatever is chosen here. What belongs here: that choice and the autocast
that follows from it. How an optimizer moves bf16 weights is the optimizer's.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
WEIGHTS = ("fp32", "bf16", "split")
BF16_CAPABILITY = (8, 0)  # Ampere; before it a GPU computes bf16 by detours, slower than fp32


@dataclass(frozen=True)
class Precision:
    """What a run computes in.

    Attributes:
        compute: "bf16", "fp16" or "fp32": of the products.
        weights: "fp32", "bf16" or "split".
        why: why it is this one, in a few words.
    """

    compute: str
    weights: str
    why: str

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return torch.float32 if self.weights == "fp32" else torch.bfloat16

    @property
    def mixed_precision(self) -> str:
        """In Accelerate's words; it scales gradients for "fp16"."""
        if self.compute == "fp32" or self.weights != "fp32":
            return "no"
        return self.compute

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context of a forward pass: nothing where weights and products are of one kind."""
        if self.mixed_precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.compute == "bf16" else torch.float16
        return torch.autocast(device.type, dtype)

    def __str__(self) -> str:
        if self.weights == "fp32":
            kept = "" if self.compute == "fp32" else " with fp32 weights"
        else:
            kept = " weights and products" if self.weights == "bf16" else " products, weights in two halves"
        return f"{self.compute}{kept} ({self.why})"


def choose_precision(precision: str, weights: str, device: torch.device) -> Precision:
    """What `precision` and `weights` of a run come to on a device.

    Args:
        precision: one of `PRECISIONS`; "auto" is bf16 on a GPU that has it, fp16 on one that has not, fp32
            elsewhere (bf16 for weights in bf16).
        weights: one of `WEIGHTS`.
        device: that the model is trained on.

    Raises:
        ValueError: if the device cannot do it, or the two do not go together.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {_either(PRECISIONS)}, got '{precision}'")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {_either(WEIGHTS)}, got '{weights}'")
    native = _has_bf16(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    why = "as asked for"
    if precision == "auto":
        if weights != "fp32":
            precision, why = "bf16", f"for weights={weights}"
        elif device.type != "cuda":
            precision, why = "fp32", f"{name}: mixed precision pays on a GPU"
        elif native:
            precision, why = "bf16", f"{name} has it"
        else:
            precision, why = "fp16", f"{name} has no bf16; gradients are scaled"
    if weights != "fp32" and precision != "bf16":
        raise ValueError(
            f"weights={weights} are kept in bf16 and need precision=bf16, got precision={precision}"
        )
    if precision == "bf16" and not native:
        raise ValueError(
            f"precision=bf16: {name} has no bf16 products; take precision=fp16 with weights=fp32, or auto"
        )
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"precision=fp16 scales gradients for a CUDA GPU, and this is a {name}; take fp32, bf16 or auto"
        )
    return Precision(precision, weights, why)


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done by the device itself; a CPU does them, slowly where it is old."""
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def _either(words: tuple[str, ...]) -> str:
    return ", ".join(f"'{word}'" for word in words[:-1]) + f" or '{words[-1]}'"

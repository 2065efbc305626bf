"""Which attention kernel a run takes: one word with one meaning, checked before anything is trained.

The model has the kernels (transformers' attention interface, `modeling/masks.py`); a tier names one. What
belongs here: what each tier needs of the device, the packages and the model, the choice where none is named,
and the sentence for a tier that cannot be had or would be slow.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera.modeling.configuration_tessera import TesseraConfig

# The name of each tier in transformers' attention interface.
IMPLEMENTATIONS = {
    "flash4": "flash_attention_4",
    "flash3": "flash_attention_3",
    "flash2": "flash_attention_2",
    "cudnn": "sdpa",
    "flex": "flex_attention",
    "varlen": "varlen",
    "sdpa": "sdpa",
    "eager": "eager",
}
TIERS = ("auto", *IMPLEMENTATIONS)
# Package, and the least and the first too large compute capability that its kernels are for.
FLASH = {
    "flash4": ("flash_attn.cute", "flash-attn-4", (9, 0), (11, 0)),
    "flash3": ("flash_attn_interface", "flash-attn-3", (9, 0), (10, 0)),
    "flash2": ("flash_attn", "flash-attn", (8, 0), (13, 0)),
}


@dataclass(frozen=True)
class AttentionTier:
    """The kernel of a run.

    Attributes:
        name: the tier.
        why: why it is this one.
        warning: what is slow about it, or None.
    """

    name: str
    why: str
    warning: str | None = None

    @property
    def implementation(self) -> str:
        """Its name for `set_attn_implementation`."""
        return IMPLEMENTATIONS[self.name]

    def context(self) -> AbstractContextManager:
        """What a forward and backward pass run in: cuDNN is a choice that torch makes per call."""
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if self.name == "cudnn" else nullcontext()

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@dataclass(frozen=True)
class Needs:
    """What a run asks of attention.

    Attributes:
        windows: layers that see less than a row.
        documents: documents of a row are kept apart.
        dropout: of attention probabilities.
        softcap: of attention logits.
        latent: keys are wider than values.
        half: bf16 or fp16, which flash and cuDNN kernels are for.
    """

    windows: bool
    documents: bool
    dropout: bool
    softcap: bool
    latent: bool
    half: bool

    @property
    def masked(self) -> bool:
        """Whether some layer needs more than causal order."""
        return self.windows or self.documents


def needs_of(config: TesseraConfig, length: int, documents: bool, half: bool) -> Needs:
    """What a model asks of attention when it is trained on rows of `length` positions."""
    slides = "sliding_attention" in config.layer_types
    return Needs(
        windows=slides and config.sliding_window < length,
        documents=documents,
        dropout=config.attention_dropout > 0,
        softcap=config.attn_logit_softcapping is not None,
        latent=config.attention_type == "latent",
        half=half,
    )


def choose_attention(tier: str, needs: Needs, device: torch.device) -> AttentionTier:
    """What `attention` of a run comes to.

    Args:
        tier: one of `TIERS`.
        needs: see `needs_of`.
        device: that the model is trained on.

    Raises:
        ValueError: if the tier is not there, or cannot do what the model needs.
    """
    if tier not in TIERS:
        raise ValueError(f"attention must be one of {', '.join(TIERS)}, got '{tier}'")
    if tier != "auto":
        problem = _problem(tier, needs, device)
        if problem:
            raise ValueError(f"attention={tier}: {problem}; take attention=auto, or another tier")
        return AttentionTier(tier, "as asked for", _slow(tier, needs, device))
    if device.type != "cuda":
        return AttentionTier("sdpa", f"{device.type.upper()}: torch's own kernel")
    for name in ("flash4", "flash3"):
        if _problem(name, needs, device) is None:
            return AttentionTier(name, "installed, and made for this GPU")
    if needs.softcap:
        problem = _problem("flex", needs, device)
        if problem is None:
            return AttentionTier("flex", "it caps attention logits; sdpa does not")
        return AttentionTier(
            "eager", f"logits are capped, and flex: {problem}", _slow("eager", needs, device)
        )
    if not needs.masked:
        return AttentionTier("sdpa", "plain causal order: torch's fastest kernel, no mask")
    what = "windows" if needs.windows else "documents"
    if needs.dropout:
        return AttentionTier(
            "sdpa",
            "attention dropout",
            f"{what} beside attention dropout take a written-out T x T mask: slow",
        )
    return AttentionTier(
        "sdpa", f"{what} by flex attention, the rest by torch's fastest kernel", _slow("sdpa", needs, device)
    )


def _problem(tier: str, needs: Needs, device: torch.device) -> str | None:
    """Why a tier cannot be had, or None."""
    if tier in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        # Flex runs on a CPU forward only.
        return f"it is for CUDA GPUs, and this is a {device.type.upper()}"
    if tier in FLASH:
        return _flash_problem(tier, needs, device)
    if tier == "cudnn":
        if not torch.backends.cudnn.is_available():
            return "torch was built without cuDNN"
        if not needs.half:
            return "cuDNN's kernel is for bf16 and fp16"
        if needs.masked or needs.softcap:
            return "it knows causal order alone, no windows, documents or capped logits"
        return None
    if tier == "flex":
        if needs.dropout:
            return "flex attention has no attention dropout"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        return None
    if not _is_registered(IMPLEMENTATIONS[tier]):
        return "this version has no such kernel"
    return None


def _flash_problem(tier: str, needs: Needs, device: torch.device) -> str | None:
    module, package, least, beyond = FLASH[tier]
    if not _is_installed(module):
        return f"{module} is not installed (pip install {package})"
    capability = torch.cuda.get_device_capability(device)
    if not least <= capability < beyond:
        return f"its kernels are not for {torch.cuda.get_device_name(device)}"
    if not needs.half:
        return "it is for bf16 and fp16"
    if needs.documents:
        return "it keeps packed documents apart in one row only"
    if tier != "flash2" and needs.dropout:
        return "it has no attention dropout"
    if tier == "flash4" and needs.latent:
        return "it wants keys and values of one width"
    return None


def _slow(tier: str, needs: Needs, device: torch.device) -> str | None:
    """What is slow about a tier that works."""
    if device.type != "cuda":
        return None
    if tier == "eager":
        return "eager attention writes all T x T scores out: slow, and large for long rows"
    if tier == "sdpa" and needs.softcap:
        return "sdpa caps no logits; the model writes all T x T scores out instead: slow"
    if tier == "sdpa" and needs.masked and importlib.util.find_spec("triton") is None:
        return (
            "without Triton there is no flex attention; windows and documents are slow (pip install triton)"
        )
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _is_registered(name: str) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return name in ALL_ATTENTION_FUNCTIONS.valid_keys()


def apply_attention(model, tier: AttentionTier, say: Callable[[str], None]) -> None:
    """Gives the model its kernel, and says what is slow about it."""
    if model.config._attn_implementation != tier.implementation:
        model.set_attn_implementation(tier.implementation)
    if tier.warning:
        say(f"warning: {tier.warning}")

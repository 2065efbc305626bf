"""Whether a conversion is the same model: logits of source and result on the same ids, and every weight.

What belongs here: the comparison, and how each kind of checkpoint becomes a model that runs. A family of
transformers runs in its own class, so that the translation is not compared with itself. Both models are held
in memory in fp32, one after the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .checkpoints import Checkpoint
from .rules import hold_predictions_ahead, model_shapes, name_some

# Largest difference of two logits, as a share of the largest logit (or absolute, where all are below one).
TOLERANCE = 1e-4
# Positions; one more is past the window, if the model has one.
_LENGTHS = (1, 9, 64)
_LONGEST = 640


@dataclass(frozen=True)
class Difference:
    """How far apart two models are.

    Attributes:
        largest: absolute difference of two logits.
        scale: absolute value of the largest logit.
    """

    largest: float
    scale: float

    @property
    def allowed(self) -> float:
        """What `largest` may be at most."""
        return TOLERANCE * max(1.0, self.scale)

    @property
    def is_small(self) -> bool:
        """Whether the two are one model; never where a number is not finite."""
        return self.largest <= self.allowed < float("inf")


def compare_logits(
    source: Callable[[], nn.Module],
    result: Callable[[], nn.Module],
    config: TesseraConfig,
    device: str = "cpu",
) -> Difference:
    """Runs two models on the same random ids of several lengths.

    Args:
        source, result: make the models, in fp32; each is dropped before the next is made.
        config: of the model, for the vocabulary and how far it sees.
        device: to run on.
    """
    batches = _random_ids(config)
    expected = _logits(source(), batches, device)
    found = _logits(result(), batches, device)
    # Not Python's max, which loses a NaN that does not come first.
    largest = torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max()
    return Difference(float(largest), float(torch.stack([a.abs().max() for a in expected]).max()))


def require_same_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Compares tensors bit for bit.

    Raises:
        ValueError: naming those that differ.
    """
    wrong = [name for name in expected if name not in found or not _same_bits(expected[name], found[name])]
    if wrong or len(expected) != len(found):
        raise ValueError(f"{len(wrong)} tensors read back are not what was written ({name_some(wrong)})")


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint in fp32 and eval mode.

    Raises:
        ValueError: if transformers' own class does not load it, or does not find every tensor.
    """
    if checkpoint.family is None:
        return assemble(checkpoint.config, checkpoint.tensors)
    kind = getattr(transformers, checkpoint.family.architecture)
    try:
        model, info = kind.from_pretrained(checkpoint.folder, dtype=torch.float32, output_loading_info=True)
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{kind.__name__} does not load {checkpoint.folder}: {error!r}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
        raise ValueError(f"{kind.__name__} does not find {name_some(missing)} in {checkpoint.folder}")
    return model.eval()


def assemble(config: TesseraConfig, tensors: Mapping[str, torch.Tensor]) -> TesseraForCausalLM:
    """A Tessera model in fp32 and eval mode from its tensors."""
    config = hold_predictions_ahead(config)
    config.dtype = torch.float32
    model = TesseraForCausalLM(config)
    state = model.state_dict()
    with torch.no_grad():
        for name in model_shapes(config):
            state[name].copy_(tensors[name])
    return model.eval()


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds parameters to a dtype, as a conversion to it does, and keeps the model in fp32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@torch.no_grad()
def _logits(model: nn.Module, batches: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    model = model.to(device)
    return [model(ids.to(device), use_cache=False).logits.float().cpu() for ids in batches]


def _random_ids(config: TesseraConfig) -> list[torch.Tensor]:
    lengths = [*_LENGTHS, (config.sliding_window or 0) + 8]
    longest = min(_LONGEST, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(config.vocab_size, (2, length), generator=generator)
        for length in sorted({min(length, longest) for length in lengths})
    ]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: equal numbers may differ in sign, and a NaN equals nothing.
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))

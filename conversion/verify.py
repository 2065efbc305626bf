"""Whether two checkpoints are the same model: logits of both on the same ids, and every weight.

What belongs here: the comparisons of numbers, and how each kind of checkpoint becomes a model that runs. A
family of transformers runs in its own class, so that the translation is not compared with itself. Models are
in memory one after the other. What a result has to pass in all is in `acceptance.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .checkpoints import Checkpoint
from .fp8_checkpoints import BlockScaled
from .rules import hold_predictions_ahead, model_shapes, name_some
from .safetensors_format import same_bytes

# Largest difference of two logits, as a share of the largest logit (or absolute, where all are below one).
TOLERANCE = 1e-4
# Positions; one more is past the window, if the model has one.
_LENGTHS = (1, 9, 64)
_LONGEST = 640
# Positions whose logits are compared, spread over each row: those of a large vocabulary take much memory.
_KEPT = 128
# In a dtype with rounding. Two implementations round in different places, so their noise is alike and not the
# same: with random weights of every family in bf16 and fp16, and of every dialect to native in bf16, the
# result's was 0.94 to 1.01 times the source's.
NOISE_RATIO = 2.0
# As a share of the logits' root mean square, for a source that happens to round nothing.
NOISE_FLOOR = 1e-3


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


@dataclass(frozen=True)
class Noise:
    """How far two models in a dtype with rounding are from the source in fp32, as root mean squares.

    Attributes:
        source, result: of all differences of logits.
        scale: of the logits in fp32.
    """

    source: float
    result: float
    scale: float

    @property
    def allowed(self) -> float:
        """What `result` may be at most."""
        return NOISE_RATIO * self.source + NOISE_FLOOR * self.scale

    @property
    def is_alike(self) -> bool:
        """Whether the result is as near as the source is; never where a number is not finite."""
        return self.result <= self.allowed < float("inf")


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
    batches = random_ids(config)
    return difference(run_model(source(), batches, device), run_model(result(), batches, device))


def difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> Difference:
    """The largest difference of the logits of two models on the same batches."""
    # Not Python's max, which loses a NaN that does not come first.
    largest = torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max()
    return Difference(float(largest), float(torch.stack([a.abs().max() for a in expected]).max()))


def noise(exact: list[torch.Tensor], source: list[torch.Tensor], result: list[torch.Tensor]) -> Noise:
    """How far logits of source and result are from those of the source in fp32."""

    def rms(batches: list[torch.Tensor]) -> float:
        squares = sum(float(batch.double().square().sum()) for batch in batches)
        return (squares / sum(batch.numel() for batch in batches)) ** 0.5

    return Noise(
        rms([a - b for a, b in zip(source, exact, strict=True)]),
        rms([a - b for a, b in zip(result, exact, strict=True)]),
        rms(exact),
    )


def require_same_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Compares tensors bit for bit.

    Raises:
        ValueError: naming those that differ.
    """
    wrong = [name for name in expected if name not in found or not same_bytes(expected[name], found[name])]
    if wrong or len(expected) != len(found):
        raise ValueError(f"{len(wrong)} tensors read back are not what was written ({name_some(wrong)})")


def build_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a checkpoint in eval mode.

    Raises:
        ValueError: if transformers' own class does not load it, or does not find every tensor.
    """
    if checkpoint.family is None:
        return assemble(checkpoint.config, checkpoint.tensors, dtype)
    kind = getattr(transformers, checkpoint.family.architecture)
    with check_loading(kind, checkpoint) as loading:
        if checkpoint.fp8 is not None:
            loading.model, loading.info = _load_dequantized(kind, checkpoint.folder, checkpoint.fp8, dtype)
        else:
            loading.model, loading.info = kind.from_pretrained(
                checkpoint.folder, dtype=dtype, output_loading_info=True
            )
    return loading.model.eval()


def _load_dequantized(
    kind: type[PreTrainedModel], folder: Path, fp8: BlockScaled, dtype: torch.dtype
) -> tuple[nn.Module, dict]:
    """A model in transformers' own class, from FP8 that was decoded here.

    On a CPU transformers' own decoding takes the height of a block for the rows over the rows of factors,
    which is wrong where 128 does not divide them.

    Args:
        kind: transformers' class.
        folder: of the checkpoint.
        fp8: its tensors.
        dtype: of the model.

    Returns:
        The model, and transformers' account of what it loaded.
    """
    config = kind.config_class.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return kind.from_pretrained(
        None, config=config, state_dict=dict(fp8.stored), dtype=dtype, output_loading_info=True
    )


@contextmanager
def check_loading(kind: type, checkpoint: Checkpoint) -> Iterator[SimpleNamespace]:
    """Around `from_pretrained`: gives a place for its model and info, and refuses what is not complete."""
    loading = SimpleNamespace(model=None, info={})
    try:
        yield loading
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(repr(error).split())
        raise ValueError(f"{kind.__name__} does not load {checkpoint.folder}: {reason}") from error
    info = loading.info
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
        raise ValueError(f"{kind.__name__} does not find {name_some(missing)} in {checkpoint.folder}")


def assemble(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> TesseraForCausalLM:
    """A Tessera model in eval mode from its tensors."""
    # Every weight is one of the checkpoint's, so none is drawn.
    with no_init_weights():
        model = TesseraForCausalLM._from_config(hold_predictions_ahead(config), dtype=dtype)
    model.tie_weights()
    state = model.state_dict()
    with torch.no_grad():
        for name in model_shapes(config):
            state[name].copy_(tensors[name])
    return model.eval()


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds parameters to a dtype, as a conversion to it does, and keeps the model in fp32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@torch.no_grad()
def run_model(model: nn.Module, batches: list[torch.Tensor], device: str = "cpu") -> list[torch.Tensor]:
    """Logits [B, T, V] of a model for each batch of ids [B, T], in fp32 and at no more than `_KEPT` of T."""
    model = model.to(device)
    kept = []
    for ids in batches:
        logits = model(ids.to(device), use_cache=False).logits
        places = torch.linspace(0, ids.shape[1] - 1, min(_KEPT, ids.shape[1])).long()
        kept.append(logits[:, places.to(device)].float().cpu())
    return kept


def random_ids(config: TesseraConfig) -> list[torch.Tensor]:
    """Two rows of random ids for each of several lengths, as far as the model reaches."""
    lengths = [*_LENGTHS, (config.sliding_window or 0) + 8]
    longest = min(_LONGEST, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(config.vocab_size, (2, length), generator=generator)
        for length in sorted({min(length, longest) for length in lengths})
    ]

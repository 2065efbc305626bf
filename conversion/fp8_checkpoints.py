"""Checkpoints whose matrices are in FP8: which tensors these are, and what their factors are called.

Two layouts have them: the native one (`wq.weight` and `wq.scale`) and DeepSeek's directories for transformers
(`q_proj.weight` and `q_proj.weight_scale_inv`, with a `quantization_config`). What belongs here: views of a
checkpoint's tensors, from FP8 and to it, one tensor at a time, and those settings. The arithmetic is in
`fp8.py`, a conversion to FP8 and its account in `quantization.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .fp8 import (
    BLOCK,
    FP8,
    QuantizationError,
    block_grid,
    dequantize_blocks,
    measure_error,
    quantize_blocks,
)
from .outlines import outline
from .rules import Renamed, Translated

Tensors = Mapping[str, torch.Tensor]
# From tensors under a layout's names to the same with matrices in FP8, and their factors.
Encoder = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Fp8Layout:
    """How a layout has matrices in FP8.

    Attributes:
        weights: names of those that are written so: the linear layers of attention and feed-forward; not
            embedding, head, norms and routers.
        weight_end, scale_end: last part of a matrix's name, and what its factors have in that place.
        fp32: ends of names that keep their type when the rest goes to another.
    """

    weights: re.Pattern
    weight_end: str
    scale_end: str
    fp32: str

    def scale_name(self, weight: str) -> str:
        """What the factors of a matrix are called."""
        return weight.removesuffix(self.weight_end) + self.scale_end

    def weight_name(self, scale: str) -> str | None:
        """The matrix that factors are of, going by their name; None if it is no such name."""
        if not scale.endswith(self.scale_end):
            return None
        return scale.removesuffix(self.scale_end) + self.weight_end


NATIVE_FP8 = Fp8Layout(
    re.compile(
        r"layers\.\d+\.(attn\.(wq|wk|wv|wo|wq_a|wq_b|wkv_a|wkv_b)"
        r"|ffn\.((experts\.\d+|shared_experts)\.)?w[123])\.weight"
    ),
    ".weight",
    ".scale",
    ".ffn.gate.bias",
)
HUGGING_FACE_FP8 = Fp8Layout(
    re.compile(
        r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?"
        r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
    ),
    ".weight",
    ".weight_scale_inv",
    ".e_score_correction_bias",
)
# As in the config.json of DeepSeek's releases.
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def split_off_quantization(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A `config.json` without its `quantization_config`, and that, if there is one.

    Raises:
        ValueError: if it says anything but FP8 in blocks of 128x128.
    """
    settings = values.get("quantization_config")
    if not settings:
        return values, None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "fp8":
        raise ValueError(
            f"the checkpoint is quantized with {method!r}; plain weights and FP8 in blocks of "
            f"{BLOCK}x{BLOCK} can be converted"
        )
    for name, expected in (("weight_block_size", [BLOCK, BLOCK]), ("fmt", "e4m3")):
        given = settings.get(name, None if name == "weight_block_size" else expected)
        if given != expected:
            raise ValueError(
                f"the checkpoint is quantized in FP8 of another kind: {name} is {given!r}, not {expected!r}"
            )
    return {name: value for name, value in values.items() if name != "quantization_config"}, settings


class Dequantized(Mapping):
    """Tensors as they are, those in FP8 as the numbers that they stand for; factors are not tensors here.

    Args:
        tensors: of a checkpoint, under its own names.
        layout: how it has FP8.
        dtype: of what was in FP8.

    Attributes:
        dtype: may be changed; what is read from then on is of the new one.
        scales: factors by the name of their matrix.
    """

    def __init__(self, tensors: Tensors, layout: Fp8Layout, dtype: torch.dtype | None):
        names = {layout.weight_name(name): name for name in tensors if layout.weight_name(name)}
        self.dtype = torch.bfloat16 if dtype is None else dtype
        self.scales = Renamed(tensors, {weight: name for weight, name in names.items() if weight in tensors})
        self._tensors, self._factors = tensors, {names[weight] for weight in self.scales}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if name in self.scales:
            scale = self.scales[name]
            _require_blocks(name, tensor, scale)
            if not torch.isfinite(scale).all() or (scale < 0).any():
                raise ValueError(f"a factor of {name} is negative or not finite")
            return dequantize_blocks(tensor, scale, self.dtype)
        return _require_plain(name, tensor)

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        meta = outline(self._tensors, name)
        if name not in self.scales:
            return _require_plain(name, meta)
        _require_blocks(name, meta, self.scales.outline(name))
        return meta.to(self.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors and name not in self._factors

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._factors)

    def __len__(self) -> int:
        return len(self._tensors) - len(self._factors)


def _require_blocks(name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.dtype != FP8:
        raise ValueError(f"{name} has factors beside it, but is {weight.dtype} and not {FP8}")
    grid = block_grid(weight.shape)
    if weight.dim() != 2 or scale.shape != grid or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} needs factors of shape {grid} in {torch.float32}, not "
            f"{tuple(scale.shape)} in {scale.dtype}"
        )


def _require_plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} without factors beside it")
    return tensor


class Quantized(Mapping):
    """Tensors of a layout with matrices in FP8; the factors of each come right after it.

    Args:
        tensors: under the layout's names, in any floating type.
        layout: how it has FP8.
        scales: factors that a source had, by the name of their matrix. They are taken; for others they are
            computed.
        rest: type of what is not in FP8; None leaves what the source did not have in FP8 as it is.
        decoded: type of what the source had in FP8 and this layout does not.
        errors: where what each matrix loses is written down, of those whose factors are computed.
        settings: what a source's `quantization_config` says of its factors.
    """

    def __init__(
        self,
        tensors: Tensors,
        layout: Fp8Layout,
        scales: Tensors,
        rest: torch.dtype | None,
        decoded: torch.dtype | None,
        errors: dict[str, QuantizationError],
        settings: Mapping[str, Any] | None = None,
    ):
        self._tensors, self._layout, self._scales = tensors, layout, scales
        self._rest, self._decoded = rest, decoded
        self._errors, self._settings = errors, settings or {}
        self._weights = {layout.scale_name(name): name for name in tensors if layout.weights.fullmatch(name)}
        self._last: tuple[str | None, tuple[torch.Tensor, torch.Tensor] | None] = (None, None)

    @property
    def kept(self) -> int:
        """How many matrices have the numbers and factors of the source."""
        return sum(weight in self._scales for weight in self._weights.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The `quantization_config` of these; with what the source's says, where all factors are its own."""
        own = self.kept == len(self._weights)
        return {**(self._settings if own else {}), **QUANTIZATION_CONFIG}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._weights:
            return self._encode(self._weights[name])[1]
        if self._layout.weights.fullmatch(name):
            return self._encode(name)[0]
        return self._round_rest(name, self._tensors[name])

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        if name in self._weights:
            grid = block_grid(outline(self._tensors, self._weights[name]).shape)
            return torch.empty(grid, dtype=torch.float32, device="meta")
        meta = outline(self._tensors, name)
        return meta.to(FP8) if self._layout.weights.fullmatch(name) else self._round_rest(name, meta)

    def __contains__(self, name: object) -> bool:
        return name in self._weights or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            yield name
            if self._layout.weights.fullmatch(name):
                yield self._layout.scale_name(name)

    def __len__(self) -> int:
        return len(self._tensors) + len(self._weights)

    def _round_rest(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(self._layout.fp32):
            return tensor
        dtype = self._decoded if name in self._scales else self._rest
        return tensor if dtype is None else tensor.to(dtype)

    def _encode(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self._last[0] != name:
            weight = self._tensors[name]
            known = self._scales.get(name)
            try:
                numbers, scale = quantize_blocks(weight, known)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if known is None and name not in self._errors:
                restored = dequantize_blocks(numbers, scale, torch.float32)
                self._errors[name] = measure_error(name, weight, restored)
            self._last = (name, (numbers, scale))
        return self._last[1]


@dataclass(frozen=True)
class BlockScaled:
    """What a checkpoint in FP8 has beside its tensors.

    Attributes:
        stored: its tensors under its own names, out of FP8.
        scales: factors of its matrices under Tessera's names, stacked and joined as these are.
        settings: its `quantization_config`, if it has one.
    """

    stored: Dequantized
    scales: Tensors
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        stored: Dequantized,
        ours: Translated,
        names: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "BlockScaled":
        """From a checkpoint's tensors before and after translation.

        Args:
            stored: before.
            ours: after.
            names: name in the plan of `ours` -> name in `stored`, where these differ.
            settings: its `quantization_config`.
        """
        names = {name: name for name in stored} if names is None else names
        scales = Renamed(stored.scales, {new: old for new, old in names.items() if old in stored.scales})
        plan = [step for step in ours.plan if all(name in scales for name in step.theirs)]
        return cls(stored, Translated(scales, plan, out=False), settings)

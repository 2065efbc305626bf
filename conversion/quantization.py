"""A conversion to FP8 in blocks: which factors are the source's, which are computed, and what that costs.

What belongs here: what is decided once for a whole model, and the account of it for the user. How single
tensors come and go is in `fp8_checkpoints.py`, the arithmetic in `fp8.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .fp8 import QuantizationError, summarize_errors
from .fp8_checkpoints import BlockScaled, Dequantized, Fp8Layout, Quantized, Tensors
from .rules import Rule, Translated, make_plan, to_ours, to_theirs


@dataclass
class Quantization:
    """A conversion to FP8: how one model's matrices become numbers and factors, and what that costs.

    A source in FP8 keeps its numbers and factors bit for bit, where the target has those matrices in FP8.

    Attributes:
        layout: of the target.
        rules: of the target.
        config: of the model that is written.
        source: the source's factors, if it is in FP8 itself.
        errors: of each matrix that came into FP8 here, by its name.
        kept: how many come with the factors of the source.
    """

    layout: Fp8Layout
    rules: list[Rule]
    config: TesseraConfig
    source: BlockScaled | None = None
    errors: dict[str, QuantizationError] = field(default_factory=dict)
    kept: int = 0

    def encode(self, theirs: Tensors) -> Quantized:
        """Tensors under the target's names, as they are written."""
        known = {} if self.source is None else self.source.scales
        plan = [
            step for step in make_plan(self.config, self.rules) if all(name in known for name in step.ours)
        ]
        # What is not in FP8 is bf16 in the releases; what a source in FP8 has beside, stays what it is.
        rest = torch.bfloat16 if self.source is None else None
        scales = Translated(known, plan, out=True)
        settings = None if self.source is None else self.source.settings
        result = Quantized(theirs, self.layout, scales, rest, self.config.dtype, self.errors, settings)
        self.kept = result.kept
        return result

    def round(self, ours: Tensors) -> Tensors:
        """Tensors under Tessera's names, as they are read back from what is written."""
        encoded = self.encode(to_theirs(ours, self.config, self.rules))
        return to_ours(Dequantized(encoded, self.layout, self.config.dtype), self.config, self.rules)

    def describe(self) -> list[str]:
        """The error in sentences: of all matrices together, and of the worst one."""
        kept = [f"{self.kept} tensors keep the source's numbers in FP8"] if self.kept else []
        if not self.errors:
            return kept
        worst = min(self.errors.values(), key=lambda error: error.sqnr)
        return [*kept, str(summarize_errors(self.errors.values())), f"the worst is {worst}"]

    def report(self) -> dict[str, Any]:
        """The error by tensor and of all, for a JSON file. Infinite SQNR (nothing lost) is null."""

        def entry(error: QuantizationError) -> dict[str, float | int | None]:
            return {
                "numbers": error.numbers,
                "max_abs": error.largest,
                "relative_rms": error.relative_rms,
                "sqnr_db": error.sqnr if error.noise else None,
            }

        errors = self.errors
        return {
            "kept": self.kept,
            "all": entry(summarize_errors(errors.values())),
            "tensors": {name: entry(errors[name]) for name in sorted(errors)},
        }

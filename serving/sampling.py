"""How a row of a batch chooses its next token: each by its own temperature, limits and seed.

What belongs here: from scores to drawn tokens. `generate` of transformers samples a whole batch with one
setting and one random state; here the draws of a row come from a generator of its own, so that what it says
does not depend on the rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Settings(Protocol):
    """What a row needs to say about its sampling."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass
class RowSampler:
    """Settings of one row and the generator of its draws.

    Attributes:
        settings: temperature (0 takes the likeliest token), top_k, top_p (None for all), seed (None for any).
    """

    settings: Settings
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        # On the CPU whatever the model's device: the same seed draws the same numbers everywhere.
        self.generator = torch.Generator()
        if self.settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.settings.seed)

    def draw(self) -> float:
        """A number in [0, 1)."""
        return torch.rand((), generator=self.generator).item()


def draw_tokens(scores: torch.Tensor, samplers: Sequence[RowSampler]) -> torch.Tensor:
    """Chooses one token a row.

    In the order of transformers: temperature, then the k likeliest, then the likeliest of mass p (always one
    at least). The draw is the point where the row's number falls in the cumulated probabilities.

    Args:
        scores: logits, [B, V].
        samplers: one a row.

    Returns:
        Token ids, [B].
    """
    tokens = scores.argmax(-1)
    rows = [i for i, sampler in enumerate(samplers) if sampler.settings.temperature > 0]
    if not rows:
        return tokens
    chosen = [samplers[i] for i in rows]

    def column(values: list) -> torch.Tensor:
        return torch.tensor(values, device=scores.device).unsqueeze(1)

    vocabulary = scores.shape[-1]
    temperature = column([sampler.settings.temperature for sampler in chosen])
    top_k = column([min(sampler.settings.top_k or vocabulary, vocabulary) for sampler in chosen])
    # None as well as 1: rounding of the cumulated mass must not cut a token off.
    top_p = column([2.0 if (p := sampler.settings.top_p) is None or p == 1 else p for sampler in chosen])
    # The likeliest at 0, so that a temperature close to zero does not overflow.
    shifted = scores[rows].float()
    shifted = shifted - shifted.max(-1, keepdim=True).values
    ordered, order = shifted.div(temperature).sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=scores.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    cumulated = probabilities.masked_fill(before >= top_p, 0).cumsum(-1)
    points = column([sampler.draw() for sampler in chosen]) * cumulated[:, -1:]
    # The first token whose cumulated mass is past the point; rounding must not lead past the last with any.
    positions = (cumulated <= points).sum(-1, keepdim=True)
    last = (cumulated < cumulated[:, -1:]).sum(-1, keepdim=True)
    tokens[rows] = order.gather(-1, torch.minimum(positions, last)).squeeze(1)
    return tokens

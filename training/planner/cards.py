"""The cards that models are trained on: memory, bandwidth, peaks and what they can do.

What belongs here: figures of hardware. Peaks, bandwidths and memory are those of the makers' data sheets,
dense (without sparsity). `reached` is the share of the sheet's peak that a large matrix product gets; the
H200's was measured (776 of 989 TFLOP/s, `peak.py`), the others are what such cards are commonly seen
to reach, and within a tenth at best: a plan made on the card itself measures instead.
"""

import difflib
import re
from dataclasses import dataclass

GIB = 2**30
T, G = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        name: as `--gpu` takes it.
        title: as people write it.
        memory: bytes that a process finds there.
        bandwidth: of that memory, bytes per second.
        peaks: dense FLOP/s by dtype: "bf16", "fp16", "fp32" (tf32 where the card has it is not used), "fp8".
        reached: share of the peak that large products get.
        copied: share of the bandwidth that a copy gets.
        link: bytes per second that one card sends to another of its host.
        watts: at full load.
        triton: whether torch.compile has kernels for it.
        flash: whether a fused attention with low precision runs on it at full rate.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    peaks: dict[str, float]
    reached: float
    link: float
    watts: float
    copied: float = 0.85
    triton: bool = True
    flash: bool = True

    @property
    def precision(self) -> str:
        """The fastest one in which training is usual on it."""
        return next(name for name in ("bf16", "fp16", "fp32") if name in self.peaks)


def _card(name, title, memory, bandwidth, peaks, reached, link, watts, **more) -> Card:
    flops = {dtype: tera * T for dtype, tera in peaks.items()}
    return Card(name, title, memory * GIB, bandwidth * G, flops, reached, link * G, watts, **more)


# Memory in GiB as a process finds it, bandwidth and link in GB/s, peaks in TFLOP/s.
CARDS = {
    card.name: card
    for card in (
        # fp16 at twice the rate of fp32, but no matrix units, and older than the compiler's kernels.
        _card(
            "p100",
            "Tesla P100 16 GB",
            15.9,
            732,
            {"fp16": 21.2, "fp32": 10.6},
            0.75,
            12,
            250,
            triton=False,
            flash=False,
        ),
        _card("v100", "Tesla V100 16 GB", 15.8, 900, {"fp16": 125, "fp32": 15.7}, 0.7, 100, 300, flash=False),
        _card(
            "v100-32gb",
            "Tesla V100 32 GB",
            31.7,
            900,
            {"fp16": 125, "fp32": 15.7},
            0.7,
            100,
            300,
            flash=False,
        ),
        # 70 W: it cannot hold its clock under matrix products.
        _card("t4", "Tesla T4", 14.7, 320, {"fp16": 65, "fp32": 8.1}, 0.4, 12, 70, flash=False),
        _card("3090", "GeForce RTX 3090", 23.6, 936, {"bf16": 71, "fp16": 71, "fp32": 35.6}, 0.85, 12, 350),
        _card(
            "4090",
            "GeForce RTX 4090",
            23.5,
            1008,
            {"bf16": 165, "fp16": 165, "fp32": 82.6, "fp8": 330},
            0.9,
            12,
            450,
        ),
        _card("l4", "L4", 22.0, 300, {"bf16": 121, "fp16": 121, "fp32": 30.3, "fp8": 242}, 0.5, 12, 72),
        _card("a100-40gb", "A100 40 GB", 39.4, 1555, {"bf16": 312, "fp16": 312, "fp32": 19.5}, 0.8, 240, 400),
        _card("a100", "A100 80 GB", 79.1, 2039, {"bf16": 312, "fp16": 312, "fp32": 19.5}, 0.8, 240, 400),
        _card(
            "h100",
            "H100 SXM 80 GB",
            79.1,
            3350,
            {"bf16": 989, "fp16": 989, "fp32": 67, "fp8": 1979},
            0.7,
            370,
            700,
        ),
        _card(
            "h200",
            "H200",
            139.8,
            4800,
            {"bf16": 989, "fp16": 989, "fp32": 67, "fp8": 1979},
            0.785,
            370,
            700,
            copied=0.875,
        ),
        _card(
            "b200", "B200", 178.0, 8000, {"bf16": 2250, "fp16": 2250, "fp32": 80, "fp8": 4500}, 0.7, 750, 1000
        ),
        # Shares its memory with the processor; two are joined by a network card.
        _card(
            "gb10",
            "DGX Spark (GB10)",
            119.0,
            273,
            {"bf16": 125, "fp16": 125, "fp32": 31, "fp8": 250},
            0.7,
            20,
            140,
        ),
    )
}
ALIASES = {
    "a100-80gb": "a100",
    "v100-16gb": "v100",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "rtx4090": "4090",
    "rtx3090": "3090",
    "spark": "gb10",
    "dgx-spark": "gb10",
}  # fmt: skip


def find_card(name: str) -> Card:
    """The card of a name, however it is spelled.

    Raises:
        ValueError: if it is not known.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = re.sub(r"^(nvidia|tesla|geforce)-", "", plain)
    plain = re.sub(r"^rtx-?", "", plain)
    plain = ALIASES.get(plain, plain)
    if plain in CARDS:
        return CARDS[plain]
    close = difflib.get_close_matches(plain, [*CARDS, *ALIASES], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"there is no card '{name}'{hint} (cards: {', '.join(CARDS)}; here: this machine's own)")

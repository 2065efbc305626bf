"""Fields of attention that families share and spell in their own ways: the head's size, and who slides.

What belongs here: functions for `Family.derive` and `Family.derive_theirs`.
"""

from typing import Any

from transformers import PreTrainedConfig

from tessera.modeling.configuration_tessera import TesseraConfig


def head_dim_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    """The size of a head where the configuration may leave it open."""
    given = getattr(theirs, "head_dim", None)
    return {"head_dim": given or theirs.hidden_size // theirs.num_attention_heads}


def head_dim_for(ours: TesseraConfig) -> dict[str, Any]:
    """The size of a head, said only where it does not follow from the width."""
    follows = ours.head_dim == ours.hidden_size // ours.num_attention_heads
    return {} if follows else {"head_dim": ours.head_dim}


def one_window_from(theirs: PreTrainedConfig) -> dict[str, Any]:
    """A window that holds for every layer."""
    kind = "full_attention" if theirs.sliding_window is None else "sliding_attention"
    return {"layer_types": [kind] * theirs.num_hidden_layers, "sliding_window": theirs.sliding_window}


def one_window_for(ours: TesseraConfig) -> dict[str, Any]:
    """The window, if every layer has it; a mixture comes back changed and is refused."""
    slides = set(ours.layer_types) == {"sliding_attention"}
    return {"sliding_window": ours.sliding_window if slides else None}


def windows_by_layer_for(ours: TesseraConfig) -> dict[str, Any]:
    """The window of those layers that slide, as Qwen says it."""
    slides = "sliding_attention" in ours.layer_types
    return {
        "use_sliding_window": slides,
        "sliding_window": ours.sliding_window if slides else None,
        "layer_types": list(ours.layer_types),
    }

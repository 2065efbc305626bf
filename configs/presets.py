"""Presets: configurations by name, from the JSON files in `models/`, and the depth rule that scales them.

What belongs here: from a name to fields. What the fields mean is in `tessera.modeling.configuration_tessera`.
"""

import difflib
import json
import re
from importlib import resources
from typing import Any


def preset_names() -> list[str]:
    """Names of the presets that have a file, in alphabetical order."""
    return sorted(
        path.name.removesuffix(".json") for path in _preset_folder().iterdir() if path.name.endswith(".json")
    )


def read_preset(name: str) -> dict[str, Any]:
    """Reads the fields of a preset, with letters not yet expanded to layers.

    Raises:
        ValueError: if there is no such preset.
    """
    names = preset_names()
    if name in names:
        return lay_over_base(json.loads((_preset_folder() / f"{name}.json").read_text(encoding="utf-8")))
    by_depth = re.fullmatch(r"(.+)-d(\d+)", name)
    if by_depth and f"{by_depth[1]}-d12" in names:
        return scale_to_depth(read_preset(f"{by_depth[1]}-d12"), int(by_depth[2]))
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"there is no preset '{name}'{hint} (presets: {', '.join(names)})")


def lay_over_base(values: dict[str, Any]) -> dict[str, Any]:
    """Resolves what a preset file may name beside fields: another preset as `base`, under the others, and a
    `depth` that applies the depth rule to that base.

    Raises:
        ValueError: if there is no such preset, or the rule does not fit it.
    """
    if "base" not in values:
        return values
    values = dict(values)
    base = read_preset(values.pop("base"))
    depth = values.pop("depth", None)
    return {**(base if depth is None else scale_to_depth(base, depth)), **values}


def scale_to_depth(values: dict[str, Any], depth: int) -> dict[str, Any]:
    """The depth rule: one dial that sets every size of a multi-head preset (nanochat's base_train).

    Width grows with depth at the preset's own ratio (64 a layer in nanochat) and is rounded up to whole
    heads; heads, key/value heads and feed-forward keep their ratios to the width.

    Raises:
        ValueError: if `depth` is not positive, or the preset has no heads to count or layers listed one by
            one.
    """
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth must be a whole number of layers, at least 1; got {depth!r}")
    if values.get("attention_type", "multi_head") != "multi_head":
        raise ValueError(
            "the depth rule is for multi-head attention; set the sizes of a latent model one by one"
        )
    if any(isinstance(values.get(name), list) for name in ("layer_types", "mlp_layer_types")):
        raise ValueError("the depth rule needs layer types given as a pattern of letters, not as a list")
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    groups = values["num_attention_heads"] // (
        values.get("num_key_value_heads") or values["num_attention_heads"]
    )
    heads = -(-depth * values["hidden_size"] // (values["num_hidden_layers"] * head_dim))
    if heads % groups:
        raise ValueError(
            f"depth {depth} gives {heads} heads, which do not share key/value heads in groups of {groups}"
        )
    width = heads * head_dim
    scaled = {
        **values,
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
    }
    for name in ("intermediate_size", "moe_intermediate_size"):
        if values.get(name) is not None:
            scaled[name] = values[name] * width // values["hidden_size"]
    return scaled


def _preset_folder():
    return resources.files("tessera.configs") / "models"

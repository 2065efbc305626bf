"""Presets: configurations by name, from the JSON files in `models/`, and the depth rule that scales them.

What belongs here: from a name to fields. What the fields mean is in `tessera.modeling.configuration_tessera`.
"""

import difflib
import json
import re
from importlib import resources
from typing import Any

# field -> kind of layer -> its letter in a pattern
LAYER_LETTERS = {
    "layer_types": {"full_attention": "L", "sliding_attention": "S"},
    "mlp_layer_types": {"dense": "D", "sparse": "S"},
}


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
    """The depth rule: one dial that sets every size of a preset (nanochat's base_train).

    Width grows with depth at the preset's own ratio (64 a layer in nanochat) and is rounded up to whole
    heads, and to whole groups of them where they share keys and values. Heads, feed-forward, experts and the
    ranks of latent attention keep their ratios to the width; the size of a head, the number of experts and
    how many of them a token takes stay.

    Args:
        values: fields of a configuration.
        depth: number of layers.

    Raises:
        ValueError: if `depth` is not positive, or layers are listed one by one without a pattern.
    """
    if type(depth) is not int or depth < 1:
        raise ValueError(f"depth must be a whole number of layers, at least 1; got {depth!r}")
    layers, width, heads = (
        values[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if width % heads:
        raise ValueError(f"the depth rule needs a width of whole heads; {width} is not {heads} of one size")
    share = width // heads
    groups = heads // (values.get("num_key_value_heads") or heads)
    if values.get("attention_type", "multi_head") != "multi_head":
        groups = 1
    new_heads = groups * -(-depth * width // (layers * share * groups))
    new_width = new_heads * share
    scaled = {
        **values,
        "num_hidden_layers": depth,
        "hidden_size": new_width,
        "num_attention_heads": new_heads,
    }
    if values.get("attention_type", "multi_head") == "multi_head":
        scaled["num_key_value_heads"] = new_heads // groups
    for name in ("intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"):
        if values.get(name) is not None:
            scaled[name] = values[name] * new_width // width
    for name, letters in LAYER_LETTERS.items():
        if isinstance(values.get(name), list):
            scaled[name] = _as_pattern(name, values[name], letters)
    return scaled


def _as_pattern(name: str, kinds: list[str], letters: dict[str, str]) -> str:
    """The shortest pattern of letters that layers repeat; the last one may be full regardless."""
    for length in range(1, len(kinds) // 2 + 1 if len(set(kinds)) > 1 else 2):
        pattern = kinds[:length]
        spelled = [pattern[i % length] for i in range(len(kinds))]
        if "full_attention" in pattern:
            spelled[-1] = "full_attention"
        if spelled == kinds:
            return "".join(letters[kind] for kind in pattern)
    raise ValueError(f"the depth rule needs {name} that repeat a pattern, or the pattern in letters")


def _preset_folder():
    return resources.files("tessera.configs") / "models"

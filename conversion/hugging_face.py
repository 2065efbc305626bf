"""The way in from a directory that transformers loads: Tessera's own, and those of the families.

What belongs here: which tensors of such a directory are weights of the model, and what their names are. Names
and configurations of each family are in `families.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_config, read_json

from .checkpoints import Checkpoint
from .families import FAMILIES, Family
from .rules import Renamed, Rule, to_ours
from .tensor_files import open_safetensors

TESSERA_RULES = [Rule("{rest}", "{rest}")]
# DeepSeek's releases repeat the model's embedding and head in each layer for multi-token prediction.
_SHARED_BY_PREDICTORS = (".embed_tokens.weight", ".shared_head.head.weight")


def recognises(path: Path) -> bool:
    """Whether this is a directory in transformers' layout."""
    return (path / "config.json").is_file()


def open_source(folder: Path) -> Checkpoint:
    """Opens a directory in transformers' layout.

    Raises:
        ValueError: if it is of no known family, or does not fit its own configuration.
    """
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if model_type == "tessera":
        config = read_config(folder / "config.json")
        tensors, notes = _clean(open_safetensors(folder), config)
        return Checkpoint(folder, "tessera", config, to_ours(tensors, config, TESSERA_RULES), notes=notes)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'} is of model type {model_type!r}; known are tessera, "
            f"{', '.join(FAMILIES)}, the native layout and nanochat's own checkpoints"
        )
    family = FAMILIES[model_type]
    config = family.config_from(values)
    tensors, notes = _clean(open_safetensors(folder), config, family)
    ours = to_ours(tensors, config, family.rules_for(tensors))
    return Checkpoint(folder, model_type, config, ours, family, notes)


def _clean(
    tensors: Mapping[str, torch.Tensor], config: TesseraConfig, family: Family | None = None
) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """Leaves out what is no weight of the model, and gives the base model's tensors their prefix.

    The configuration comes to claim the layers for multi-token prediction that are there; many a release says
    that it has some and leaves them out.
    """
    prefix = "model." if family is None else family.prefix
    bare = not any(name.startswith(prefix) for name in tensors)
    names, predictors, depth = {}, 0, config.num_hidden_layers
    if family is not None and family.predicts_ahead:
        found = (re.search(r"layers\.(\d+)\.eh_proj\.", name) for name in tensors)
        there = {int(match[1]) for match in found if match}
        if not there.issuperset(range(depth, depth + config.num_mtp_layers)):
            config.num_mtp_layers, config.mtp_mlp_layer_types = 0, None
    held = depth + config.num_mtp_layers
    for name in tensors:
        full = prefix + name if bare and name != "lm_head.weight" else name
        if family is not None and any(re.fullmatch(pattern, full) for pattern in family.ignored):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", full)
        if family is not None and family.predicts_ahead and layer and int(layer[1]) >= depth:
            if full.endswith(_SHARED_BY_PREDICTORS):
                continue
            if int(layer[1]) >= held:
                predictors += 1
                continue
        names[full] = name
    notes = [f"{predictors} tensors of multi-token prediction are left out"] if predictors else []
    if config.tie_word_embeddings and "lm_head.weight" in names:
        embedding = "transformer.wte.weight" if prefix == "transformer." else "model.embed_tokens.weight"
        if embedding in names and not torch.equal(
            tensors[names["lm_head.weight"]], tensors[names[embedding]]
        ):
            raise ValueError("lm_head.weight differs from the embedding that tie_word_embeddings makes it")
        del names["lm_head.weight"]
    return Renamed(tensors, names), notes

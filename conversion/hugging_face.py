"""The way in from a directory that transformers loads: Tessera's own, and those of the families.

What belongs here: which tensors of such a directory are weights of the model, and what their names are. Names
and configurations of each family are in `families/`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_config, read_json

from .checkpoints import Checkpoint
from .families import FAMILIES, Family
from .families.family import holder_of
from .fp8_checkpoints import HUGGING_FACE_FP8, BlockScaled, Dequantized, split_off_quantization
from .rules import Renamed, Rule, require_layers, to_ours
from .tensor_files import open_safetensors

TESSERA_RULES = [Rule("{rest}", "{rest}")]


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
        stored = open_safetensors(folder)
        require_layers(values, stored, "config.json")
        config = read_config(folder / "config.json")
        tensors, notes = _clean(stored, config)
        return Checkpoint(folder, "tessera", config, to_ours(tensors, config, TESSERA_RULES), notes=notes)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'} is of model type {model_type!r}; known are tessera, "
            f"{', '.join(FAMILIES)}; and, known by other files, the native layout, nanochat's and Meta's own "
            "checkpoints, and llama2.c's"
        )
    family = FAMILIES[model_type]
    values, in_fp8 = split_off_quantization(values)
    stored = open_safetensors(folder)
    require_layers(values, stored, "config.json")
    config = family.config_from(values)
    if in_fp8:
        stored = Dequantized(stored, HUGGING_FACE_FP8, config.dtype)
        if not stored.scales:
            raise ValueError(
                f"{folder / 'config.json'} says that the weights are in FP8, but none has factors "
                f"(*{HUGGING_FACE_FP8.scale_end}); take quantization_config out of it if they are plain"
            )
    tensors, notes = _clean(stored, config, family)
    ours = to_ours(tensors, config, family.rules_for(tensors))
    fp8 = BlockScaled.of(stored, ours, tensors.names, in_fp8) if in_fp8 else None
    return Checkpoint(folder, model_type, config, ours, family, notes, fp8=fp8)


def _clean(
    tensors: Mapping[str, torch.Tensor], config: TesseraConfig, family: Family | None = None
) -> tuple[Renamed, list[str]]:
    """Leaves out what is no weight of the model, and gives the base model's tensors their prefix."""
    prefix = "model." if family is None else family.prefix
    bare = not any(name.startswith(prefix) for name in tensors)
    names = {prefix + name if bare and name != "lm_head.weight" else name: name for name in tensors}
    notes = []
    if family is not None:
        ignored = [name for name in names if any(re.fullmatch(pattern, name) for pattern in family.ignored)]
        for name in ignored:
            del names[name]
        if family.predicts_ahead:
            notes = _settle_predictions(tensors, names, config, family)
    if config.tie_word_embeddings and "lm_head.weight" in names:
        embedding = "transformer.wte.weight" if prefix == "transformer." else "model.embed_tokens.weight"
        if embedding in names and not torch.equal(
            tensors[names["lm_head.weight"]], tensors[names[embedding]]
        ):
            raise ValueError("lm_head.weight differs from the embedding that tie_word_embeddings makes it")
        del names["lm_head.weight"]
    return Renamed(tensors, names), notes


def _settle_predictions(
    tensors: Mapping[str, torch.Tensor], names: dict[str, str], config: TesseraConfig, family: Family
) -> list[str]:
    """Brings the layers for multi-token prediction that a checkpoint has and those that it claims together.

    The configuration comes to claim what is there: many a release says that it has some and leaves them out.
    Copies of the embedding and the head, which releases have in each of these layers, are dropped.
    """
    depth = config.num_hidden_layers
    found = (re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name) for name in names)
    there = {int(match[1]) for match in found if match}
    if config.num_mtp_layers and not there.issuperset(range(depth, depth + config.num_mtp_layers)):
        family.leave_predictions_out(config)
    held = depth + config.num_mtp_layers
    missing, surplus = set(), 0
    for name, pattern in family.repeated.items():
        for i in range(depth, held):
            copy = pattern.format(i=i)
            if copy not in names:
                missing.add(pattern)
                continue
            original = holder_of(name, config)
            if original in names and not torch.equal(tensors[names[copy]], tensors[names[original]]):
                raise ValueError(f"{copy} differs from {original}, which layers that predict ahead share")
            del names[copy]
    if missing:
        family.leave_copies_out(config, sorted(missing))
    for name in list(names):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= held and int(layer[1]) in there:
            del names[name]
            surplus += 1
    return [f"{surplus} tensors of multi-token prediction are left out"] if surplus else []

"""Some layers of a model, for one that is too large to be run as a whole.

The sample is a shallower model of the same class and configuration, into each of whose layers goes one of the
whole model of the same kind: the first, the last, and ones evenly spread between them. Source and result get
the same ones, so their logits must be equal as those of the whole models must. What belongs here: how much
memory there is, which layers are taken, and how the shallower model is built.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .rules import Renamed, model_shapes
from .tensor_files import open_safetensors
from .verify import assemble, check_loading

# So many layers as a rule; more where a model has kinds of layers that come later.
LAYERS = 3
_LAYER = re.compile(r"((?:\w+\.)*?(?:layers|h)\.)(\d+)(\..+)")
# Bytes beside the weights: activations, and what the library's threads that load a model reserve.
_RESERVE = 3 * 10**8
# This process's own control group, in a container.
_GROUP = Path("/sys/fs/cgroup")
_DEPTH = ("num_hidden_layers", "n_layer")
_AHEAD = ("num_mtp_layers", "num_nextn_predict_layers")


def free_memory() -> int:
    """Bytes that this process can still take, by the machine, its control group and its own limits."""
    limits = [psutil.virtual_memory().available]
    group = _GROUP
    try:
        taken = int((group / "memory.current").read_text())
        # Pages of files that were read once are given up for anything else.
        if pages := re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE):
            taken -= int(pages[1])
        limits.append(int((group / "memory.max").read_text()) - taken)
    except (OSError, ValueError):
        pass  # no such group, or no limit in it
    if os.name == "posix":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            limits.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def memory_needed(config: TesseraConfig, layers: int | None = None) -> int:
    """Bytes to run a model, or one of so many of its layers: in fp32, and once more for what is read."""
    sizes = {name: shape.numel() for name, shape in model_shapes(config).items()}
    per_layer: dict[int, int] = {}
    for name, size in sizes.items():
        if match := _LAYER.fullmatch(name):
            per_layer[int(match[2])] = per_layer.get(int(match[2]), 0) + size
    rest = sum(sizes.values()) - sum(per_layer.values())
    held = sum(per_layer.values()) if layers is None else layers * max(per_layer.values())
    return 8 * (rest + held) + _RESERVE


def choose_layers(config: TesseraConfig, count: int) -> list[int] | None:
    """Which layer of a model goes into each layer of a sample; None if one of these has no like in it."""
    whole, sample = (_kinds_of_layers(c) for c in (config, cut_config(config, count)))
    chosen = []
    for slot, kind in enumerate(sample):
        alike = [layer for layer, other in enumerate(whole) if other == kind]
        if not alike:
            return None
        places = [place for place, other in enumerate(sample) if other == kind]
        nth, last = places.index(slot), max(1, len(places) - 1)
        # A kind that has one place gets its last layer: the first of all layers is there already.
        at = nth if len(places) > 1 else 1
        chosen.append(alike[round(at * (len(alike) - 1) / last)])
    return chosen


def layers_for_all_kinds(config: TesseraConfig) -> int:
    """Depth of the shallowest sample with at least `LAYERS` layers and every kind that the model has."""
    kinds = _kinds_of_layers(config)
    first = max(kinds.index(kind) for kind in kinds)
    return min(config.num_hidden_layers, max(LAYERS, first + 1))


def cut_config(config: TesseraConfig, count: int) -> TesseraConfig:
    """The configuration of a model's first layers."""
    return TesseraConfig.from_dict(_cut(config.to_dict(), config.num_hidden_layers, count))


def build_sample(checkpoint: Checkpoint, layers: list[int], dtype: torch.dtype) -> nn.Module:
    """A shallower model with some of the layers, in eval mode.

    Args:
        checkpoint: of the whole model.
        layers: which one goes into each layer.
        dtype: of the weights.

    Raises:
        ValueError: if transformers' own class does not load it, or does not find every tensor.
    """
    if checkpoint.family is None:
        config = cut_config(checkpoint.config, len(layers))
        names = {name: _name_in_whole(name, layers) for name in model_shapes(config)}
        return assemble(config, Renamed(checkpoint.tensors, names), dtype)
    values = read_json(checkpoint.folder / "config.json")
    values.pop("quantization_config", None)
    values = _cut(values, checkpoint.config.num_hidden_layers, len(layers))
    kind = getattr(transformers, checkpoint.family.architecture)
    config = type(AutoConfig.for_model(checkpoint.family.model_type)).from_dict(values)
    stored = open_safetensors(checkpoint.folder) if checkpoint.fp8 is None else checkpoint.fp8.stored
    state = dict(_sampled(stored, layers))
    with check_loading(kind, checkpoint) as loading:
        loading.model, loading.info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    return loading.model.eval()


def _kinds_of_layers(config: TesseraConfig) -> list[tuple]:
    tensors: list[set] = [set() for _ in range(config.num_hidden_layers)]
    for name, shape in model_shapes(config).items():
        match = _LAYER.fullmatch(name)
        if match and int(match[2]) < config.num_hidden_layers:
            tensors[int(match[2])].add((match[3], shape))
    return [
        (config.attention_kind(i), config.feed_forward_kind(i), frozenset(held))
        for i, held in enumerate(tensors)
    ]


def _cut(values: dict[str, Any], depth: int, count: int) -> dict[str, Any]:
    """A configuration of fewer layers: the lists with an entry a layer are cut too."""
    by_layer = {key for key, value in values.items() if isinstance(value, list) and len(value) == depth}
    cut = {
        # Ids of tokens may be as many as layers by chance.
        key: value[:count] if key in by_layer and "token" not in key else value
        for key, value in values.items()
    }
    cut.update({key: count for key in _DEPTH if key in cut})
    cut.update({key: 0 for key in _AHEAD if key in cut})
    # Of the layers that predict further ahead, of which there are none now.
    cut.update({key: None for key in ("mtp_layer_types", "mtp_mlp_layer_types") if key in cut})
    return cut


def _name_in_whole(name: str, layers: list[int]) -> str:
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{layers[int(match[2])]}{match[3]}" if match else name


def _sampled(tensors: Mapping[str, torch.Tensor], layers: list[int]):
    for name in tensors:
        match = _LAYER.fullmatch(name)
        if match is None:
            yield name, tensors[name]
            continue
        for slot, layer in enumerate(layers):
            if layer == int(match[2]):
                yield f"{match[1]}{slot}{match[3]}", tensors[name]

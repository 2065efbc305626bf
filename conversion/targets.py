"""The ways out: what a Tessera model can become, and what each of these consists of on disk.

What belongs here: the list. A target says what has to change in the model before it fits, exactly and without
a change of its logits, and writes the files; the order of things around that is in `convert.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from . import native
from .equivalents import cut_padding, pair_halves, pair_neighbours
from .families import FAMILIES, Family
from .rules import to_theirs
from .tensor_files import write_safetensors

Tensors = Mapping[str, torch.Tensor]
Prepared = tuple[TesseraConfig, Tensors]


@dataclass(frozen=True)
class Options:
    """What a user may ask of a target beside its name.

    Attributes:
        mp: model-parallel ranks, one file each.
    """

    mp: int = 1


@dataclass(frozen=True)
class Target:
    """One kind of checkpoint that a model can become.

    Attributes:
        name: on the command line.
        write: writes a prepared model's configuration and weights into an empty directory.
        prepare: the same model as this target can have it.
        predicts_ahead: whether layers for multi-token prediction have a place.
    """

    name: str
    write: Callable[[Path, TesseraConfig, Tensors, Options], None]
    prepare: Callable[[TesseraConfig, Tensors], Prepared] = lambda config, tensors: (config, tensors)
    predicts_ahead: bool = False


def _write_tessera(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
    config.architectures = ["TesseraForCausalLM"]
    config.save_pretrained(folder)
    write_safetensors(folder, tensors)


def _write_native(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
    config.architectures = ["TesseraForCausalLM"]
    # Not a directory that transformers loads, so without the code for that.
    config.to_json_file(folder / "config.json")
    native.write_native(folder, config, tensors, options.mp)


def _family_target(family: Family) -> Target:
    def prepare(config: TesseraConfig, tensors: Tensors) -> Prepared:
        pair = pair_neighbours if family.fixed.get("rope_interleave") else pair_halves
        return pair(*cut_padding(config, tensors))

    def write(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
        theirs = family.config_for(config)
        theirs.dtype = config.dtype
        theirs.save_pretrained(folder)
        write_safetensors(folder, to_theirs(tensors, config, family.rules_to_write(config)))

    return Target(family.model_type, write, prepare, family.predicts_ahead)


TARGETS = {
    target.name: target
    for target in (
        Target("tessera", _write_tessera, predicts_ahead=True),
        Target("native", _write_native),
        *map(_family_target, FAMILIES.values()),
    )
}

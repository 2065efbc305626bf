"""Tiny models in the native layout."""

import functools
from pathlib import Path

from tessera import TesseraForCausalLM
from tessera.conversion.native import write_native

from .models import tiny_model

# Heads, rows and experts that four ranks can share.
SHARED_BY_FOUR = {
    "dense": ("llama-tiny", {"num_key_value_heads": 4}),
    "latent-moe": ("bytegpt-tiny", {}),
    "latent-lowrank-sigmoid": ("latent-sliding-lowrank-sigmoid", {}),
    "moe-of-heads": ("moe-qknorm-softcap", {"num_key_value_heads": 4}),
    "nanochat-moe": ("nanochat-moe-smear-gqa", {"num_key_value_heads": 4}),
    "gpt": ("gpt2-tiny", {}),
}


def native(name: str, folder: Path, world: int = 1, **overrides) -> Path:
    """A tiny model in the native layout."""
    preset, fields = SHARED_BY_FOUR[name]
    model = _model(preset, tuple({**fields, **overrides}.items()))
    folder.mkdir()
    model.config.to_json_file(folder / "config.json")
    write_native(folder, model.config, model.state_dict(), world)
    return folder


@functools.cache
def _model(preset: str, fields: tuple[tuple, ...]) -> TesseraForCausalLM:
    """Only read here, so one will do for all files."""
    model = tiny_model(preset, **dict(fields))
    model.config.architectures = ["TesseraForCausalLM"]
    return model

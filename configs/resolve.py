"""From what is given as `--config` to a configuration: a preset, a Tessera file, or ByteGPT's own JSON."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from tessera.conversion.model_args import config_from_model_args, is_model_args
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence, read_json

from .presets import lay_over_base


def is_byte_gpt_file(given: str) -> bool:
    """Whether what is given is a file in ByteGPT's own words."""
    path = Path(given)
    return path.suffix == ".json" and path.is_file() and is_model_args(read_json(path))


def resolve_config(given: str, **overrides: Any) -> TesseraConfig:
    """Finds the configuration that a name or path means.

    Args:
        given: a file or a directory with `config.json`, else the name of a preset.
        overrides: fields laid over it.

    Raises:
        ValueError: if it is neither, or does not validate.
    """
    path = Path(given)
    try:
        # os.path has no opinion on names that no file can have; they are no preset either.
        if not os.path.exists(given) and path.suffix != ".json":
            return TesseraConfig.from_preset(given, **overrides)
        values = read_json(path / "config.json" if path.is_dir() else path)
        if is_model_args(values):
            return config_from_model_args(values, **overrides)
        return TesseraConfig(**{**lay_over_base(values), **overrides})
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"--config {given}: {first_sentence(error)}") from error

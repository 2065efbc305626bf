"""Loads a model from a directory, or refuses in one sentence.

`from_pretrained` fills a tensor that a checkpoint lacks with fresh random numbers and goes on; here that is
an error. This file is for the package's own tools and does not travel to the Hub.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig

from .configuration_tessera import TesseraConfig
from .modeling_tessera import TesseraForCausalLM


def load_model(
    path: str | Path, config: TesseraConfig | None = None, dtype: torch.dtype | str = "auto", **kwargs
) -> TesseraForCausalLM:
    """Loads a causal language model whose every tensor comes from the checkpoint.

    Args:
        path: a directory with `config.json` and safetensors, as `save_pretrained` writes it.
        config: instead of the directory's own.
        dtype: of the weights; "auto" keeps the checkpoint's.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: if nothing is there, or if the checkpoint has missing, extra, misshapen or unreadable
            tensors.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint directory {path}")
    if not any(path.glob("model*.safetensors")):
        raise ValueError(f"{path} has no model.safetensors")
    index = path / "model.safetensors.index.json"
    if index.is_file() and not isinstance(read_json(index).get("weight_map"), dict):
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    if config is None:
        config = read_config(path / "config.json")
    if not (path / "generation_config.json").is_file():
        # Without that file the library looks into config.json, which need not be there either.
        kwargs.setdefault("generation_config", GenerationConfig.from_model_config(config))
    try:
        model, info = TesseraForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except NotImplementedError as error:
        # The library's way of saying that a misshapen embedding cannot be tied to the head.
        raise ValueError(f"{path} does not fit the model: its embedding has another shape") from error
    require_complete(model, info, path)
    return model


def require_complete(model: TesseraForCausalLM, info: dict, path: str | Path) -> None:
    """Refuses a model that has not had every tensor from its checkpoint, or a checkpoint with more than that.

    Args:
        model: as `from_pretrained` gave it.
        info: its `output_loading_info`.
        path: of the checkpoint, for the error.

    Raises:
        ValueError: naming the tensors.
    """
    problems = []
    for kind, names in (
        ("missing", info["missing_keys"]),
        ("unexpected", info["unexpected_keys"]),
        ("misshapen", [entry[0] for entry in info["mismatched_keys"]]),
    ):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{len(names)} {kind} ({', '.join(names[:3])}{more})")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        # The library keeps two that differ apart, and the next to load the saved model has only one of them.
        problems.append("lm_head.weight differs from the embedding that tie_word_embeddings makes it")
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")


def read_config(path: str | Path) -> TesseraConfig:
    """Reads a Tessera `config.json`.

    Raises:
        ValueError: if it is missing, not JSON, of another model type, or does not validate.
    """
    values = read_json(path)
    try:
        return TesseraConfig.from_dict(values)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{path}: {first_sentence(error)}") from error


def read_json(path: str | Path) -> dict:
    """Reads a JSON object.

    Raises:
        ValueError: if the file is missing or is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def first_sentence(error: Exception) -> str:
    """The message of a validation error without the lines that say which validator it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A field of several types lists what each of them said.
    sentence = lines[-1].removeprefix("TypeError: ").removeprefix("ValueError: ").partition(". Errors: ")[0]
    return re.sub(r"<class '(\w+)'>", r"\1", sentence)

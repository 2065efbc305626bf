"""Checkpoints of nanochat's own code (July 2026): `model_<step>.pt` and `meta_<step>.json`.

What belongs here: the names of its tensors and of its configuration. They are read and not written: nanochat
loads pickles only, and its tokenizer is one; that one stays where it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .rules import VECTOR, Changed, Renamed, Rule, to_ours
from .tensor_files import read_pt

_ATTENTION = {
    "q_proj": "c_q",
    "k_proj": "c_k",
    "v_proj": "c_v",
    "o_proj": "c_proj",
    "value_gate": "ve_gate",
}

RULES = [
    Rule("model.embed_tokens.weight", "transformer.wte.weight"),
    *(
        Rule(f"model.layers.{{i}}.self_attn.{ours}.weight", f"transformer.h.{{i}}.attn.{theirs}.weight")
        for ours, theirs in _ATTENTION.items()
    ),
    Rule("model.layers.{i}.self_attn.value_embed.weight", "value_embeds.{i}.weight"),
    Rule("model.layers.{i}.mlp.up_proj.weight", "transformer.h.{i}.mlp.c_fc.weight"),
    Rule("model.layers.{i}.mlp.down_proj.weight", "transformer.h.{i}.mlp.c_proj.weight"),
    Rule("model.layers.{i}.residual_scale", "resid_lambdas", VECTOR),
    Rule("model.layers.{i}.embedding_scale", "x0_lambdas", VECTOR),
    Rule("model.smear.gate.weight", "smear_gate.weight"),
    Rule("model.smear.strength", "smear_lambda"),
    Rule("model.backout_scale", "backout_lambda"),
    Rule("lm_head.weight", "lm_head.weight"),
]

_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def recognises(path: Path) -> bool:
    """Whether this is a directory with nanochat's own checkpoints."""
    return find_nanochat(path) is not None


def open_source(folder: Path) -> Checkpoint:
    """Opens the newest checkpoint of a directory.

    Raises:
        ValueError: if it cannot be read, or does not fit its description.
    """
    config, tensors = read_nanochat(find_nanochat(folder))
    notes = []
    if any(folder.glob("*.pkl")):
        notes.append("its tokenizer is a pickle, which is not read: the result has none")
    return Checkpoint(folder, "nanochat-original", config, to_ours(tensors, config, RULES), notes=notes)


def find_nanochat(folder: Path) -> Path | None:
    """The newest `model_<step>.pt` of a directory, if there is one."""
    steps = {path for path in folder.glob("model_*.pt") if re.fullmatch(r"model_\d+\.pt", path.name)}
    return max(steps, key=lambda path: int(path.stem.removeprefix("model_")), default=None)


def read_nanochat(file: Path) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """Reads a checkpoint.

    Returns:
        Its configuration, and its tensors under nanochat's names in one dtype: the embeddings, which nanochat
        keeps in bf16, come out in that of the matrices, exactly.

    Raises:
        ValueError: if the file holds more than tensors, or the description beside it is missing or lacks a
            size.
    """
    meta = file.with_name(file.stem.replace("model_", "meta_") + ".json")
    args = read_json(meta).get("model_config")
    missing = [name for name in _SIZES if not isinstance(args, dict) or type(args.get(name)) is not int]
    if missing:
        raise ValueError(f"{meta}: model_config lacks {', '.join(missing)}")
    tensors = read_pt(file)
    if "transformer.wte.weight" not in {name.removeprefix("_orig_mod.") for name in tensors}:
        raise ValueError(f"{file} is not a nanochat model: it has no transformer.wte.weight")
    # Compiled models were saved with a prefix.
    tensors = Renamed(tensors, {name.removeprefix("_orig_mod."): name for name in tensors})
    dtype = torch.bfloat16
    for name in tensors:
        dtype = torch.promote_types(dtype, tensors[name].dtype)
    config = _config(args, padded_vocab_size=tensors["transformer.wte.weight"].shape[0])
    config.dtype = dtype
    return config, Changed(tensors, lambda name, tensor: tensor.to(dtype))


def _config(args: dict, padded_vocab_size: int) -> TesseraConfig:
    width, heads, context = args["n_embd"], args["n_head"], args["sequence_len"]
    # A quarter of the context, rounded up to a multiple of 128. Theirs counts the tokens to the left, ours
    # the current one too.
    window = -(-context // 4 // 128) * 128 + 1
    return TesseraConfig.from_preset(
        "nanochat-d12",
        vocab_size=args["vocab_size"],
        padded_vocab_size=padded_vocab_size,
        hidden_size=width,
        num_hidden_layers=args["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=args["n_kv_head"],
        head_dim=width // heads,
        intermediate_size=4 * width,
        layer_types=args.get("window_pattern", "L"),
        sliding_window=window,
        max_position_embeddings=context,
    )

"""The native layout: the tensor names of the DeepSeek and Meta inference releases, one file a rank.

A directory holds `model{rank}-mp{world}.safetensors` for each model-parallel rank, `params.json` with the
sizes in the releases' own words, and Tessera's `config.json`, from which it is read back exactly. What
belongs here: the names, which numbers of ranks a model can have, and the directory; what a rank's file holds
is in `rank_files.py`. Split along the first dimension are the rows of vocabulary, of heads and of the
feed-forward's width; along the second, what those multiply into the residual stream; routed experts go whole,
in contiguous ranges; everything else is on every rank.

Names beyond the releases', for the tiles that they do not have: `pos_embed` (learned positions),
`embed_norm`, `attn.q_head_norm`, `attn.k_head_norm` (QK norm), `attn.value_embed`, `attn.value_gate`,
`residual_scale`, `embedding_scale`, `smear.gate`, `smear.strength`, `backout_scale`; biases are `.bias`
beside their `.weight`. A feed-forward without gate has `w2` and `w3`. A head that is tied to the embedding
is not stored.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_config, read_json

from .checkpoints import Checkpoint
from .fp8_checkpoints import NATIVE_FP8, BlockScaled, Dequantized, Encoder
from .journal import Journal
from .model_args import config_from_model_args, model_args_from_config
from .outlines import outline
from .rank_files import SCALE, RankFiles, has_rank_files, holds, rank_file, take_share
from .rules import (
    SAME,
    UNSTACKED,
    UNSTACKED_PAIRS,
    Operation,
    Rule,
    name_some,
    require_layers,
    to_ours,
    to_theirs,
)
from .slices import AssembledSlice, DequantizedSlice, Slice, StackedSlice
from .weight_writer import WeightWriter

_LAYER = (
    ("input_layernorm.{p}", "attn_norm.{p}"),
    ("post_attention_layernorm.{p}", "ffn_norm.{p}"),
    ("self_attn.q_proj.{p}", "attn.wq.{p}"),
    ("self_attn.k_proj.{p}", "attn.wk.{p}"),
    ("self_attn.v_proj.{p}", "attn.wv.{p}"),
    ("self_attn.o_proj.{p}", "attn.wo.{p}"),
    ("self_attn.q_norm.weight", "attn.q_head_norm.weight"),
    ("self_attn.k_norm.weight", "attn.k_head_norm.weight"),
    ("self_attn.q_a_proj.{p}", "attn.wq_a.{p}"),
    ("self_attn.q_a_layernorm.{p}", "attn.q_norm.{p}"),
    ("self_attn.q_b_proj.weight", "attn.wq_b.weight"),
    ("self_attn.kv_a_proj_with_mqa.{p}", "attn.wkv_a.{p}"),
    ("self_attn.kv_a_layernorm.{p}", "attn.kv_norm.{p}"),
    ("self_attn.kv_b_proj.weight", "attn.wkv_b.weight"),
    ("self_attn.value_embed.weight", "attn.value_embed.weight"),
    ("self_attn.value_gate.weight", "attn.value_gate.weight"),
    ("mlp.gate_proj.{p}", "ffn.w1.{p}"),
    ("mlp.down_proj.{p}", "ffn.w2.{p}"),
    ("mlp.up_proj.{p}", "ffn.w3.{p}"),
    ("mlp.gate.weight", "ffn.gate.weight"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared_experts.w1.weight"),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared_experts.w2.weight"),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared_experts.w3.weight"),
    ("residual_scale", "residual_scale"),
    ("embedding_scale", "embedding_scale"),
)
_EXPERTS = "layers.{i}.ffn.experts.{e}"

RULES = [
    Rule("model.embed_tokens.weight", "embed.weight"),
    Rule("model.embed_positions.weight", "pos_embed.weight"),
    Rule("model.embed_norm.{p}", "embed_norm.{p}"),
    Rule("model.smear.{rest}", "smear.{rest}"),
    *(Rule(f"model.layers.{{i}}.{ours}", f"layers.{{i}}.{theirs}") for ours, theirs in _LAYER),
    Rule(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        (f"{_EXPERTS}.w1.weight", f"{_EXPERTS}.w3.weight"),
        UNSTACKED_PAIRS,
    ),
    Rule("model.layers.{i}.mlp.experts.up_proj", f"{_EXPERTS}.w3.weight", UNSTACKED),
    Rule("model.layers.{i}.mlp.experts.down_proj", f"{_EXPERTS}.w2.weight", UNSTACKED),
    Rule("model.norm.{p}", "norm.{p}"),
    Rule("model.backout_scale", "backout_scale"),
    Rule("lm_head.weight", "head.weight"),
]


def recognises(path: Path) -> bool:
    """Whether this is a directory in the native layout."""
    return has_rank_files(path)


def open_source(folder: Path) -> Checkpoint:
    """Opens a directory in the native layout, of any number of ranks.

    Raises:
        ValueError: if ranks or tensors are missing, or do not fit the configuration.
    """
    files = RankFiles(folder)
    config = read_native_config(folder, files)
    stored = Dequantized(files, NATIVE_FP8, config.dtype)
    tensors = to_ours(stored, config, RULES)
    fp8 = BlockScaled.of(stored, tensors) if stored.scales else None
    return Checkpoint(folder, "native", config, tensors, fp8=fp8)


def open_slices(files: RankFiles, config: TesseraConfig) -> dict[str, Slice]:
    """The tensors of a native directory under Tessera's names, each to be read in part.

    Args:
        files: of all ranks.
        config: of the model.

    Returns:
        Slices in the order of the plan; what is in FP8 comes out of it in the configuration's type (bf16 if
        it has none).

    Raises:
        ValueError: if tensors are missing, too many, or of another shape than the configuration says.
    """
    stored = Dequantized(files, NATIVE_FP8, config.dtype)
    translated = to_ours(stored, config, RULES)

    def slice_of(name: str) -> Slice:
        part = files.open_slice(name)
        # Refuses factors that do not fit, and FP8 without any.
        stored.outline(name)
        if name not in stored.scales:
            return part
        return DequantizedSlice(part, files.open_slice(NATIVE_FP8.scale_name(name)), stored.dtype)

    slices = {}
    for step in translated.plan:
        parts = [slice_of(name) for name in step.theirs]
        (name,) = step.ours
        # Besides stacks of experts the layout has Tessera's tensors as they are.
        slices[name] = parts[0] if step.operation is SAME else _stack(step.theirs, parts, step.operation)
        expected = translated.shapes[name]
        if slices[name].shape != expected:
            raise ValueError(
                f"{name_some(step.theirs)} gives a tensor of shape {slices[name].shape}, but the "
                f"configuration says {tuple(expected)}"
            )
    return slices


def _stack(names: tuple[str, ...], parts: list[Slice], operation: Operation) -> Slice:
    """Experts as Tessera has them: [E, ...], of gate and up the one below the other."""
    pairs = 2 if operation is UNSTACKED_PAIRS else 1
    kinds = {(part.get_dtype(), part.shape) for part in parts}
    if len(kinds) > 1 or len(parts[0].shape) != 2:
        found = " and ".join(f"{dtype} {shape}" for dtype, shape in sorted(kinds))
        raise ValueError(f"{name_some(names)} belong together but are {found}")
    rows, columns = parts[0].shape
    placed = [((i // pairs, i % pairs * rows, 0), StackedSlice(part)) for i, part in enumerate(parts)]
    return AssembledSlice((len(parts) // pairs, pairs * rows, columns), placed)


def check_world(config: TesseraConfig, world: int) -> None:
    """Refuses a number of ranks that heads, experts or rows cannot be shared among.

    Raises:
        ValueError: naming what does not divide.
    """
    if world < 1:
        raise ValueError(f"mp must be at least 1, got {world}")
    shared = {
        "num_attention_heads": config.num_attention_heads,
        "padded_vocab_size": config.padded_vocab_size,
    }
    if config.attention_type == "multi_head":
        shared["num_key_value_heads"] = config.num_key_value_heads
    if "dense" in config.mlp_layer_types:
        shared["intermediate_size"] = config.intermediate_size
    if "sparse" in config.mlp_layer_types:
        shared["n_routed_experts"] = config.n_routed_experts
        if config.n_shared_experts:
            shared["the shared experts' width"] = config.n_shared_experts * config.moe_intermediate_size
    wrong = [f"{name} ({count})" for name, count in shared.items() if count % world]
    if wrong:
        raise ValueError(f"mp {world} does not divide {', '.join(wrong)}")


def rank_files(
    config: TesseraConfig,
    tensors: Mapping[str, torch.Tensor],
    world: int,
    encode: Encoder | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """What each rank's file holds: name of the file -> native name -> tensor on the meta device.

    Raises:
        ValueError: if the model cannot be shared among that many.
    """
    return _share(config, _under_native_names(config, tensors, encode), world)


def _share(
    config: TesseraConfig, native: Mapping[str, torch.Tensor], world: int
) -> dict[str, dict[str, torch.Tensor]]:
    check_world(config, world)
    files = {rank_file(rank, world): {} for rank in range(world)}
    weight = None
    for name in native:
        meta = outline(native, name)
        # Factors come right after the weight that they are of.
        weight = weight if name.endswith(SCALE) else meta.shape
        for rank, held in enumerate(files.values()):
            if holds(name, rank, world, config.n_routed_experts):
                held[name] = take_share(name, meta, weight, rank, world)
    return files


def write_native(
    folder: Path,
    config: TesseraConfig,
    tensors: Mapping[str, torch.Tensor],
    world: int,
    journal: Journal | None = None,
    encode: Encoder | None = None,
) -> None:
    """Writes one file a rank, and `params.json`. All files grow together, so each tensor is computed once.

    Args:
        folder: an existing directory.
        config: of the model.
        tensors: under Tessera's names.
        world: model-parallel ranks.
        journal: of what is written already.
        encode: to FP8, if they shall be.

    Raises:
        ValueError: if the model cannot be shared among that many.
        OSError: if there is no room, or a file cannot be written.
    """
    native = _under_native_names(config, tensors, encode)
    files = _share(config, native, world)
    weight = None
    with WeightWriter(folder, files, journal) as writer:
        for name in native:
            weight = weight if name.endswith(SCALE) else outline(native, name).shape
            ranks = {rank: file for rank, file in enumerate(files) if name in files[file]}
            if all(writer.is_written(file, name) for file in ranks.values()):
                continue
            tensor = native[name]
            for rank, file in ranks.items():
                writer.write(file, name, take_share(name, tensor, weight, rank, world))
    params = model_args_from_config(config) | ({} if encode is None else {"dtype": "fp8"})
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _under_native_names(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor], encode: Encoder | None
) -> Mapping[str, torch.Tensor]:
    native = to_theirs(tensors, config, RULES)
    return native if encode is None else encode(native)


def read_native_config(folder: Path, tensors: Mapping[str, torch.Tensor]) -> TesseraConfig:
    """The configuration of a directory in the native layout: `config.json`, or else `params.json`.

    Raises:
        ValueError: if there is neither, or it cannot be read.
    """
    if (folder / "config.json").is_file():
        require_layers(read_json(folder / "config.json"), tensors, "config.json")
        return read_config(folder / "config.json")
    if not (folder / "params.json").is_file():
        raise ValueError(f"{folder} has neither config.json nor params.json, which say what the model is")
    # What the file cannot say, the tensors do.
    overrides = {"tie_word_embeddings": "head.weight" not in tensors}
    if any(name.endswith(".ffn.gate.bias") for name in tensors):
        overrides["router_correction_bias"] = True
    args = read_json(folder / "params.json")
    require_layers(args, tensors, "params.json")
    try:
        return config_from_model_args(args, **overrides)
    except ValueError as error:
        raise ValueError(f"{folder / 'params.json'}: {error}") from error

"""What llama.cpp can run: its architectures as tables, and which of them a Tessera model fits.

What belongs here: for each architecture the fields of a configuration that its file states, the fields that
have one value in its code, the names of its tensors, and its metadata. A field in neither list must be what a
plain `TesseraConfig` has, so a new tile is an obstacle until an architecture is found that has it. Names and
behaviour are those of llama.cpp's own source (`src/models/*.cpp`, `src/llama-model.cpp`); how the file is
laid out is in `gguf_files.py`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tessera.modeling.configuration_tessera import TesseraConfig

from .equivalents import cut_padding, pair_halves
from .families import architecture
from .rules import JOINED, Changed, Operation, Rule

Tensors = Mapping[str, torch.Tensor]
Metadata = dict[str, int | float | bool | str]

# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of releases of 2025 and 2026; later ones have more.
_MOST_LAYERS, _MOST_EXPERTS = 512, 512
# Depths at which llama.cpp's deepseek2 takes the queries for uncompressed, whatever the file says.
_LITE_DEPTHS = (26, 27)

_SIZES = (
    "vocab_size",
    "padded_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "intermediate_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_HEADS = ("num_key_value_heads", "head_dim", "rope_parameters", "rope_interleave")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = ("mlp_layer_types", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")

# [E, 2I, C] <-> gate and up, [E, I, C] each.
_HALVED = Operation(lambda ours: list(ours[0].chunk(2, dim=1)), lambda theirs: [torch.cat(theirs, dim=1)])

_BASE_NAMES = [
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.{p}", "output_norm.{p}"),
    Rule("lm_head.weight", "output.weight"),
    Rule("model.layers.{i}.input_layernorm.{p}", "blk.{i}.attn_norm.{p}"),
    Rule("model.layers.{i}.post_attention_layernorm.{p}", "blk.{i}.ffn_norm.{p}"),
    Rule("model.layers.{i}.self_attn.o_proj.{p}", "blk.{i}.attn_output.{p}"),
]
_HEAD_NAMES = [
    Rule("model.layers.{i}.self_attn.q_proj.{p}", "blk.{i}.attn_q.{p}"),
    Rule("model.layers.{i}.self_attn.k_proj.{p}", "blk.{i}.attn_k.{p}"),
    Rule("model.layers.{i}.self_attn.v_proj.{p}", "blk.{i}.attn_v.{p}"),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
]
_DENSE_NAMES = [
    Rule("model.layers.{i}.mlp.gate_proj.{p}", "blk.{i}.ffn_gate.{p}"),
    Rule("model.layers.{i}.mlp.up_proj.{p}", "blk.{i}.ffn_up.{p}"),
    Rule("model.layers.{i}.mlp.down_proj.{p}", "blk.{i}.ffn_down.{p}"),
]
_EXPERT_NAMES = [
    Rule("model.layers.{i}.mlp.gate.weight", "blk.{i}.ffn_gate_inp.weight"),
    Rule("model.layers.{i}.mlp.gate.e_score_correction_bias", "blk.{i}.exp_probs_b.bias"),
    Rule(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"),
        _HALVED,
    ),
    Rule("model.layers.{i}.mlp.experts.down_proj", "blk.{i}.ffn_down_exps.weight"),
    Rule("model.layers.{i}.mlp.shared_experts.gate_proj.weight", "blk.{i}.ffn_gate_shexp.weight"),
    Rule("model.layers.{i}.mlp.shared_experts.up_proj.weight", "blk.{i}.ffn_up_shexp.weight"),
    Rule("model.layers.{i}.mlp.shared_experts.down_proj.weight", "blk.{i}.ffn_down_shexp.weight"),
]
_FUSED_NAMES = [
    Rule(
        tuple(f"model.layers.{{i}}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        f"blk.{{i}}.attn_qkv.{kind}",
        JOINED,
    )
    for kind in ("weight", "bias")
] + [Rule("model.embed_positions.weight", "position_embd.weight")]


def _latent_names(config: TesseraConfig) -> list[Rule]:
    heads, unrotated = config.num_attention_heads, config.qk_nope_head_dim

    def split(ours: list[torch.Tensor]) -> list[torch.Tensor]:
        # [H (N + V), R] -> keys [H, R, N], values [H, V, R]: each is multiplied from its own side.
        keys_values = ours[0].unflatten(0, (heads, -1))
        return [keys_values[:, :unrotated].transpose(1, 2), keys_values[:, unrotated:]]

    def join(theirs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([theirs[0].transpose(1, 2), theirs[1]], dim=1).flatten(0, 1)]

    return [
        Rule("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
        Rule("model.layers.{i}.self_attn.q_a_proj.weight", "blk.{i}.attn_q_a.weight"),
        Rule("model.layers.{i}.self_attn.q_a_layernorm.weight", "blk.{i}.attn_q_a_norm.weight"),
        Rule("model.layers.{i}.self_attn.q_b_proj.weight", "blk.{i}.attn_q_b.weight"),
        Rule("model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight", "blk.{i}.attn_kv_a_mqa.weight"),
        Rule("model.layers.{i}.self_attn.kv_a_layernorm.weight", "blk.{i}.attn_kv_a_norm.weight"),
        Rule(
            "model.layers.{i}.self_attn.kv_b_proj.weight",
            ("blk.{i}.attn_k_b.weight", "blk.{i}.attn_v_b.weight"),
            Operation(split, join),
        ),
    ]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: `general.architecture`, and the prefix of its metadata.
        stated: fields of Tessera that the file states, with any value.
        fixed: fields that have one value in its code, where that is not Tessera's default.
        names: rules of tensors for a configuration.
        metadata: what the file states beside the sizes.
        neighbours: whether rotary pairs are (0, 1), (2, 3), ...; else (0, d/2), (1, d/2 + 1), ...
        rope_types: scalings of the rotation that its code has.
        obstacles: what stands in the way beyond fields by themselves, in sentences.
    """

    name: str
    stated: tuple[str, ...]
    names: Callable[[TesseraConfig], list[Rule]]
    metadata: Callable[[TesseraConfig], Metadata]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neighbours: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    obstacles: Callable[[TesseraConfig], list[str]] = lambda config: []

    def why_not(self, config: TesseraConfig) -> list[str]:
        """What keeps a model from being one of this architecture; nothing if it is."""
        plain = TesseraConfig(num_hidden_layers=config.num_hidden_layers)
        expected = {**architecture(plain), **self.fixed}
        reasons = []
        for name, value in architecture(config).items():
            if name in self.stated or name == "rope_parameters":
                continue
            there = expected.get(name, getattr(plain, name, None))
            if value != there:
                reasons.append(f"{name} is {_short(value)} (there: {_short(there)})")
        if "rope_parameters" in self.stated:
            reasons += _rope_obstacles(config, self)
        if config.num_hidden_layers > _MOST_LAYERS:
            reasons.append(f"num_hidden_layers is {config.num_hidden_layers} (there: at most {_MOST_LAYERS})")
        return reasons + self.obstacles(config)

    def describe(self, config: TesseraConfig) -> Metadata:
        """Metadata of a model: key without the architecture's prefix -> value."""
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            **self.metadata(config),
        }


def choose(config: TesseraConfig) -> Architecture:
    """The architecture that a model is written as.

    Raises:
        ValueError: if there is none, naming what stands in the way of the one that comes closest.
    """
    reasons = {each.name: each.why_not(config) for each in ARCHITECTURES}
    for each in ARCHITECTURES:
        if not reasons[each.name]:
            return each
    closest = min(ARCHITECTURES, key=lambda each: len(reasons[each.name]))
    raise ValueError(
        f"llama.cpp has no architecture for this model; in the closest, {closest.name}: "
        f"{'; '.join(reasons[closest.name])}"
    )


def prepare(config: TesseraConfig, tensors: Tensors) -> tuple[TesseraConfig, Tensors]:
    """The same model as llama.cpp can have it: no padding, rotary pairs in the order of its architecture.

    Raises:
        ValueError: if llama.cpp has no architecture for it.
    """
    config, tensors = cut_padding(config, tensors)
    if config.sliding_window is not None and config.sliding_window >= config.max_position_embeddings:
        config = copy.deepcopy(config)
        config.layer_types, config.sliding_window = ["full_attention"] * config.num_hidden_layers, None
    if config.position_embedding_type != "rope":
        choose(config)
        return config, tensors
    if choose(config).neighbours:
        return _pair_neighbours(config, tensors)
    return pair_halves(config, tensors)


def rope_factors(config: TesseraConfig) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies by, where a scaling is given so (Llama 3): [D / 2] in fp32."""
    if config.position_embedding_type != "rope" or config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents) / scaled


def _pair_neighbours(config: TesseraConfig, tensors: Tensors) -> tuple[TesseraConfig, Tensors]:
    """The reverse of `pair_halves`, for latent attention too."""
    if config.rope_interleave:
        return config, tensors
    config = copy.deepcopy(config)
    config.rope_interleave = True
    latent = config.attention_type == "latent"
    size, rotated = config.qk_head_dim, config.rotary_dim
    # Latent attention rotates the last channels of a head, the others the first.
    start = size - rotated if latent else 0

    def order(size: int, start: int) -> torch.Tensor:
        pairs = [
            start + channel
            for pair in zip(range(rotated // 2), range(rotated // 2, rotated), strict=True)
            for channel in pair
        ]
        return torch.tensor([*range(start), *pairs, *range(start + rotated, size)])

    def reorder(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(".kv_a_proj_with_mqa.weight"):
            return tensor[order(tensor.shape[0], tensor.shape[0] - rotated)]
        queries = (".self_attn.q_proj.", ".self_attn.q_b_proj.")
        keys = (".self_attn.k_proj.", ".self_attn.q_norm.", ".self_attn.k_norm.")
        if not any(part in name for part in (queries if latent else queries + keys)):
            return tensor
        return tensor.unflatten(0, (-1, size))[:, order(size, start)].flatten(0, 1)

    return config, Changed(tensors, reorder)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(set(value)) == 1:
        return f"all {value[0]}"
    return repr(value)


# ---- rotation ----


def _rope_obstacles(config: TesseraConfig, there: Architecture) -> list[str]:
    if config.position_embedding_type != "rope":
        return []
    rope = config.rope_parameters
    reasons = []
    if rope["rope_type"] not in there.rope_types:
        reasons.append(f"rope_type is {rope['rope_type']!r} (there: {', '.join(there.rope_types)})")
    if config.attention_type != "latent" and config.rotary_dim != config.head_dim:
        reasons.append(
            f"{config.rotary_dim} of a head's {config.head_dim} channels are rotated (there: all of them)"
        )
    if rope["rope_type"] == "yarn":
        for name, only in {"beta_fast": 32, "beta_slow": 1, "truncate": True}.items():
            if rope.get(name, only) != only:
                reasons.append(f"{name} of YaRN is {rope[name]} (there: {only})")
        if config.attention_type == "latent" and (
            not rope.get("mscale_all_dim")
            or rope.get("mscale") != rope["mscale_all_dim"]
            or rope.get("attention_factor") is not None
        ):
            reasons.append(
                f"YaRN's mscale and mscale_all_dim are {rope.get('mscale')} and {rope.get('mscale_all_dim')} "
                "(there: equal, and no attention_factor)"
            )
    return reasons


def _rotation(config: TesseraConfig) -> Metadata:
    rope = config.rope_parameters
    values: Metadata = {
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        if config.attention_type == "latent":
            # Read there as a tenth of it.
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
        else:
            _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
            # On top of what its YaRN has in any case.
            values["rope.scaling.attn_factor"] = factor / (0.1 * math.log(max(rope["factor"], 1.0)) + 1.0)
    return values


# ---- what each architecture states ----


def _attention(config: TesseraConfig) -> Metadata:
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_rotation(config),
    }


def _experts(config: TesseraConfig) -> Metadata:
    if "sparse" not in config.mlp_layer_types:
        return {}
    values: Metadata = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if config.topk_group < config.n_group:
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return values


def _llama(config: TesseraConfig) -> Metadata:
    # Experts have the dense layers' width there.
    sparse = "sparse" in config.mlp_layer_types
    width = {"feed_forward_length": config.moe_intermediate_size} if sparse else {}
    return {**_attention(config), **_experts(config), **width}


def _gpt2(config: TesseraConfig) -> Metadata:
    return {"attention.layer_norm_epsilon": config.rms_norm_eps}


def _latent(config: TesseraConfig) -> Metadata:
    sparse = "sparse" in config.mlp_layer_types
    return {
        # Keys and values are one latent head, which all query heads share.
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_rotation(config),
        "leading_dense_block_count": config.mlp_layer_types.count("dense"),
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_count": config.n_shared_experts if sparse else 0,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        # LLAMA_EXPERT_GATING_FUNC_TYPE_*
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[config.scoring_func],
        **_experts(config),
    }


def _all_sparse(config: TesseraConfig) -> list[str]:
    if "dense" in config.mlp_layer_types:
        return ["mlp_layer_types has dense layers (there: all sparse)"]
    return _too_many_experts(config)


def _too_many_experts(config: TesseraConfig) -> list[str]:
    count = config.n_routed_experts
    return [f"n_routed_experts is {count} (there: at most {_MOST_EXPERTS})"] if count > _MOST_EXPERTS else []


def _dense_or_all_sparse(config: TesseraConfig) -> list[str]:
    return _all_sparse(config) if "sparse" in config.mlp_layer_types else []


def _heads_fill_the_width(config: TesseraConfig) -> list[str]:
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        return []
    return [f"head_dim is {config.head_dim} (there: hidden_size / num_attention_heads)"]


def _equal_heads(config: TesseraConfig) -> list[str]:
    reasons = _heads_fill_the_width(config)
    if config.num_key_value_heads != config.num_attention_heads:
        reasons.append(
            f"num_key_value_heads is {config.num_key_value_heads} (there: {config.num_attention_heads})"
        )
    return reasons


def _latent_obstacles(config: TesseraConfig) -> list[str]:
    reasons = []
    kinds = config.mlp_layer_types
    if sorted(kinds) != kinds:  # "dense" comes before "sparse"
        reasons.append("mlp_layer_types has dense layers after sparse ones (there: the dense ones first)")
    if config.q_lora_rank and config.num_hidden_layers in _LITE_DEPTHS:
        reasons.append(
            f"q_lora_rank is {config.q_lora_rank} (there: none at a depth of {config.num_hidden_layers})"
        )
    if not config.qk_nope_head_dim:
        reasons.append("qk_nope_head_dim is 0 (there: at least 1)")
    if "sparse" not in kinds:
        return reasons
    if not config.n_shared_experts:
        reasons.append("n_shared_experts is 0 (there: at least 1)")
    if not config.router_correction_bias and 1 < config.n_group != config.topk_group:
        reasons.append(
            "groups of experts count as their best one without router_correction_bias (there: their best two)"
        )
    if config.topk_group < config.n_group and config.n_routed_experts < 2 * config.n_group:
        reasons.append(f"n_group is {config.n_group} (there: at least two experts in each)")
    return reasons + _too_many_experts(config)


_ROUTED_BY_SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": True, "qk_norm": "before_rope"}

# Of several that fit, the first.
ARCHITECTURES = (
    Architecture(
        "qwen2",
        (*_SIZES, *_HEADS),
        lambda config: _BASE_NAMES + _HEAD_NAMES + _DENSE_NAMES,
        _attention,
        fixed={"attention_bias": True},
        obstacles=_heads_fill_the_width,
    ),
    Architecture(
        "llama",
        (*_SIZES, *_HEADS, *_EXPERTS, "attention_bias", "attention_output_bias", "mlp_bias"),
        lambda config: _BASE_NAMES + _HEAD_NAMES + _DENSE_NAMES + _EXPERT_NAMES,
        _llama,
        fixed={"norm_topk_prob": True},
        neighbours=True,
        rope_types=("default", "linear", "yarn", "llama3"),
        obstacles=_dense_or_all_sparse,
    ),
    Architecture(
        "qwen3",
        (*_SIZES, *_HEADS, "attention_bias"),
        lambda config: _BASE_NAMES + _HEAD_NAMES + _DENSE_NAMES,
        _attention,
        fixed={"qk_norm": "before_rope"},
    ),
    Architecture(
        "qwen3moe",
        (*_SIZES, *_HEADS, *_EXPERTS),
        lambda config: _BASE_NAMES + _HEAD_NAMES + _EXPERT_NAMES,
        lambda config: {**_attention(config), **_experts(config)},
        fixed=_ROUTED_BY_SOFTMAX,
        obstacles=_all_sparse,
    ),
    Architecture(
        "gpt2",
        (*_SIZES, "num_key_value_heads", "head_dim"),
        lambda config: _BASE_NAMES + _FUSED_NAMES + _DENSE_NAMES,
        _gpt2,
        fixed={
            "position_embedding_type": "learned",
            "norm_type": "layer_norm",
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
            "hidden_act": "gelu_new",
        },
        obstacles=_equal_heads,
    ),
    Architecture(
        "deepseek2",
        (
            *_SIZES,
            *_HEADS,
            *_LATENT,
            *_EXPERTS,
            "n_shared_experts",
            "scoring_func",
            "n_group",
            "topk_group",
            "norm_topk_prob",
            "routed_scaling_factor",
            "router_correction_bias",
        ),
        lambda config: _BASE_NAMES + _latent_names(config) + _DENSE_NAMES + _EXPERT_NAMES,
        _latent,
        fixed={"attention_type": "latent"},
        neighbours=True,
        obstacles=_latent_obstacles,
    ),
)

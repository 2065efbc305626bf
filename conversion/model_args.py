"""The `ModelArgs` JSON of ByteGPT and DeepSeek-V3's inference release, as a `TesseraConfig` and back.

What belongs here: the correspondence of names between the two, and the defaults of the ByteGPT configuration
for keys that a file leaves out.
"""

import difflib
from typing import Any

from tessera.modeling.configuration_tessera import TesseraConfig

# ModelArgs name -> Tessera field, where the value passes as it is.
FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_seq_len": "max_position_embeddings",
}

# The rest of ModelArgs. What serves only their runtime (batch size, number formats) is read and dropped.
DEFAULTS = {
    "vocab_size": 256,
    "dim": 512,
    "inter_dim": 2048,
    "moe_inter_dim": 512,
    "n_layers": 12,
    "n_dense_layers": 1,
    "n_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "n_activated_experts": 4,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_seq_len": 4096,
    "original_seq_len": 1024,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "max_batch_size": 8,
    "dtype": "bf16",
    "scale_fmt": None,
}

# Of the numbers, those that may have a fraction.
_REAL_NUMBERS = {"route_scale", "rope_theta", "rope_factor", "beta_fast", "beta_slow", "mscale"}


def is_model_args(values: dict[str, Any]) -> bool:
    """Whether a configuration file speaks in ModelArgs names rather than Tessera's."""
    return "dim" in values or "n_layers" in values


def config_from_model_args(args: dict[str, Any], **overrides: Any) -> TesseraConfig:
    """Builds the configuration of the model that `ModelArgs` describes.

    The first `n_dense_layers` layers are dense and all others sparse, as in the release. YaRN is on where
    `max_seq_len` is longer than `original_seq_len`.

    Args:
        args: the JSON's content; keys left out have ByteGPT's values.
        overrides: Tessera fields laid over the result.

    Raises:
        ValueError: for a key that ModelArgs does not have, or sizes that do not fit together.
    """
    for name in args:
        if name not in DEFAULTS:
            close = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"ModelArgs has no '{name}'{hint}")
        _require_type(name, args[name])
    values = {**DEFAULTS, **args}
    fields = {field: values[name] for name, field in FIELDS.items()}
    if values["n_dense_layers"] < 0:
        raise ValueError(f"n_dense_layers must be at least 0, got {values['n_dense_layers']}")
    dense = min(values["n_dense_layers"], values["n_layers"])
    sparse = values["n_layers"] - dense
    if not sparse:
        unused = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
        fields.update(dict.fromkeys(unused, 0))
    rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    if values["max_seq_len"] > values["original_seq_len"]:
        rope = {
            "rope_type": "yarn",
            "rope_theta": values["rope_theta"],
            "factor": values["rope_factor"],
            "original_max_position_embeddings": values["original_seq_len"],
            "beta_fast": values["beta_fast"],
            "beta_slow": values["beta_slow"],
            # The same value twice: cosines and sines stay unscaled, the scores take its square.
            "mscale": values["mscale"],
            "mscale_all_dim": values["mscale"],
        }
    return TesseraConfig(
        **{
            **fields,
            "attention_type": "latent",
            "q_lora_rank": values["q_lora_rank"] or None,
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse,
            "norm_topk_prob": values["score_func"] == "sigmoid",
            # The release has the bias at the width of its largest model and nowhere else.
            "router_correction_bias": bool(sparse) and values["dim"] == 7168,
            "rope_parameters": rope,
            "rope_interleave": True,
            "initializer": "bytegpt",
            **overrides,
        }
    )


def model_args_from_config(config: TesseraConfig) -> dict[str, Any]:
    """The sizes of a model in ModelArgs names, for `params.json` of the native layout.

    For a model with latent attention whose dense layers come first, `config_from_model_args` gives the same
    model. Others get the names that there are, and those of Meta's releases (`n_kv_heads`, `norm_eps`).
    """
    args = {name: getattr(config, field) for name, field in FIELDS.items()}
    sparse = [kind == "sparse" for kind in config.mlp_layer_types]
    args["n_dense_layers"] = sparse.index(True) if any(sparse) else len(sparse)
    if config.attention_type == "latent":
        args["q_lora_rank"] = config.q_lora_rank or 0
    else:
        args |= {"n_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        args["norm_eps"] = config.rms_norm_eps
    if config.position_embedding_type == "rope":
        rope = config.rope_parameters
        args["rope_theta"] = rope["rope_theta"]
        # As long as the context: not extended.
        args["original_seq_len"] = config.max_position_embeddings
        if rope["rope_type"] == "yarn":
            args["original_seq_len"] = rope["original_max_position_embeddings"]
            args["rope_factor"] = rope["factor"]
            for name, key in (("beta_fast",) * 2, ("beta_slow",) * 2, ("mscale", "mscale_all_dim")):
                if rope.get(key) is not None:
                    args[name] = rope[key]
    return {name: value for name, value in args.items() if value is not None}


def _require_type(name: str, given: Any) -> None:
    default = DEFAULTS[name]
    if isinstance(default, str) or default is None:
        expected, fits = "a string", isinstance(given, str) or (default is None and given is None)
    elif name in _REAL_NUMBERS:
        expected, fits = "a number", isinstance(given, int | float) and not isinstance(given, bool)
    else:
        expected, fits = "a whole number", type(given) is int
    if not fits:
        raise ValueError(f"ModelArgs: {name} must be {expected}, got {given!r}")

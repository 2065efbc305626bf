"""The model families of transformers that a Tessera model can come from and go to.

What belongs here: for each family the names of its tensors and of its configuration, as tables that read the
same in both directions. Whether a configuration can leave is not a list of cases: it is translated out and
back, and the fields that come back changed are what stands in the way.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence

from .rules import JOINED, JOINED_TRANSPOSED, SAME, TRANSPOSED, UNSTACKED, UNSTACKED_PAIRS, Rule

# Fields that every family has under Tessera's own name.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_DECODER = (
    *_SHARED,
    "hidden_act",
    "intermediate_size",
    "rms_norm_eps",
    "attention_dropout",
    "rope_parameters",
)
_GROUPED = (*_DECODER, "num_key_value_heads")

# Fields that change how a model is trained or run, and none of its numbers.
_NO_ARCHITECTURE = {
    "use_cache",
    "attention_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "latent_attention_mode",
    "router_aux_loss_coef",
    "router_bias_update_speed",
    "output_router_logits",
    "train_mtp",
    "mtp_loss_coef",
    "initializer",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "auto_map",
}
_EXPERT_FIELDS = (
    "moe_intermediate_size",
    "scoring_func",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "router_correction_bias",
)


@dataclass(frozen=True)
class Family:
    """A model family: its configuration and its tensors.

    Attributes:
        model_type: transformers' name, and the name on the command line.
        architecture: the causal language model's class.
        fields: Tessera's field -> theirs, where the value passes.
        fixed: fields of Tessera that have one value in this family.
        required: fields of theirs that must have one value for Tessera to be the same model.
        rules: tensors.
        packed: rules for the other way in which the family's experts are stored.
        ignored: patterns of tensors that carry no weights, or none that a decoder uses.
        predicts_ahead: whether layers past the last one, for multi-token prediction, have a place.
        prefix: of the base model's tensors, which some checkpoints leave out.
        derive: further fields of Tessera from their configuration.
        derive_theirs: further fields of theirs from Tessera's configuration.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    rules: list[Rule]
    required: Mapping[str, Any] = field(default_factory=dict)
    packed: list[Rule] | None = None
    ignored: tuple[str, ...] = ()
    predicts_ahead: bool = False
    prefix: str = "model."
    derive: Callable[[Any], dict] = lambda theirs: {}
    derive_theirs: Callable[[TesseraConfig], dict] = lambda ours: {}

    def config_from(self, values: dict[str, Any]) -> TesseraConfig:
        """Tessera's configuration for one of theirs.

        Args:
            values: the content of their `config.json`; transformers' own class fills in what it leaves out.

        Raises:
            ValueError: if it describes something that a Tessera model cannot be.
        """
        if values.get("quantization_config"):
            raise ValueError("the checkpoint is quantized; only plain weights can be converted")
        try:
            theirs = type(AutoConfig.for_model(self.model_type)).from_dict(values)
            self._check_required(theirs)
            return TesseraConfig(**self._fields_from(theirs), dtype=theirs.dtype)
        except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            # The last two are how transformers says "no such dtype" and "no heads".
            raise ValueError(
                f"a {self.model_type} that Tessera cannot be: {first_sentence(error)}"
            ) from error

    def config_for(self, ours: TesseraConfig) -> PreTrainedConfig:
        """Their configuration for one of Tessera's.

        Raises:
            ValueError: naming the fields that this family has no place for.
        """
        values = {their_name: getattr(ours, name) for name, their_name in self.fields.items()}
        if "rope_parameters" in values:
            # Theirs has no such key; where it is not 1, it comes back as 1 below.
            values["rope_parameters"] = _without_share(ours.rope_parameters)
        values |= self.derive_theirs(ours)
        try:
            theirs = AutoConfig.for_model(self.model_type, **values)
            back = TesseraConfig(**self._fields_from(theirs))
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise ValueError(f"the model cannot be a {self.model_type}: {first_sentence(error)}") from error
        mine, others = architecture(ours), architecture(back)
        obstacles = [
            f"{name} is {_short(mine[name])} (there: {_short(others[name])})"
            # A field that one side has no use for says nothing that another does not say.
            for name in sorted(mine.keys() & others.keys())
            if mine[name] != others[name]
        ]
        if obstacles:
            raise ValueError(f"the model cannot be a {self.model_type}: {'; '.join(obstacles)}")
        theirs.architectures = [self.architecture]
        return theirs

    def rules_for(self, names: Mapping) -> list[Rule]:
        """The rules for a checkpoint with these names."""
        packed = self.packed is not None and any(name.endswith(".experts.gate_up_proj") for name in names)
        return self.packed if packed else self.rules

    def _fields_from(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        fields = {name: getattr(theirs, their_name) for name, their_name in self.fields.items()}
        if fields.get("rope_parameters"):
            # Their attention rotates whole heads whatever the share is.
            fields["rope_parameters"] = _without_share(fields["rope_parameters"])
        return {**self.fixed, **fields, **self.derive(theirs)}

    def _check_required(self, theirs: PreTrainedConfig) -> None:
        for name, expected in self.required.items():
            given = getattr(theirs, name, expected)
            if given != expected:
                raise ValueError(f"{name} must be {expected!r}, got {given!r}")


def architecture(config: TesseraConfig) -> dict[str, Any]:
    """The fields that decide which numbers come out of a model; those without effect are left out."""
    values = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name in TesseraConfig.__annotations__ and f.name not in _NO_ARCHITECTURE
    }
    ahead = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
    values["mtp_layer_types"] = [config.attention_kind(i) for i in ahead]
    values["mtp_mlp_layer_types"] = [config.feed_forward_kind(i) for i in ahead]
    unused = []
    if "sliding_attention" not in config.layer_types:
        unused.append("sliding_window")
    if "sparse" not in config.mlp_layer_types:
        unused += _EXPERT_FIELDS
    elif "dense" not in config.mlp_layer_types:
        unused.append("intermediate_size")
    if config.position_embedding_type != "rope":
        unused += ["rope_parameters", "rope_interleave", "rope_reverse"]
    else:
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        values["rope_parameters"] = _without_share(config.rope_parameters)
        if config.attention_type != "latent" and share != 1.0:
            values["rope_parameters"]["partial_rotary_factor"] = share
    if config.value_embedding_interval is None:
        unused.append("value_gate_channels")
    if not config.smear:
        unused.append("smear_gate_channels")
    return {name: value for name, value in values.items() if name not in unused}


def _without_share(rope: dict | None) -> dict | None:
    return None if rope is None else {k: v for k, v in rope.items() if k != "partial_rotary_factor"}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(set(value)) == 1:
        return f"all {value[0]}"
    return repr(value)


def _same_names(*names: str, **others: str) -> dict[str, str]:
    return {**{name: name for name in names}, **others}


def _window(theirs: PreTrainedConfig) -> dict:
    """Mistral's window holds for every layer."""
    kind = "full_attention" if theirs.sliding_window is None else "sliding_attention"
    return {"layer_types": [kind] * theirs.num_hidden_layers, "sliding_window": theirs.sliding_window}


def _every_layer_slides(ours: TesseraConfig) -> dict:
    slides = set(ours.layer_types) == {"sliding_attention"}
    return {"sliding_window": ours.sliding_window if slides else None}


def _windows_by_layer(ours: TesseraConfig) -> dict:
    slides = "sliding_attention" in ours.layer_types
    return {
        "use_sliding_window": slides,
        "sliding_window": ours.sliding_window if slides else None,
        "layer_types": list(ours.layer_types),
    }


def _inner_width(theirs: PreTrainedConfig) -> dict:
    return {"intermediate_size": 4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner}


def _leading_dense(theirs: PreTrainedConfig) -> dict:
    if not theirs.n_shared_experts:
        raise ValueError("n_shared_experts must be at least 1")
    depth = theirs.num_hidden_layers
    dense = min(theirs.first_k_dense_replace, depth)
    experts = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    # Layers that predict further ahead always have experts, so a model without has none of these.
    ahead = theirs.num_mtp_layers if dense < depth else 0
    return {
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (depth - dense),
        "num_mtp_layers": ahead,
        "mtp_mlp_layer_types": ["sparse"] * ahead or None,
        **({} if dense < depth else dict.fromkeys(experts, 0) | {"router_correction_bias": False}),
    }


def _count_leading_dense(ours: TesseraConfig) -> dict:
    dense = [kind == "dense" for kind in ours.mlp_layer_types]
    leading = dense.index(False) if False in dense else len(dense)
    values = {
        "first_k_dense_replace": leading,
        "num_key_value_heads": ours.num_attention_heads,
        "num_mtp_layers": ours.num_mtp_layers,
    }
    if all(dense):
        # The family has these in any case; no layer looks at them.
        values |= dict.fromkeys(("n_shared_experts", "n_routed_experts", "num_experts_per_tok"), 1)
        values["moe_intermediate_size"] = 1
    return values


# Tessera took its names from here.
_LLAMA_NAMES = [Rule("{rest}", "{rest}")]

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    fields=_same_names(
        *_GROUPED, "head_dim", "attention_bias", "mlp_bias", attention_output_bias="attention_bias"
    ),
    fixed={},
    rules=_LLAMA_NAMES,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    fields=_same_names(*_GROUPED, "head_dim"),
    fixed={},
    rules=_LLAMA_NAMES,
    ignored=(r".*\.rotary_emb\.inv_freq",),
    derive=_window,
    derive_theirs=_every_layer_slides,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    fields=_same_names(
        *_GROUPED,
        "head_dim",
        "attention_bias",
        "layer_types",
        "sliding_window",
        attention_output_bias="attention_bias",
    ),
    fixed={"qk_norm": "before_rope"},
    rules=_LLAMA_NAMES,
    derive_theirs=_windows_by_layer,
)

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    fields={
        **{name: name for name in _SHARED},
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
        "resid_pdrop": "resid_pdrop",
        "embd_pdrop": "embd_pdrop",
    },
    fixed={
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "attention_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "initializer": "gpt2",
    },
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    # Its linear layers are stored as [in, out].
    rules=[
        Rule("model.embed_tokens.weight", "transformer.wte.weight"),
        Rule("model.embed_positions.weight", "transformer.wpe.weight"),
        Rule("model.layers.{i}.input_layernorm.{p}", "transformer.h.{i}.ln_1.{p}"),
        Rule("model.layers.{i}.post_attention_layernorm.{p}", "transformer.h.{i}.ln_2.{p}"),
        Rule(
            tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
            "transformer.h.{i}.attn.c_attn.weight",
            JOINED_TRANSPOSED,
        ),
        Rule(
            tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
            "transformer.h.{i}.attn.c_attn.bias",
            JOINED,
        ),
        Rule("model.layers.{i}.self_attn.o_proj.weight", "transformer.h.{i}.attn.c_proj.weight", TRANSPOSED),
        Rule("model.layers.{i}.self_attn.o_proj.bias", "transformer.h.{i}.attn.c_proj.bias"),
        Rule("model.layers.{i}.mlp.up_proj.weight", "transformer.h.{i}.mlp.c_fc.weight", TRANSPOSED),
        Rule("model.layers.{i}.mlp.up_proj.bias", "transformer.h.{i}.mlp.c_fc.bias"),
        Rule("model.layers.{i}.mlp.down_proj.weight", "transformer.h.{i}.mlp.c_proj.weight", TRANSPOSED),
        Rule("model.layers.{i}.mlp.down_proj.bias", "transformer.h.{i}.mlp.c_proj.bias"),
        Rule("model.norm.{p}", "transformer.ln_f.{p}"),
        Rule("lm_head.weight", "lm_head.weight"),
    ],
    # Masks, which older checkpoints hold as tensors.
    ignored=(r".*\.attn\.(masked_)?bias",),
    prefix="transformer.",
    derive=_inner_width,
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    fields=_same_names(
        *_DECODER,
        "rope_interleave",
        "attention_bias",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        attention_output_bias="attention_bias",
    ),
    fixed={"attention_type": "latent", "scoring_func": "sigmoid", "router_correction_bias": True},
    # Two of its norms have this epsilon whatever the configuration says.
    required={
        "rms_norm_eps": 1e-6,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    # One tensor an expert, as in the releases; transformers stacks them when it loads.
    rules=[
        Rule(
            "model.layers.{i}.mlp.experts.gate_up_proj",
            tuple(f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up")),
            UNSTACKED_PAIRS,
        ),
        Rule(
            "model.layers.{i}.mlp.experts.down_proj",
            "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
            UNSTACKED,
        ),
        *_LLAMA_NAMES,
    ],
    packed=_LLAMA_NAMES,
    predicts_ahead=True,
    derive=_leading_dense,
    derive_theirs=_count_leading_dense,
)

NANOCHAT = Family(
    "nanochat",
    "NanoChatForCausalLM",
    fields=_same_names(
        *_GROUPED, "attention_bias", "final_logit_softcapping", attention_output_bias="attention_bias"
    ),
    fixed={
        "rope_reverse": True,
        "qk_norm": "after_rope",
        "norm_weight": False,
        "embedding_norm": True,
        "gated_mlp": False,
        "initializer": "nanochat",
    },
    rules=[
        Rule("model.layers.{i}.mlp.up_proj.weight", "model.layers.{i}.mlp.fc1.weight", SAME),
        Rule("model.layers.{i}.mlp.down_proj.weight", "model.layers.{i}.mlp.fc2.weight", SAME),
        *_LLAMA_NAMES,
    ],
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN3, GPT2, DEEPSEEK_V3, NANOCHAT)}

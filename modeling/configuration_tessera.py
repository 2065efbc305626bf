"""Configuration of Tessera: every tile that a model can be laid from, and which tiles fit together.

One `TesseraConfig` expresses all dialects (bytegpt, llama, nanochat, verse, gpt) and their mixtures. A
dialect is a preset, a JSON file in `tessera.configs`, and nothing in the code asks for its name. Field names
follow Hugging Face where it has one. What belongs here: a field, its default, and how unset fields are
derived. What fits together is in `config_rules.py`.
"""

import copy
import difflib
import importlib
import os
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_rules import ATTENTION_LETTERS, FEED_FORWARD_LETTERS, MTP_PATTERNS, ConfigRules
from .parallel_plans import (
    expert_parallel_plan,
    pipeline_plan,
    sharded_data_plan,
    tensor_parallel_plan,
)
from .rope_parameters import require_type_and_length, share_that_truncates_to

# Keyword arguments that transformers itself passes to a configuration, beside the fields.
_LIBRARY_KWARGS = {
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "tie_last_hidden_states",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
}


@strict
class TesseraConfig(ConfigRules, PreTrainedConfig):
    r"""Architecture of a Tessera decoder.

    Args:
        vocab_size (`int`): token ids, and the width of the logits.
        padded_vocab_size (`int`, *optional*): rows of the embedding and the head; columns past `vocab_size`
            are cut from the logits. Defaults to `vocab_size`.
        hidden_size (`int`): width of the residual stream.
        num_hidden_layers (`int`): decoder layers.
        max_position_embeddings (`int`): longest context in tokens; rows of the table when positions are
            learned.
        attention_type (`"multi_head"` or `"latent"`): multi-head / grouped-query attention, or multi-head
            latent attention (DeepSeek-V2, section 2.1).
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*), head_dim (`int`, *optional*):
            query heads, key/value heads (default: as many), size of a head (default: `hidden_size /
            num_attention_heads`).
        attention_bias (`bool`), attention_output_bias (`bool`, *optional*): biases of q, k, v and of the
            output projection (default: as `attention_bias`).
        attention_dropout (`float`): dropout of attention probabilities.
        attn_logit_softcapping (`float`, *optional*): scores become `cap * tanh(scores / cap)`.
        qk_norm (`"before_rope"` or `"after_rope"`, *optional*): RMS norm of each query and key head.
        qk_norm_scale (`float`): factor on queries and keys after their norm (nanochat: 1.2).
        layer_types (`list[str]` or letters, *optional*): `full_attention` or `sliding_attention` for each
            layer; or a pattern of `L` and `S` tiled over the depth, whose last layer is full wherever the
            pattern has an `L`.
        sliding_window (`int`, *optional*): tokens that a sliding layer sees, the current one included.
        q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim (`int`, *optional*): sizes
            of latent attention.
        latent_attention_mode (`"auto"`, `"naive"` or `"absorb"`): expand the latent to keys and values,
            attend in latent space, or choose for each call by cost.
        position_embedding_type (`"rope"`, `"learned"` or `"none"`).
        rope_parameters (`dict`, *optional*): Hugging Face's rotary parameters: `rope_type` (default, linear,
            dynamic, yarn, llama3), `rope_theta`, `factor`, ...
        rope_interleave (`bool`): pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        rope_reverse (`bool`): rotate by minus theta, as nanochat does.
        norm_type (`"rms_norm"` or `"layer_norm"`), norm_weight (`bool`), rms_norm_eps (`float`): every norm
            of the model; `norm_weight=False` gives RMS norms without weight. The epsilon serves layer norms
            too.
        embedding_norm (`bool`): norm straight after the embedding.
        hidden_act (`str`), gated_mlp (`bool`), intermediate_size (`int`), mlp_bias (`bool`): the dense
            feed-forward; silu and gated is SwiGLU.
        mlp_layer_types (`list[str]` or letters, *optional*): `dense` or `sparse` for each layer; or a pattern
            of `D` and `S` tiled over the depth.
        n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size (`int`): the mixture of
            experts.
        scoring_func (`"softmax"` or `"sigmoid"`): how router logits become scores.
        n_group, topk_group (`int`): experts are chosen from the best `topk_group` of `n_group` groups.
        norm_topk_prob (`bool`), routed_scaling_factor (`float`): normalise the chosen scores; scale them.
        router_correction_bias (`bool`): a bias on the scores that only the choice sees (DeepSeek-V3).
        router_aux_loss_coef (`float`), output_router_logits (`bool`): weight of the load-balancing loss.
        router_bias_update_speed (`float`): what `router_correction_bias` moves by after each optimizer step,
            towards an even load (DeepSeek-V3, section 2.1.2; 0.001 there). 0 leaves it alone.
        num_mtp_layers (`int`): layers after the last one that predict further tokens (DeepSeek-V3, section
            2.2); `num_nextn_predict_layers` is another name. A checkpoint has them; `generate(use_mtp=True)`
            drafts with them.
        mtp_layer_types, mtp_mlp_layer_types (`list[str]` or letters, *optional*): their kinds, as in
            `layer_types` and `mlp_layer_types`; default: those of the last layer.
        train_mtp (`bool`): hold these layers in memory and train them. Never saved as True: who loads the
            model to go on training says so again.
        mtp_loss_coef (`float`): weight of the mean of their losses (DeepSeek-V3: 0.3, later 0.1).
        value_embedding_interval (`int`, *optional*), value_gate_channels (`int`): every n-th layer, counted
            back from the last, adds a gated embedding of the token to its values (nanochat).
        residual_scalars (`bool`): each layer starts from `r * x + z * x0`, with `x0` the embedded token
            (nanochat).
        smear (`bool`), smear_gate_channels (`int`): mix the previous token's embedding into each token
            (nanochat).
        backout (`bool`): subtract a learned share of the middle residual before the last norm (nanochat).
        final_logit_softcapping (`float`, *optional*): logits become `cap * tanh(logits / cap)`, in fp32.
        tie_word_embeddings (`bool`): the head is the embedding.
        embd_pdrop, resid_pdrop (`float`): dropout of embeddings and of each branch that joins the residual
            stream.
        initializer (`"normal"`, `"gpt2"`, `"bytegpt"` or `"nanochat"`), initializer_range (`float`): see
            `weight_init.py`.
        converted_from (`dict`, *optional*): for a model that conversion brought from another family: its
            `model_type`, the `fields` of its configuration that no tile needs, and the tensors that it had
            `left_out` of those of its family. Conversion back there heeds them; nothing else reads them.

    Raises:
        ValueError: for an unknown field or a combination that cannot work.
        StrictDataclassError: for a value of another type.
    """

    model_type = "tessera"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The names under which transformers and TRL look for the number of experts, and DeepSeek's for the layers
    # that predict further ahead.
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_nextn_predict_layers": "num_mtp_layers",
    }

    vocab_size: int = 256
    padded_vocab_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 8
    max_position_embeddings: int = 2048
    use_cache: bool = True

    attention_type: Literal["multi_head", "latent"] = "multi_head"
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    attn_logit_softcapping: float | int | None = None
    qk_norm: Literal["before_rope", "after_rope"] | None = None
    qk_norm_scale: float | int = 1.0
    layer_types: list[str] | str | None = None
    sliding_window: int | None = None

    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    latent_attention_mode: Literal["auto", "naive", "absorb"] = "auto"

    position_embedding_type: Literal["rope", "learned", "none"] = "rope"
    rope_parameters: dict | None = None
    rope_interleave: bool = False
    rope_reverse: bool = False

    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_weight: bool = True
    rms_norm_eps: float = 1e-6
    embedding_norm: bool = False

    hidden_act: str = "silu"
    gated_mlp: bool = True
    intermediate_size: int = 1408
    mlp_bias: bool = False

    mlp_layer_types: list[str] | str | None = None
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    router_correction_bias: bool = False
    router_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    router_bias_update_speed: float | int = 0.0

    num_mtp_layers: int = 0
    mtp_layer_types: list[str] | str | None = None
    mtp_mlp_layer_types: list[str] | str | None = None
    train_mtp: bool = False
    mtp_loss_coef: float | int = 0.3

    value_embedding_interval: int | None = None
    value_gate_channels: int = 12
    residual_scalars: bool = False
    smear: bool = False
    smear_gate_channels: int = 24
    backout: bool = False

    final_logit_softcapping: float | int | None = None
    tie_word_embeddings: bool = False
    embd_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    initializer: Literal["normal", "gpt2", "bytegpt", "nanochat"] = "normal"
    initializer_range: float = 0.02

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # A real field: TRL reads it from every configuration, and saving fills it.
    auto_map: dict = field(default_factory=dict)
    converted_from: dict | None = None
    # By this transformers knows that our code must be saved with the configuration.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    def __post_init__(self, **kwargs):
        self._take_aliases(kwargs)
        self._refuse_unknown_fields(kwargs)
        self._require_sizes()

        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        self.layer_types = _expand_pattern(
            "layer_types", self.layer_types, ATTENTION_LETTERS, self.num_hidden_layers, last="L"
        )
        self.mlp_layer_types = _expand_pattern(
            "mlp_layer_types", self.mlp_layer_types, FEED_FORWARD_LETTERS, self.num_hidden_layers
        )
        for name, letters in MTP_PATTERNS.items():
            if isinstance(getattr(self, name), str):
                setattr(self, name, _expand_pattern(name, getattr(self, name), letters, self.num_mtp_layers))
        # Without experts a coefficient would make TRL look for router logits that do not exist.
        if not self.n_routed_experts:
            self.router_aux_loss_coef = 0.0
            self.output_router_logits = False

        self.rope_parameters = copy.deepcopy(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        nested = [key for key in self.rope_parameters if key in ATTENTION_LETTERS.values()]
        if nested:
            raise ValueError(
                f"rope_parameters holds for all layers alike, and cannot be given by layer type ({nested[0]})"
            )
        require_type_and_length(self.rope_parameters)
        self._validate_heads()
        if self.attention_type == "latent":
            # The head as transformers' paged cache sees it, of which the last part is rotated.
            self.head_dim = self.qk_head_dim
            self.rope_parameters["partial_rotary_factor"] = share_that_truncates_to(
                self.qk_rope_head_dim, self.head_dim
            )
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.ignore_keys_at_rope_validation = {"partial_rotary_factor"}

        super().__post_init__(**kwargs)
        self.validate_architecture()

    def __setattr__(self, name: str, value: Any) -> None:
        padded_to = self.__dict__.get("padded_vocab_size")
        unpadded = padded_to is not None and padded_to == self.__dict__.get("vocab_size")
        super().__setattr__(name, value)
        if name == "vocab_size" and unpadded:
            self.padded_vocab_size = value

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary.

        An attribute that some library has set on the configuration is no field and stays behind: with it, a
        saved configuration would be refused when loaded.
        """
        return {name: value for name, value in super().to_dict().items() if self._takes(name)}

    # ---- derived sizes ----

    @property
    def qk_head_dim(self) -> int:
        """Size of a query and key head; for latent attention the unrotated and the rotated part."""
        if self.attention_type == "latent":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        if self.attention_type == "latent":
            return self.qk_rope_head_dim
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def has_value_embedding(self, layer_idx: int) -> bool:
        """Whether a layer adds value embeddings: every n-th layer, counted back from the last."""
        interval, before_last = self.value_embedding_interval, self.num_hidden_layers - 1 - layer_idx
        return interval is not None and before_last >= 0 and before_last % interval == 0

    def attention_kind(self, layer_idx: int) -> str:
        """`full_attention` or `sliding_attention`; layers past the last one predict further tokens."""
        return self._kind(layer_idx, self.layer_types, self.mtp_layer_types)

    def feed_forward_kind(self, layer_idx: int) -> str:
        """`dense` or `sparse`; layers past the last one predict further tokens."""
        return self._kind(layer_idx, self.mlp_layer_types, self.mtp_mlp_layer_types)

    def _kind(self, layer_idx: int, kinds: list[str], ahead: list[str] | None) -> str:
        if layer_idx < self.num_hidden_layers:
            return kinds[layer_idx]
        return kinds[-1] if ahead is None else ahead[layer_idx - self.num_hidden_layers]

    def get_mtp_config(self) -> "TesseraConfig":
        """The configuration of the layers that predict further tokens, counted from 0: for transformers.

        They are plain layers: without nanochat's value embeddings and residual scalars.
        """
        ahead = range(self.num_hidden_layers, self.num_hidden_layers + self.num_mtp_layers)
        config = copy.deepcopy(self)
        config.layer_types = [self.attention_kind(i) for i in ahead]
        config.mlp_layer_types = [self.feed_forward_kind(i) for i in ahead]
        config.num_hidden_layers = self.num_mtp_layers
        config.value_embedding_interval = None
        config.residual_scalars = config.smear = config.backout = False
        # Where transformers cuts the rows of the head that are no tokens.
        config.unpadded_vocab_size = self.vocab_size
        return config

    # ---- plans for transformers' distributed engine; see `parallel_plans.py` ----

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Styles of tensor parallelism by module."""
        return tensor_parallel_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        # Some versions of transformers write the plan of a tied model back, with the rule of the embedding.
        if plan != self.base_model_tp_plan:
            raise ValueError(
                "base_model_tp_plan follows from the other fields; pass a plan of your own as tp_plan in a "
                "DistributedConfig"
            )

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """Styles of expert parallelism by module; None without experts."""
        return expert_parallel_plan(self)

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """Inputs and outputs of the modules that pipeline stages are cut between; None where none can be."""
        return pipeline_plan(self)

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """Modules whose weights FSDP gathers together."""
        return sharded_data_plan(self)

    # ---- names ----

    def _take_aliases(self, kwargs: dict[str, Any]) -> None:
        for alias in self.attribute_map.keys() & kwargs.keys():
            name, value = self.attribute_map[alias], kwargs.pop(alias)
            if getattr(self, name) not in (value, type(self).__dataclass_fields__[name].default):
                raise ValueError(
                    f"{alias} is another name of {name}: {value} and {getattr(self, name)} differ"
                )
            setattr(self, name, value)

    def _refuse_unknown_fields(self, kwargs: dict[str, Any]) -> None:
        model_type = kwargs.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ValueError(f"this configuration is of model type '{model_type}', not '{self.model_type}'")
        for name in ("dtype", "torch_dtype"):
            _require_dtype(name, self.dtype if name == "dtype" else kwargs.get(name))
        names = sorted({f.name for f in fields(self)} | set(self.attribute_map))
        for name in kwargs:
            if self._takes(name):
                continue
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"TesseraConfig has no field '{name}'{hint}")

    def _takes(self, name: str) -> bool:
        """Whether a configuration can be built with this keyword: a field, or what the library passes."""
        is_field = name in self.__dataclass_fields__ or name in _LIBRARY_KWARGS or name.startswith("_")
        return is_field or getattr(getattr(type(self), name, None), "fset", None) is not None

    # ---- saving ----

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `config.json` and beside it the code of all models, which its `auto_map` names.

        Models, trainers and `push_to_hub` come through here as well: whatever is saved can be loaded with
        `trust_remote_code=True` elsewhere, and where Tessera is installed needs neither flag nor code.

        Args:
            save_directory: made if it is not there.
            push_to_hub: whether to send it to the Hub as well.
            kwargs: for the base class, such as `repo_id` and `token` for the Hub.
        """
        # Here and not at the top, where it would be a circle. See that file for what this line does unseen.
        from .auto_map import complete

        self.validate()  # before anything is written; the base class does so after our code
        self.auto_map = complete(self.auto_map)
        super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)

    # ---- presets ----

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TesseraConfig":
        """Builds the configuration of a preset.

        Args:
            name: a file of `configs/models/` without its ending, or `<stem>-d<depth>` where `<stem>-d12` is
                such a file: the depth rule then gives the sizes.
            overrides: fields to change; `depth=N` applies the depth rule to any preset with multi-head
                attention.

        Raises:
            ValueError: for an unknown preset or field, or sizes that do not fit together.
            StrictDataclassError: for a value of another type.
        """
        try:
            # By name: this file travels to the Hub, where the package may be missing.
            presets = importlib.import_module("tessera.configs.presets")
        except ModuleNotFoundError:
            raise ValueError("presets come with the tessera package, which is not installed") from None
        depth = overrides.pop("depth", None)
        values = presets.read_preset(name)
        if depth is not None:
            values = presets.scale_to_depth(values, depth)
        if "vocab_size" in overrides:
            # The padding is that of the preset's own vocabulary.
            values.pop("padded_vocab_size", None)
        return cls(**{**values, **overrides})


def _require_dtype(name: str, given: Any) -> None:
    if isinstance(given, str):
        import torch

        if not isinstance(getattr(torch, given, None), torch.dtype):
            raise ValueError(f"{name} must name a dtype of torch such as 'bfloat16', got '{given}'")


def _expand_pattern(
    name: str, given: list[str] | str | None, letters: dict[str, str], depth: int, last: str | None = None
) -> list[str]:
    """Spells a pattern of letters out over the layers; a list stays as it is."""
    if given is None:
        return ["full_attention" if last else "dense"] * depth
    if not isinstance(given, str):
        return list(given)
    if not given or set(given) - set(letters):
        meaning = ", ".join(f"{letter} ({kind})" for letter, kind in letters.items())
        raise ValueError(f"{name} as a pattern is made of the letters {meaning}; got '{given}'")
    kinds = [given[i % len(given)] for i in range(depth)]
    if last is not None and last in given:
        kinds[-1] = last
    return [letters[kind] for kind in kinds]

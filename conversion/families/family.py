"""What a family of transformers is to conversion: its configuration and its tensors, told as tables.

What belongs here: the machinery that all families share. The tables themselves are in the rooms beside this
file, one for each kin of models. Whether a configuration can leave is not a list of cases: it is translated
out and back, and the fields that come back changed are what stands in the way. What a family's configuration
says and a Tessera model has no use for is kept in `TesseraConfig.converted_from`, and said again on the way
back.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence

from ..rules import Rule, repeated

# Fields that every family has under Tessera's own name.
SHARED = (
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
DECODER = (
    *SHARED,
    "hidden_act",
    "intermediate_size",
    "rms_norm_eps",
    "attention_dropout",
    "rope_parameters",
)
GROUPED = (*DECODER, "num_key_value_heads")
# What a configuration says about its experts where there are some.
EXPERT_COUNTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")

# Tessera took most of its names from Llama.
LLAMA_NAMES = [Rule("{rest}", "{rest}")]
# Frequencies, which older checkpoints hold as tensors.
FREQUENCIES = (r".*\.rotary_emb\.inv_freq",)

# Fields that change how a model is trained or run, or say where it is from, and none of its numbers.
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
    "converted_from",
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
_PREDICTION_FIELDS = ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types")
# Said anew for each checkpoint. Remote code does not come along, so neither does the word where it is.
_NEVER_KEPT = {
    "transformers_version",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How transformers says that a configuration does not fit; the last two are "no such dtype" and "no heads".
_MISFITS = (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Family:
    """A model family: its configuration and its tensors.

    Attributes:
        model_type: transformers' name, and the name on the command line.
        architecture: the causal language model's class.
        fields: Tessera's field -> theirs, where the value passes.
        fixed: fields of Tessera that have one value in this family.
        required: fields of theirs -> the values with which Tessera is the same model.
        rules: tensors.
        packed: rules for the other way in which the family's experts are stored.
        ignored: patterns of tensors that carry no weights, or none that a decoder uses.
        predicts_ahead: whether layers past the last one, for multi-token prediction, have a place.
        repeated: tensor of Tessera -> its copy in each of these layers, in the family's releases.
        prefix: of the base model's tensors, which some checkpoints leave out.
        derive: further fields of Tessera from their configuration.
        derive_theirs: further fields of theirs from Tessera's configuration.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    rules: list[Rule]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple] = field(default_factory=dict)
    packed: list[Rule] | None = None
    ignored: tuple[str, ...] = ()
    predicts_ahead: bool = False
    repeated: Mapping[str, str] = field(default_factory=dict)
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
            ours = TesseraConfig(**self._fields_from(theirs), dtype=theirs.dtype)
            self._remember(theirs, ours)
        except _MISFITS as error:
            raise ValueError(
                f"a {self.model_type} that Tessera cannot be: {first_sentence(error)}"
            ) from error
        return ours

    def leave_predictions_out(self, ours: TesseraConfig) -> None:
        """Takes the layers for multi-token prediction from a configuration whose checkpoint lacks them."""
        claimed, ours.num_mtp_layers = ours.num_mtp_layers, 0
        ours.mtp_layer_types = ours.mtp_mlp_layer_types = None
        key = self._canonical({"num_mtp_layers": claimed})
        origin = ours.converted_from or {"model_type": self.model_type}
        ours.converted_from = {**origin, "fields": {**origin.get("fields", {}), **key}}

    def leave_copies_out(self, ours: TesseraConfig, missing: list[str]) -> None:
        """Notes that a checkpoint does without copies that the family's releases have (see `repeated`)."""
        origin = ours.converted_from or {"model_type": self.model_type}
        ours.converted_from = {**origin, "left_out": missing}

    def config_for(self, ours: TesseraConfig) -> PreTrainedConfig:
        """Their configuration for one of Tessera's.

        Raises:
            ValueError: naming the fields that this family has no place for.
        """
        values = self._values_for(ours)
        mine = architecture(ours)
        # Where theirs cannot even be built, these say why.
        differing = _obstacles(mine, self.fixed)
        try:
            theirs = AutoConfig.for_model(self.model_type, **values)
            self._check_required(theirs)
            back = TesseraConfig(**self._fields_from(theirs))
            differing = _obstacles(mine, architecture(back))
        except _MISFITS as error:
            reasons = "; ".join(differing) or first_sentence(error)
            raise ValueError(f"the model cannot be a {self.model_type}: {reasons}") from error
        if differing:
            raise ValueError(f"the model cannot be a {self.model_type}: {'; '.join(differing)}")
        told = self._origin_of(ours).get("fields") or {}
        # The configuration may be another's, who says what is never kept here.
        if kept := {key: value for key, value in told.items() if key not in _NEVER_KEPT}:
            theirs = self._say_again(kept, values, back) or theirs
        theirs.architectures = [self.architecture]
        return theirs

    def rules_for(self, names: Iterable[str]) -> list[Rule]:
        """The rules by which a checkpoint with these names is read."""
        packed = self.packed is not None and any(name.endswith(".experts.gate_up_proj") for name in names)
        return self.packed if packed else self.rules

    def rules_to_write(self, ours: TesseraConfig) -> list[Rule]:
        """The rules by which a model is written: as the family's releases are.

        With layers for multi-token prediction go the copies that these have of the embedding and the head,
        save where the checkpoint that the model came from did without.
        """
        ahead = range(ours.num_hidden_layers, ours.num_hidden_layers + ours.num_mtp_layers)
        left_out = self._origin_of(ours).get("left_out", [])
        copies: dict[str, list[str]] = {}
        for name, pattern in self.repeated.items():
            if ahead and pattern not in left_out:
                holder = holder_of(name, ours)
                copies.setdefault(holder, [holder]).extend(pattern.format(i=i) for i in ahead)
        rules = [Rule(name, tuple(names), repeated(len(names))) for name, names in copies.items()]
        return [*rules, *self.rules]

    def _fields_from(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        if getattr(theirs, "is_heterogeneous", False):
            raise ValueError("per_layer_config: the layers of a Tessera model have one shape")
        fields = {name: getattr(theirs, their_name) for name, their_name in self.fields.items()}
        if fields.get("rope_parameters"):
            # Their attention rotates whole heads whatever the share is.
            fields["rope_parameters"] = _without_share(fields["rope_parameters"])
        if fields.get("attention_dropout", 0.0) is None:
            fields["attention_dropout"] = 0.0
        return {**self.fixed, **fields, **self.derive(theirs)}

    def _values_for(self, ours: TesseraConfig) -> dict[str, Any]:
        values = {their_name: getattr(ours, name) for name, their_name in self.fields.items()}
        if "rope_parameters" in values:
            # Theirs has no such key; where it is not 1, it comes back as 1.
            values["rope_parameters"] = _without_share(ours.rope_parameters)
        return values | self.derive_theirs(ours)

    def _check_required(self, theirs: PreTrainedConfig) -> None:
        for name, allowed in self.required.items():
            given = getattr(theirs, name, allowed[0])
            if given not in allowed:
                values = " or ".join(repr(value) for value in allowed if value is not None)
                raise ValueError(f"{name} must be {values}, got {given!r}")

    # ---- what Tessera has no use for ----

    def _remember(self, theirs: PreTrainedConfig, ours: TesseraConfig) -> None:
        """Keeps what would not come back by itself."""
        plain = AutoConfig.for_model(self.model_type, **self._values_for(ours)).to_dict()
        absent = object()
        kept = {
            key: value
            for key, value in theirs.to_dict().items()
            if key not in _NEVER_KEPT and plain.get(key, absent) != value
        }
        if kept:
            ours.converted_from = {"model_type": self.model_type, "fields": kept}

    def _say_again(
        self, kept: dict[str, Any], values: dict[str, Any], back: TesseraConfig
    ) -> PreTrainedConfig | None:
        """Their configuration with what was kept; None where that would be another model by now."""
        try:
            theirs = AutoConfig.for_model(self.model_type, **{**self._canonical(values), **kept})
            self._check_required(theirs)
            again = TesseraConfig(**self._fields_from(theirs))
        except _MISFITS:
            return None
        # A checkpoint may claim layers for multi-token prediction that it leaves out.
        ignored = () if back.num_mtp_layers else _PREDICTION_FIELDS
        return theirs if _all_fields(again, ignored) == _all_fields(back, ignored) else None

    def _canonical(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values under the names that a saved configuration has."""
        names = type(AutoConfig.for_model(self.model_type)).attribute_map
        return {names.get(name, name): value for name, value in values.items()}

    def _origin_of(self, ours: TesseraConfig) -> dict[str, Any]:
        origin = ours.converted_from or {}
        return origin if origin.get("model_type") == self.model_type else {}


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


def holder_of(name: str, config: TesseraConfig) -> str:
    """The tensor of a checkpoint that holds this one; of a tied head, the embedding."""
    return _EMBEDDING if name == _HEAD and config.tie_word_embeddings else name


def same_names(*names: str, **others: str) -> dict[str, str]:
    """A table of fields that have Tessera's own name, and of `others`, ours=theirs, that have another."""
    return {**{name: name for name in names}, **others}


def _all_fields(config: TesseraConfig, ignored: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration says, save for fields without effect."""
    settings = {name: getattr(config, name) for name in _NO_ARCHITECTURE - {"converted_from"}}
    return {
        name: value for name, value in {**architecture(config), **settings}.items() if name not in ignored
    }


def _obstacles(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Fields that differ; one that a side has no use for says nothing that another does not say."""
    return [
        f"{name} is {_short(ours[name])} (there: {_short(theirs[name])})"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]


def _without_share(rope: dict | None) -> dict | None:
    return None if rope is None else {k: v for k, v in rope.items() if k != "partial_rotary_factor"}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(set(value)) == 1:
        return f"all {value[0]}"
    return repr(value)

"""Which tiles fit together: the sentence that refuses a configuration that cannot work.

What belongs here: limits of single fields, and checks of fields against each other. `TesseraConfig` runs them
when it is built and before it is saved.
"""

import difflib
import math
from dataclasses import fields

from transformers.activations import ACT2FN

from .rope_parameters import validate_rope_parameters

# One letter a layer, tiled over the depth: `layer_types="SSSL"`, `mlp_layer_types="DS"`.
ATTENTION_LETTERS = {"S": "sliding_attention", "L": "full_attention"}
FEED_FORWARD_LETTERS = {"D": "dense", "S": "sparse"}

MTP_PATTERNS = {"mtp_layer_types": ATTENTION_LETTERS, "mtp_mlp_layer_types": FEED_FORWARD_LETTERS}

_LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# What an unset field becomes when the configuration is built, and a model cannot be built without.
_DERIVED_FIELDS = (
    "padded_vocab_size",
    "num_key_value_heads",
    "head_dim",
    "attention_output_bias",
    "layer_types",
    "mlp_layer_types",
    "rope_parameters",
)

# Sizes index tensors in kernels that count in 32 bits.
_LARGEST_SIZE = 2**31 - 1


class ConfigRules:
    """The checks of a configuration, as a part of it."""

    def _require_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "num_attention_heads",
            "intermediate_size",
            "n_group",
            "topk_group",
        ):
            self._require(name, 1 <= getattr(self, name), "at least 1")
        for name in (
            "padded_vocab_size",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "moe_intermediate_size",
            "value_embedding_interval",
        ):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1 or null")
        for name in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "num_mtp_layers"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for f in fields(self):
            if type(value := getattr(self, f.name)) is int:
                self._require(f.name, value <= _LARGEST_SIZE, f"at most {_LARGEST_SIZE}")
        for name in (
            "router_aux_loss_coef",
            "router_bias_update_speed",
            "mtp_loss_coef",
            "initializer_range",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name in ("rms_norm_eps", "qk_norm_scale", "routed_scaling_factor"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
            self._require(name, 0 <= getattr(self, name) < 1, "a probability in [0, 1)")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive number or null")

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def _validate_heads(self) -> None:
        if self.attention_type == "latent":
            missing = [name for name in _LATENT_SIZES if getattr(self, name) is None]
            if missing:
                raise ValueError(f"attention_type='latent' needs {', '.join(missing)}")
            if self.num_key_value_heads != self.num_attention_heads:
                raise ValueError(
                    "latent attention expands one latent to all heads: num_key_value_heads "
                    f"({self.num_key_value_heads}) must equal num_attention_heads "
                    f"({self.num_attention_heads})"
                )
            return
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) does not divide into num_attention_heads "
                f"({self.num_attention_heads}) heads; set head_dim or change one of them"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )

    def validate_rope(self) -> None:
        """Nothing: `validate_architecture` checks positions too, and takes a YaRN factor as it is given.

        The library's own check, which this replaces, warns of every factor that is not the ratio of the two
        context lengths; DeepSeek's and ByteGPT's are not.
        """

    def validate_architecture(self) -> None:
        """Checks the fields against each other.

        Raises:
            ValueError: with the fields, what was given and what would work.
        """
        if self.is_heterogeneous:
            raise ValueError(
                "per_layer_config is not supported: the layers of a Tessera model have one shape"
            )
        self._require_sizes()
        for name in _DERIVED_FIELDS:
            if getattr(self, name) is None:
                raise ValueError(f"{name} cannot be null once the configuration is built")
        self._validate_heads()
        self._validate_layers()
        self._validate_attention()
        self._validate_positions()
        self._validate_experts()
        self._validate_predictions_ahead()
        self._validate_nanochat_tiles()
        self._validate_origin()
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size ({self.padded_vocab_size}) is smaller than vocab_size ({self.vocab_size})"
            )
        if self.hidden_act not in ACT2FN:
            close = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"transformers knows no activation hidden_act='{self.hidden_act}'{hint}")
        if self.norm_type == "layer_norm" and not self.norm_weight:
            raise ValueError(
                "norm_weight=False is for norm_type='rms_norm'; a layer norm keeps its weight and bias"
            )

    def _validate_origin(self) -> None:
        if self.converted_from is None:
            return
        kinds = {"model_type": str, "fields": dict, "left_out": list}
        given = {"model_type": None, **self.converted_from}
        wrong = [key for key, value in given.items() if not isinstance(value, kinds.get(key, ()))]
        if wrong:
            raise ValueError(
                "converted_from has the model_type that a model came from, and may have fields (an object) "
                f"and left_out (a list); got {', '.join(f'{key}={given[key]!r:.40}' for key in wrong)}"
            )

    def _validate_layers(self) -> None:
        kinds = {"layer_types": ATTENTION_LETTERS, "mlp_layer_types": FEED_FORWARD_LETTERS}
        for name, letters in kinds.items():
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(
                    f"{name} must list every layer once the configuration is built, got '{given}'"
                )
            if len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(given)} entries for num_hidden_layers={self.num_hidden_layers}; to "
                    "change the depth of a configuration, build it anew with both"
                )
            wrong = sorted(set(given) - set(letters.values()))
            if wrong:
                raise ValueError(f"{name} knows {', '.join(letters.values())}; got {', '.join(wrong)}")
        slides = "sliding_attention" in self.layer_types
        if slides and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention layers, but sliding_window is not set")
        if slides and self.sliding_window < 2:
            # The library's cache keeps the last `window - 1` tokens, and takes 0 for all.
            raise ValueError(f"sliding_window must be at least 2, got {self.sliding_window}")

    def _validate_positions(self) -> None:
        if self.position_embedding_type != "rope":
            return
        validate_rope_parameters(self.rope_parameters)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels: the rotated width of a head must be even, got "
                f"{self.rotary_dim} (head_dim {self.head_dim}"
                + (f", qk_rope_head_dim {self.qk_rope_head_dim})" if self.attention_type == "latent" else ")")
            )
        if self.rope_parameters["rope_type"] == "dynamic" and self.rotary_dim < 4:
            raise ValueError(
                f"rope_type 'dynamic' needs at least 4 rotated channels a head, got {self.rotary_dim}"
            )
        # The library's scaling functions go by these two.
        if int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0)) != self.rotary_dim:
            raise ValueError(
                f"partial_rotary_factor no longer fits qk_rope_head_dim ({self.qk_rope_head_dim}); to change "
                "the heads of a configuration, build it anew"
            )

    def _validate_attention(self) -> None:
        latent_only = [name for name in (*_LATENT_SIZES, "q_lora_rank") if getattr(self, name) is not None]
        if self.attention_type == "multi_head" and latent_only:
            raise ValueError(f"only attention_type='latent' has {', '.join(latent_only)}; got 'multi_head'")
        if self.attention_type == "latent" and self.head_dim != self.qk_head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) is not that of the latent sizes ({self.qk_head_dim}); "
                "to change the heads of a configuration, build it anew"
            )
        if self.attention_type == "latent" and self.qk_norm is not None:
            raise ValueError(
                "qk_norm cannot be combined with latent attention: normed keys cannot be cached as a latent"
            )
        if self.qk_norm_scale != 1.0 and self.qk_norm is None:
            raise ValueError(f"qk_norm_scale={self.qk_norm_scale} has no effect without qk_norm")

    def _validate_predictions_ahead(self) -> None:
        if self.train_mtp and not self.num_mtp_layers:
            raise ValueError("train_mtp=True needs num_mtp_layers, the layers that predict further tokens")
        for name in MTP_PATTERNS:
            given = getattr(self, name)
            if given is None:
                continue
            if isinstance(given, str) or len(given) != self.num_mtp_layers:
                raise ValueError(f"{name} must list num_mtp_layers={self.num_mtp_layers} layers, got {given}")
            main = name.removeprefix("mtp_")
            if strange := sorted(set(given) - set(getattr(self, main))):
                raise ValueError(
                    f"{name} has {', '.join(strange)}, which no layer of {main} is: these layers share the "
                    "masks and the sizes of the others"
                )

    def _validate_experts(self) -> None:
        if self.router_bias_update_speed and not self.router_correction_bias:
            raise ValueError(
                f"router_bias_update_speed={self.router_bias_update_speed} moves a bias that only "
                "router_correction_bias=True gives"
            )
        sparse = "sparse" in self.mlp_layer_types
        if sparse and not self.n_routed_experts:
            raise ValueError("mlp_layer_types has sparse layers, but n_routed_experts is 0")
        if self.n_routed_experts and not sparse:
            raise ValueError("n_routed_experts is set, but mlp_layer_types has no sparse layer")
        for name in ("n_shared_experts", "num_experts_per_tok"):
            if getattr(self, name) and not sparse:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but mlp_layer_types has no sparse layer to use it"
                )
        if not sparse:
            return
        if self.moe_intermediate_size is None:
            raise ValueError("sparse layers need moe_intermediate_size, the width of one expert")
        for name in ("hidden_size", "moe_intermediate_size"):
            # Grouped products over the experts read rows in steps of 16 bytes: eight channels in bf16.
            if getattr(self, name) % 8:
                raise ValueError(
                    f"sparse layers need {name} to be a multiple of 8, got {getattr(self, name)}"
                )
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must lie between 1 and n_routed_experts ({self.n_routed_experts}), got "
                f"{self.num_experts_per_tok}"
            )
        if self.n_routed_experts % self.n_group:
            groups = f"n_group ({self.n_group}) groups"
            raise ValueError(f"n_routed_experts ({self.n_routed_experts}) does not divide into {groups}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) is larger than n_group ({self.n_group})")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the {reachable} experts of "
                f"topk_group ({self.topk_group}) groups"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias cannot be combined with sparse layers: stacked experts have no biases")

    def _validate_nanochat_tiles(self) -> None:
        if self.value_embedding_interval is not None:
            if self.attention_type == "latent":
                raise ValueError(
                    "value embeddings need attention_type='multi_head': latent attention caches no values "
                    "that they could be added to"
                )
            if not 1 <= self.value_gate_channels <= self.hidden_size:
                raise ValueError(
                    f"value_gate_channels ({self.value_gate_channels}) must lie between 1 and hidden_size "
                    f"({self.hidden_size})"
                )
        if self.smear and not 1 <= self.smear_gate_channels <= self.hidden_size:
            raise ValueError(
                f"smear_gate_channels ({self.smear_gate_channels}) must lie between 1 and hidden_size "
                f"({self.hidden_size})"
            )

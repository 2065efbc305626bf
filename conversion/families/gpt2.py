"""GPT-2: learned positions, layer norms and biases, under names and in an order of its own.

What belongs here: its tables. Its linear layers are stored as [in, out], and query, key and value as one.
"""

from typing import Any

from transformers import PreTrainedConfig

from ..rules import JOINED, JOINED_TRANSPOSED, TRANSPOSED, Rule
from .family import SHARED, Family, same_names

_OURS, _THEIRS = "model.layers.{i}", "transformer.h.{i}"


def _inner_width(theirs: PreTrainedConfig) -> dict[str, Any]:
    return {"intermediate_size": 4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner}


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    fields=same_names(
        *SHARED,
        "resid_pdrop",
        "embd_pdrop",
        intermediate_size="n_inner",
        hidden_act="activation_function",
        rms_norm_eps="layer_norm_epsilon",
        attention_dropout="attn_pdrop",
    ),
    fixed={
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "attention_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "initializer": "gpt2",
    },
    required={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rules=[
        Rule("model.embed_tokens.weight", "transformer.wte.weight"),
        Rule("model.embed_positions.weight", "transformer.wpe.weight"),
        Rule(f"{_OURS}.input_layernorm.{{p}}", f"{_THEIRS}.ln_1.{{p}}"),
        Rule(f"{_OURS}.post_attention_layernorm.{{p}}", f"{_THEIRS}.ln_2.{{p}}"),
        Rule(
            tuple(f"{_OURS}.self_attn.{part}_proj.weight" for part in "qkv"),
            f"{_THEIRS}.attn.c_attn.weight",
            JOINED_TRANSPOSED,
        ),
        Rule(
            tuple(f"{_OURS}.self_attn.{part}_proj.bias" for part in "qkv"),
            f"{_THEIRS}.attn.c_attn.bias",
            JOINED,
        ),
        Rule(f"{_OURS}.self_attn.o_proj.weight", f"{_THEIRS}.attn.c_proj.weight", TRANSPOSED),
        Rule(f"{_OURS}.self_attn.o_proj.bias", f"{_THEIRS}.attn.c_proj.bias"),
        Rule(f"{_OURS}.mlp.up_proj.weight", f"{_THEIRS}.mlp.c_fc.weight", TRANSPOSED),
        Rule(f"{_OURS}.mlp.up_proj.bias", f"{_THEIRS}.mlp.c_fc.bias"),
        Rule(f"{_OURS}.mlp.down_proj.weight", f"{_THEIRS}.mlp.c_proj.weight", TRANSPOSED),
        Rule(f"{_OURS}.mlp.down_proj.bias", f"{_THEIRS}.mlp.c_proj.bias"),
        Rule("model.norm.{p}", "transformer.ln_f.{p}"),
        Rule("lm_head.weight", "lm_head.weight"),
    ],
    # Masks, which older checkpoints hold as tensors.
    ignored=(r".*\.attn\.(masked_)?bias",),
    prefix="transformer.",
    derive=_inner_width,
)

"""NanoChat as transformers has it: norms without weight, QK norm after RoPE, no gate.

What belongs here: its tables. nanochat's own checkpoints, with the extras that transformers' class does not
have, are another source.
"""

from ..rules import Rule
from .family import FREQUENCIES, GROUPED, LLAMA_NAMES, Family, same_names
from .heads import head_dim_for, head_dim_from

NANOCHAT = Family(
    "nanochat",
    "NanoChatForCausalLM",
    fields=same_names(
        *GROUPED, "attention_bias", "final_logit_softcapping", attention_output_bias="attention_bias"
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
        Rule("model.layers.{i}.mlp.up_proj.weight", "model.layers.{i}.mlp.fc1.weight"),
        Rule("model.layers.{i}.mlp.down_proj.weight", "model.layers.{i}.mlp.fc2.weight"),
        *LLAMA_NAMES,
    ],
    ignored=FREQUENCIES,
    derive=head_dim_from,
    derive_theirs=head_dim_for,
)

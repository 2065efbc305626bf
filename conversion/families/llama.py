"""Llama and its dense kin: Mistral, Qwen2, Qwen3.

What belongs here: decoders of grouped-query attention and SwiGLU, which differ in biases, QK norm and
windows. Their tensors have Tessera's own names.
"""

from .family import FREQUENCIES, GROUPED, LLAMA_NAMES, Family, same_names
from .heads import head_dim_for, head_dim_from, one_window_for, one_window_from, windows_by_layer_for

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    fields=same_names(
        *GROUPED, "head_dim", "attention_bias", "mlp_bias", attention_output_bias="attention_bias"
    ),
    rules=LLAMA_NAMES,
    ignored=FREQUENCIES,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    fields=same_names(*GROUPED, "head_dim"),
    rules=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive=one_window_from,
    derive_theirs=one_window_for,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    fields=same_names(*GROUPED, "layer_types", "sliding_window"),
    fixed={"attention_bias": True, "attention_output_bias": False},
    rules=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive=head_dim_from,
    derive_theirs=lambda ours: windows_by_layer_for(ours) | head_dim_for(ours),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    fields=same_names(
        *GROUPED,
        "head_dim",
        "attention_bias",
        "layer_types",
        "sliding_window",
        attention_output_bias="attention_bias",
    ),
    fixed={"qk_norm": "before_rope"},
    rules=LLAMA_NAMES,
    ignored=FREQUENCIES,
    derive_theirs=windows_by_layer_for,
)

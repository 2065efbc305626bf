"""The model of each dialect that transformers' common tests are run on, and what those tests ask of it."""

import torch

from tessera import (
    TesseraConfig,
    TesseraForCausalLM,
    TesseraForSequenceClassification,
    TesseraForTokenClassification,
    TesseraModel,
)

# dialect -> preset, and what makes it smaller: the common tests want two layers and few parameters. They
# also count on caches that hold every token, hence the wide windows; tests/modeling has narrow ones.
# nanochat's own starting weights, zero in the output of every branch, would hide what the branches do.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
DIALECTS = {
    "bytegpt": (
        "bytegpt-tiny",
        {
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            # Without it there is nothing for the tests of what stays in fp32.
            "router_correction_bias": True,
        },
    ),
    "llama": ("llama-tiny", {"intermediate_size": 48}),
    "nanochat": (
        "nanochat-tiny",
        {
            "layer_types": "SL",
            "sliding_window": 64,
            "head_dim": 8,
            "intermediate_size": 64,
            "initializer": "normal",
        },
    ),
    "verse": ("verse-tiny", {"sliding_window": 64, "head_dim": 8, "intermediate_size": 48}),
    "gpt": (
        "gpt2-tiny",
        {"intermediate_size": 64, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}


def contract_config(dialect: str, **overrides) -> TesseraConfig:
    """The configuration of a dialect with the special tokens that the common tests count on."""
    preset, fields = DIALECTS[dialect]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return TesseraConfig.from_preset(preset, **{**SIZES, **tokens, **fields, **overrides})


class DialectTester:
    """What the mixins call `model_tester`: classes, sizes, a configuration and inputs."""

    config_class = TesseraConfig
    base_model_class = TesseraModel
    causal_lm_class = TesseraForCausalLM
    sequence_classification_class = TesseraForSequenceClassification
    token_classification_class = TesseraForTokenClassification
    question_answering_class = None
    all_model_classes = (
        TesseraModel,
        TesseraForCausalLM,
        TesseraForSequenceClassification,
        TesseraForTokenClassification,
    )

    def __init__(self, parent, dialect: str):
        self.parent = parent
        self.dialect = dialect
        self.batch_size, self.seq_length, self.is_training = 13, 7, True
        # Attributes by which the mixins compute the shapes that they expect.
        self.num_labels, self.type_sequence_label_size = 3, 2
        config = self.get_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id"):
            setattr(self, name, getattr(config, name))

    def get_config(self) -> TesseraConfig:
        """A fresh configuration, which a test may change."""
        return contract_config(self.dialect)

    def prepare_config_and_inputs_for_common(self) -> tuple[TesseraConfig, dict[str, torch.Tensor]]:
        """The configuration, and ids [B, T] with more padding on the left in each of the first rows."""
        shape = (self.batch_size, self.seq_length)
        # Not the padding token: classification looks for the last token that is not padding.
        ids = torch.randint(1, self.vocab_size, shape)
        # On the left, where generation wants it, and where what comes out at the end of a row is defined.
        mask = torch.ones(shape, dtype=torch.long).tril().flip(-1)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}

"""A tiny Llama in two forms that must be one model: Meta's tensors, and transformers' class with them.

The arithmetic between the two is that of transformers' own converter, which is not in its package.
"""

from pathlib import Path

import torch
import transformers

from .weights import randomize

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.": "",
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lm_head": "output",
    **{f"{kind}_proj": f"w{kind}" for kind in "qkvo"},
}


def tiny_llama(kind: str = "Llama", **overrides) -> transformers.PreTrainedModel:
    """A tiny model of transformers with random weights: Llama, Mistral or Mixtral."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **overrides})
    return randomize(getattr(transformers, f"{kind}ForCausalLM")(config)).eval()


def meta_weights(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a tiny model under Meta's names, with rotary pairs side by side, but for experts."""
    weights, head_dim = {}, model.config.hidden_size // model.config.num_attention_heads
    for name, tensor in model.state_dict().items():
        if ".experts." in name or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.unflatten(0, (-1, 2, head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        for theirs, original in _NAMES.items():
            name = name.replace(theirs, original)
        weights[name] = tensor.clone()
    return weights


def train_sentencepiece(file: Path, size: int) -> bytes:
    """Trains a SentencePiece BPE model with byte fallback on a few sentences and writes it."""
    import sentencepiece

    words = ["the", "little", "girl", "named", "Lily", "loved", "to", "play", "outside", "in", "park", "ball"]
    texts = [" ".join(words[(i * 5 + j * 3) % 12] for j in range(9)) + "." for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(file.with_suffix("")),
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file.with_suffix(".vocab").unlink()
    return file.read_bytes()

"""Changes of a Tessera model that leave its logits as they are, for targets that cannot express a tile.

What belongs here: from a configuration and its tensors to another configuration and tensors of the same
model, exactly.
"""

import copy
from collections.abc import Mapping

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .rules import Changed, Renamed

_VOCABULARY_ROWS = ("embed_tokens.weight", "lm_head.weight", "value_embed.weight")


def cut_padding(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """Leaves out the rows of embedding and head past the vocabulary, which no token and no logit uses."""
    rows = config.vocab_size
    if config.padded_vocab_size == rows:
        return config, tensors
    config = copy.deepcopy(config)
    config.padded_vocab_size = rows

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:rows] if name.endswith(_VOCABULARY_ROWS) else tensor

    return config, Changed(tensors, cut)


def drop_predictions_ahead(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """Leaves out the layers for multi-token prediction, which the next token does not depend on."""
    config = copy.deepcopy(config)
    ahead = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
    prefixes = tuple(f"model.layers.{i}." for i in ahead)
    config.num_mtp_layers, config.mtp_layer_types, config.mtp_mlp_layer_types = 0, None, None
    return config, Renamed(tensors, {name: name for name in tensors if not name.startswith(prefixes)})


def pair_halves(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """Reorders the channels of query and key heads, so that the rotation pairs (0, d/2), (1, d/2 + 1), ...

    Scores are sums over channels, so the same order for both changes nothing. Only for multi-head attention;
    families with latent attention take the interleaved pairs, some of them no others: `pair_neighbours`.
    """
    if not config.rope_interleave or config.attention_type != "multi_head":
        return config, tensors
    config = copy.deepcopy(config)
    config.rope_interleave = False
    rotated = list(range(0, config.rotary_dim, 2)) + list(range(1, config.rotary_dim, 2))
    order = torch.tensor(rotated + list(range(config.rotary_dim, config.head_dim)))

    def reorder(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not any(f".self_attn.{part}_" in name for part in "qk"):
            return tensor
        return tensor.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)

    return config, Changed(tensors, reorder)


def pair_neighbours(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """Reorders the rotated channels of latent attention, so that the rotation pairs (0, 1), (2, 3), ...

    They are the last of each query head, and of what `kv_a_proj_with_mqa` gives, which all heads share.
    """
    if (
        config.rope_interleave
        or config.attention_type != "latent"
        or config.position_embedding_type != "rope"
    ):
        return config, tensors
    config = copy.deepcopy(config)
    config.rope_interleave = True
    halves = torch.arange(config.qk_rope_head_dim).view(2, -1).T.flatten()

    def reorder(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".self_attn.q_proj." in name or ".self_attn.q_b_proj." in name:
            kept, size = config.qk_nope_head_dim, config.qk_head_dim
        elif ".self_attn.kv_a_proj_with_mqa." in name:
            kept, size = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
        else:
            return tensor
        order = torch.cat([torch.arange(kept), kept + halves])
        return tensor.unflatten(0, (-1, size))[:, order].flatten(0, 1)

    return config, Changed(tensors, reorder)

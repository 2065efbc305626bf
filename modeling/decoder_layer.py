"""One layer of the decoder, and the layer that predicts further tokens.

What belongs here: how attention, feed-forward and residual stream are joined in a layer. Shapes: B rows of T
tokens, C hidden, E experts.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import TesseraAttention, TesseraLatentAttention
from .configuration_tessera import TesseraConfig
from .feed_forward import TesseraMLP, TesseraMoE
from .layers import make_norm


class TesseraDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: TesseraConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        # Modules, and not numbers: TRL turns dropout off by setting theirs to zero.
        self.dropout = nn.Dropout(config.resid_pdrop)
        attention = TesseraLatentAttention if config.attention_type == "latent" else TesseraAttention
        self.self_attn = attention(config, layer_idx)
        self.is_sparse = config.feed_forward_kind(layer_idx) == "sparse"
        self.mlp = TesseraMoE(config) if self.is_sparse else TesseraMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.residual_scale = self.embedding_scale = None
        if config.residual_scalars and layer_idx < config.num_hidden_layers:
            self.residual_scale = nn.Parameter(torch.ones(1))
            self.embedding_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedded: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        input_ids: torch.Tensor | None = None,
        output_router_logits: bool = False,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, T, C] -> [B, T, C].

        `embedded` [B, T, C] is what entered the first layer; `token_mask` [B, T] is zero on padding. With
        `output_router_logits` also the logits [B T, E] of its router, None in a dense layer.
        """
        if self.residual_scale is not None:
            # Without a dimension of their own: fp32 scalars leave a bf16 stream what it is.
            kept, again = self.residual_scale.squeeze(0), self.embedding_scale.squeeze(0)
            hidden_states = kept * hidden_states + again * embedded
        branch, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            input_ids=input_ids,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(branch).to(hidden_states.dtype)
        normed, router_logits = self.post_attention_layernorm(hidden_states), None
        if self.is_sparse:
            branch, router_logits = self.mlp(normed, token_mask)
        else:
            branch = self.mlp(normed)
        hidden_states = hidden_states + self.dropout(branch).to(hidden_states.dtype)
        return (hidden_states, router_logits) if output_router_logits else hidden_states


class TesseraMTPLayer(TesseraDecoderLayer):
    """A layer that predicts one token further than what stands before it (DeepSeek-V3, equations 21 to 23).

    Its names are DeepSeek's. The norms are those that transformers makes when it drafts with such a layer,
    always with weights.
    """

    def __init__(self, config: TesseraConfig, depth: int):
        super().__init__(config, config.num_hidden_layers + depth)
        self.attention_kind = config.attention_kind(self.layer_idx)
        # Its place in the cache of the drafts.
        self.self_attn.layer_idx = depth
        norm = next(type(module) for name, module in self.named_modules() if "norm" in name)
        self.enorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": norm(config.hidden_size, eps=config.rms_norm_eps)})

    def forward(
        self, embeds: torch.Tensor, previous: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [B, T, C] of the tokens ahead and normed hidden states [B, T, C] of the layer before ->
        normed hidden states [B, T, C], and the router's logits in a sparse layer."""
        joined = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(previous)], dim=-1))
        hidden_states, router_logits = super().forward(joined, output_router_logits=True, **kwargs)
        return self.shared_head["norm"](hidden_states), router_logits

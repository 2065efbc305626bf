"""Attention: multi-head / grouped-query, and multi-head latent.

What belongs here: from normed hidden states to the branch that joins the residual stream, with the cache
between. The product of queries, keys and values is transformers' attention interface (sdpa, flash, flex,
eager); only latent attention in absorbed form has its own, because no such interface knows it. Shapes: B
batch, T new positions, S positions in sight, H heads, D head size, C hidden, R rank of the latent.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_tessera import TesseraConfig
from .continuous_batching import paged_update
from .layers import (
    TesseraGate,
    TesseraRMSNorm,
    apply_rotary,
    is_plain_linear,
    make_norm,
)
from .parallel_plans import is_split, local_part


def masked_softmax(
    scores: torch.Tensor, attention_mask: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """Probabilities in fp32 of scores [B, H, T, S]; a mask [B, 1, T, S] is bool (True: seen) or added."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores.float() / softcap)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    return scores.softmax(-1, dtype=torch.float32)


def causal_order(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask [T, S] that no mask stands for: plain causal order from the first position.

    A static cache may be longer than the prompt; what follows it is not seen.
    """
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; the reference that the other implementations are compared with.

    Args:
        module: for `num_key_value_groups` and `training`.
        query, key, value: [B, H, T, D], [B, H_kv, S, D], [B, H_kv, S, D_v].
        attention_mask: [B, 1, T, S], bool or additive; None is plain causal order (see `causal_order`).

    Returns:
        Output [B, T, H, D_v] and probabilities [B, H, T, S].
    """
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = causal_order(query, key)
    scores = query @ key.transpose(2, 3) * scaling
    probabilities = masked_softmax(scores, attention_mask, softcap).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class _Attention(nn.Module):
    """What the attention functions read from a module, and the call to them."""

    def __init__(self, config: TesseraConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        slides = config.attention_kind(layer_idx) == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None
        self.softcap = config.attn_logit_softcapping
        self.dropout = nn.Dropout(config.attention_dropout)

    def _attend(
        self, query, key, value, attention_mask, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = self.config._attn_implementation
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
            # The sdpa kernels and the library's paged attention know no soft-cap; flash and flex do.
            if implementation in ("sdpa", "paged|sdpa", "paged|eager"):
                implementation = "eager"
                if kwargs.get("cache") is not None:
                    key, value = paged_update(kwargs["cache"], key, value, self.layer_idx, kwargs)
        blocks = isinstance(attention_mask, BlockMask) and implementation != "flex_attention"
        if blocks:
            implementation = "flex_attention"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # Flex attention has normalizers to give and not probabilities.
        return out, None if blocks else probabilities

    def _rotate(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        if position_embeddings is None:
            return x
        return apply_rotary(x, *position_embeddings, interleave=self.config.rope_interleave)


class TesseraAttention(_Attention):
    """Multi-head and grouped-query attention (Vaswani et al., 2017; Ainslie et al., 2023).

    With QK norm before the rotation (Qwen3) or after it (nanochat), and nanochat's value embeddings: a table
    of its own from token to values, weighed for each key/value head by a gate on the first channels.
    """

    def __init__(self, config: TesseraConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        # Scaling queries and keys by s each scales their product by s * s.
        self.scaling = self.head_dim**-0.5 * config.qk_norm_scale**2
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(
            config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias
        )
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(
            self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias
        )
        self.o_proj.init_role = "residual_output"
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            self.q_norm = TesseraRMSNorm(self.head_dim, eps=config.rms_norm_eps, weight=config.norm_weight)
            self.k_norm = TesseraRMSNorm(self.head_dim, eps=config.rms_norm_eps, weight=config.norm_weight)
        self.value_embed = self.value_gate = None
        if config.has_value_embedding(layer_idx):
            self.value_embed = nn.Embedding(config.padded_vocab_size, kv_width)
            self.value_embed.init_role = "value_embedding"
            self.value_gate = TesseraGate(config.value_gate_channels, config.num_key_value_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normed hidden states [B, T, C] -> [B, T, C], and probabilities where there are any."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        # One product of the three weights side by side was tried: compiled, it costs 10 % of a step at 135M
        # parameters, for the copies between it and the kernels.
        query = self.q_proj(hidden_states).view(heads)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads)
        if self.value_embed is not None:
            # The factor 3 lets a gate that starts at one half grow past neutral (nanochat).
            gate = 3 * torch.sigmoid(self.value_gate(hidden_states))
            value = value + gate.unsqueeze(-1) * self.value_embed(input_ids).view(heads).to(value.dtype)
        # Rotated and normed before heads and positions change places: the kernels then read queries and write
        # the output as the products beside them have it, and nothing is copied between the two.
        if self.config.qk_norm == "before_rope":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self._rotate(query, position_embeddings), self._rotate(key, position_embeddings)
        if self.config.qk_norm == "after_rope":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H, T, D]

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, probabilities = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), probabilities


class TesseraLatentAttention(_Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1), with and without a low rank for the queries.

    Only the normed latent [R] and one rotated key shared by all heads are cached. `naive` expands them to
    keys and values of every head; `absorb` moves that expansion to the queries and the output, so that
    attention runs in latent space and a decoding step does not expand the whole past again.
    """

    def __init__(self, config: TesseraConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.rank, self.nope_dim = config.kv_lora_rank, config.qk_nope_head_dim
        self.rope_dim, self.v_dim = config.qk_rope_head_dim, config.v_head_dim
        self.scaling = config.qk_head_dim**-0.5 * _yarn_score_scale(config)
        bias, q_width = config.attention_bias, self.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_width, bias=bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = make_norm(config, config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = make_norm(config, self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(
            self.num_heads * self.v_dim, config.hidden_size, bias=config.attention_output_bias
        )
        self.o_proj.init_role = "residual_output"

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normed hidden states [B, T, C] -> [B, T, C], and probabilities where there are any."""
        query = self._query(hidden_states)  # [B, T, H, D]
        q_nope, q_rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope_dim], dim=-1)
        q_rope = self._rotate(q_rope, position_embeddings)
        # One head for all: [B, 1, T, R].
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        k_rope = self._rotate(k_rope.unsqueeze(2), position_embeddings).transpose(1, 2)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)

        paged = kwargs.get("cache") is not None
        if not paged and self.absorbs(query.shape[1], latent.shape[2], attention_mask):
            q_nope, q_rope = q_nope.transpose(1, 2), q_rope.transpose(1, 2)
            out, probabilities = self._attend_absorbed(q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            heads = (-1, self.nope_dim + self.v_dim)  # a rank may hold some of the heads only
            expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, heads)
            k_nope, value = expanded.split([self.nope_dim, self.v_dim], dim=-1)  # [B, S, H, D]
            k_rope = k_rope.transpose(1, 2).expand(-1, -1, k_nope.shape[2], -1)
            key = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
            query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
            value = value.transpose(1, 2)
            if paged:
                # The paged cache has one width for keys and values.
                value = F.pad(value, (0, key.shape[-1] - self.v_dim))
            out, probabilities = self._attend(query, key, value, attention_mask, **kwargs)
            out = out[..., : self.v_dim]
        return self.o_proj(out.flatten(2)), probabilities

    def absorbs(self, new: int, seen: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether a call with `new` queries on `seen` positions attends in latent space.

        By cost, in products for each head: naive expands every position once and attends with small heads;
        absorbed projects only the new positions, and attends with heads as wide as the latent. So absorbed
        wins while the new positions are few. It needs a plain mask, and the bare weight of `kv_b_proj`: with
        an adapter or a quantised layer in its place, the expansion must go through that.
        """
        mode = self.config.latent_attention_mode
        if type(self.kv_b_proj) is nn.Linear and is_split(self.kv_b_proj.weight):
            # A rank's part is the rows of its heads; but gradients of the latent are added up over the ranks
            # where it enters `kv_b_proj`.
            plain = not torch.is_grad_enabled()
        else:
            plain = is_plain_linear(self.kv_b_proj)
        if mode == "naive" or not plain:
            return False
        plain_mask = self.config._attn_implementation in ("eager", "sdpa")
        plain_mask = plain_mask and not isinstance(attention_mask, BlockMask)
        if mode == "absorb":
            return plain_mask
        if not plain_mask or self.training or new == seen:
            return False
        expansion = self.rank * (self.nope_dim + self.v_dim)
        naive = seen * expansion + new * seen * (self.nope_dim + self.rope_dim + self.v_dim)
        absorbed = new * expansion + new * seen * (2 * self.rank + self.rope_dim)
        return absorbed < naive

    def _query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query.unflatten(-1, (-1, self.nope_dim + self.rope_dim))

    def _attend_absorbed(
        self, q_nope, q_rope, latent, k_rope, attention_mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        expand = local_part(self.kv_b_proj.weight).view(-1, self.nope_dim + self.v_dim, self.rank)
        expand_key, expand_value = expand.split([self.nope_dim, self.v_dim], dim=1)  # [H, D, R]
        new = q_nope.shape[2]
        if attention_mask is None and new > 1:
            attention_mask = causal_order(q_nope, latent)
        latent = latent.squeeze(1)  # [B, S, R]
        # All heads look at one key: their queries form the rows of one product, [B, H T, S].
        scores = q_rope.flatten(1, 2) @ k_rope.squeeze(1).transpose(1, 2)
        query = (q_nope @ expand_key).flatten(1, 2)
        scores = torch.baddbmm(
            scores, query, latent.transpose(1, 2), beta=self.scaling, alpha=self.scaling
        ).unflatten(1, (-1, new))
        probabilities = masked_softmax(scores, attention_mask, self.softcap).to(query.dtype)
        probabilities = self.dropout(probabilities)
        mixed = (probabilities.flatten(1, 2) @ latent).unflatten(1, (-1, new))  # [B, H, T, R]
        return (mixed @ expand_value.transpose(1, 2)).transpose(1, 2), probabilities


def _yarn_score_scale(config: TesseraConfig) -> float:
    """Factor on the scores that goes with YaRN (Peng et al., 2023, equation 22), as in DeepSeek-V2."""
    rope = config.rope_parameters or {}
    mscale = rope.get("mscale_all_dim")
    if config.position_embedding_type != "rope" or rope.get("rope_type") != "yarn" or not mscale:
        return 1.0
    return (0.1 * mscale * math.log(max(rope["factor"], 1.0)) + 1.0) ** 2

"""Feed-forward layers: dense, and mixture of experts (router, stacked experts, shared experts).

What belongs here: everything between the second norm of a layer and its residual sum, and the load-balancing
loss of the routers. Shapes: B batch, T positions, C hidden, I intermediate, E experts, K chosen experts, N =
B * T tokens.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from .balancing import LoadTally
from .configuration_tessera import TesseraConfig
from .grouped_experts import grouped_experts, takes_grouped_products


class TesseraMLP(nn.Module):
    """Dense feed-forward: gated (SwiGLU; Shazeer, 2020) or plain."""

    def __init__(self, config: TesseraConfig, intermediate_size: int | None = None):
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = (
            nn.Linear(config.hidden_size, width, bias=config.mlp_bias) if config.gated_mlp else None
        )
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj.init_role = "mlp_input"
        if self.gate_proj is not None:
            self.gate_proj.init_role = "mlp_input"
        self.down_proj.init_role = "residual_output"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., C] -> [..., C]."""
        up = self.up_proj(x)
        hidden = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up
        return self.down_proj(hidden)


class TesseraRouter(LoadTally):
    """Scores the experts for each token and chooses K of them (DeepSeek-V2 section 2.2, DeepSeek-V3 section
    2.1.2).

    Always in fp32, autocast or not: a choice made in bf16 differs between machines and batch shapes.
    """

    def __init__(self, config: TesseraConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if config.router_correction_bias else None
        self.e_score_correction_bias = None if bias is None else nn.Buffer(bias)
        self.start_tally()

    def forward(
        self, x: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [N, C] -> logits [N, E], weights [N, K] and indices [N, K] of the chosen experts.

        `token_mask`, zero on padding, is for the count of their loads.
        """
        with maybe_autocast(device_type=x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = self.scores(logits)
            indices = self.choose(scores)
            self.count(logits, indices, token_mask)
            weights = scores.gather(1, indices)
            if self.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, weights * self.routed_scaling_factor, indices

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Affinity of each token to each expert [N, E], in fp32."""
        return logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices [N, K] of the experts with the highest scores, among the best groups."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias.float()
        if self.n_group > 1:
            grouped = scores.view(-1, self.n_group, self.num_experts // self.n_group)
            # A group counts as its best expert; with the correction bias, as its best two (DeepSeek-V3).
            best = min(2 if self.e_score_correction_bias is not None else 1, grouped.shape[-1])
            groups = grouped.topk(best, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, groups, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return scores.topk(self.top_k, dim=-1).indices


class _StackedExperts(nn.Module):
    """What both kinds of experts share: the loop, in whose place the library puts grouped products."""

    def __init__(self, config: TesseraConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def _loop(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        # The id `num_experts` marks a slot that another rank serves (expert parallelism).
        for expert in indices.unique().tolist():
            if expert == self.num_experts:
                continue
            token, slot = torch.where(indices == expert)
            hidden = self.activate(F.linear(x[token], self.enter_proj[expert]))
            y = F.linear(hidden, self.down_proj[expert]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _in_grouped_products(experts: type[nn.Module]) -> type[nn.Module]:
    """The class with our own grouped products in place of the library's where they can be computed."""
    library = experts.forward

    @functools.wraps(library)
    def forward(self, hidden_states, top_k_index, top_k_weights):
        if takes_grouped_products(self, hidden_states):
            return grouped_experts(self, hidden_states, top_k_index, top_k_weights)
        return library(self, hidden_states, top_k_index, top_k_weights)

    experts.forward = forward
    return experts


@_in_grouped_products
@use_experts_implementation
class TesseraExperts(_StackedExperts):
    """Gated experts, stacked: gate and up [E, 2I, C], down [E, C, I]."""

    def __init__(self, config: TesseraConfig):
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )

    @property
    def enter_proj(self) -> torch.Tensor:
        """The weights that the tokens meet first [E, 2I, C]."""
        return self.gate_up_proj

    def activate(self, entered: torch.Tensor) -> torch.Tensor:
        """[..., 2I] -> [..., I]."""
        gate, up = entered.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [N, C], indices and weights [N, K] -> [N, C]."""
        return self._loop(hidden_states, top_k_index, top_k_weights)


@_in_grouped_products
@use_experts_implementation(has_gate=False)
class TesseraUngatedExperts(_StackedExperts):
    """Plain experts, stacked: up [E, I, C], down [E, C, I]."""

    def __init__(self, config: TesseraConfig):
        super().__init__(config)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))

    @property
    def enter_proj(self) -> torch.Tensor:
        """The weights that the tokens meet first [E, I, C]."""
        return self.up_proj

    def activate(self, entered: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., I]."""
        return self.act_fn(entered)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [N, C], indices and weights [N, K] -> [N, C]."""
        return self._loop(hidden_states, top_k_index, top_k_weights)


class TesseraMoE(nn.Module):
    """Mixture of experts: K routed experts a token, and shared experts that see every token."""

    def __init__(self, config: TesseraConfig):
        super().__init__()
        self.gate = TesseraRouter(config)
        self.experts = TesseraExperts(config) if config.gated_mlp else TesseraUngatedExperts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = TesseraMLP(config, shared_width) if shared_width else None

    def forward(
        self, x: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, T, C] -> [B, T, C], and the router's logits [B T, E].

        `token_mask` [B, T], zero on padding, is for the count of the experts' loads.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits, weights, indices = self.gate(tokens, token_mask=token_mask)
        out = self.experts(tokens, indices, weights).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x), logits


def load_balancing_loss(
    routers: list[TesseraRouter],
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Auxiliary loss that evens out the load of the experts (Switch Transformer, equations 4 to 6).

    Pooled over layers: E times the sum over experts of (share of choices) x (mean probability). Balanced
    routing gives K, the number of experts a token. Sigmoid scores are normalised to probabilities first
    (DeepSeek-V3, equations 17 to 20).

    Args:
        routers: the routers that gave the logits, layer by layer.
        router_logits: [N, E] for each of them.
        attention_mask: [B, T] with N = B * T, zero where a token is padding and does not count.
    """
    router = routers[0]
    chosen = router_logits[0].new_zeros(router.num_experts)
    probability = torch.zeros_like(chosen)
    total = 0.0
    for router, logits in zip(routers, router_logits, strict=True):
        keep = torch.ones_like(logits[:, 0])
        if attention_mask is not None:
            keep = attention_mask.reshape(-1).to(logits)
        scores = router.scores(logits)
        indices = router.choose(scores)
        chosen = chosen.index_add(0, indices.flatten(), keep.repeat_interleave(router.top_k))
        probability = probability + (scores / scores.sum(-1, keepdim=True) * keep[:, None]).sum(0)
        total = total + keep.sum()
    return router.num_experts * (chosen / total * probability / total).sum()

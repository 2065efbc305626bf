"""The small parts of a decoder: norms, rotary positions, gates, and nanochat's smear.

What belongs here: modules without attention or feed-forward in them. Shapes: B batch, T positions, H heads, D
head size, C hidden.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticSlidingWindowLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_tessera import TesseraConfig


class TesseraRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in fp32, with or without a weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if weight else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # Written out, so that it joins what stands beside it.
            normed = x.float()
            normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        else:
            normed = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        normed = normed.to(x.dtype)
        return normed if self.weight is None else self.weight * normed

    def extra_repr(self) -> str:
        return f"eps={self.eps}, weight={self.weight is not None}"


def make_norm(config: TesseraConfig, size: int | None = None) -> nn.Module:
    """The norm that the configuration names, over `size` channels (default: the hidden size)."""
    size = config.hidden_size if size is None else size
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(size, eps=config.rms_norm_eps)
    return TesseraRMSNorm(size, eps=config.rms_norm_eps, weight=config.norm_weight)


def find_rows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The ids behind embeddings: which row of `table` each of them is.

    Rows are compared by a hash of their bits, so that nothing of size tokens x vocabulary is made.

    Args:
        x: [B, T, C], each a row of `table`.
        table: [V, C].

    Returns:
        Ids [B, T]; of equal rows, any.

    Raises:
        ValueError: if an embedding is no row of the table; a compiled model does not look.
    """
    sought, table = x.detach().to(table.dtype), table.detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[table.element_size()]
    # One odd factor for each channel, mixed as SplitMix64 does (Steele et al., 2014).
    factors = torch.arange(1, table.shape[1] + 1, device=table.device) * -7046029254386353131
    factors = (factors ^ (factors >> 30)) * -4658895280553007687 | 1
    # In parts: as integers of 64 bits a large table would be several times its own size.
    hashes = torch.cat([(rows.view(bits).long() * factors).sum(-1) for rows in table.split(4096)])
    ordered, order = hashes.sort()
    found = torch.searchsorted(ordered, (sought.contiguous().view(bits).long() * factors).sum(-1))
    ids = order[found.clamp(max=len(order) - 1)]
    if not torch.compiler.is_compiling() and not torch.equal(table[ids], sought):
        raise ValueError(
            "this model has value embeddings, which need input_ids; inputs_embeds can only replace them "
            "where each is a row of the embedding table"
        )
    return ids


class TesseraRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al., 2021), with linear, dynamic, YaRN or llama3 scaling.

    transformers recomputes `inv_freq` after loading for any class of this name and with these buffers.
    """

    def __init__(self, config: TesseraConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self._init_function()(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _init_function(self) -> Callable[..., tuple[torch.Tensor, float]]:
        if self.rope_type == "default":
            return self.compute_default_rope_parameters
        return ROPE_INIT_FUNCTIONS[self.rope_type]

    @staticmethod
    def compute_default_rope_parameters(config: TesseraConfig, **_) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [rotary_dim / 2] without scaling, and the factor 1 on cosines and sines."""
        dim = config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, T, rotary_dim / 2] in the dtype of `x`, for positions [B, T]."""
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32)
        if self.rope_type == "dynamic":
            inv_freq = inv_freq * self._stretch(position_ids)
        sign = -1.0 if self.config.rope_reverse else 1.0
        # An exported program has to run where this package is not.
        exporting = torch.compiler._is_exporting_flag
        once = torch.compiler.is_compiling() and not exporting and position_ids.shape[-1] > 1
        compute = _opaque if once else rotary_tables
        return compute(position_ids, inv_freq, self.attention_scaling, sign * self.attention_scaling, x.dtype)

    def _stretch(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Factors [rotary_dim / 2] on the frequencies, for contexts longer than the model's own.

        Dynamic NTK scaling, as in transformers: the base grows with the longest position in sight. It is
        computed anew at each call instead of kept, so that a call does not depend on those before it.
        """
        longest, dim = self.config.max_position_embeddings, self.config.rotary_dim
        factor = self.config.rope_parameters["factor"]
        length = (position_ids.max() + 1).clamp(min=longest).float()
        growth = factor * length / longest - (factor - 1)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / (dim - 2)
        return growth**-exponents


def rotary_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, cos_scale: float, sin_scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled cosines and sines [B, T, F] of positions [B, T] times frequencies [F], computed in fp32."""
    angles = position_ids[..., None].float() * inv_freq
    return (angles.cos() * cos_scale).to(dtype), (angles.sin() * sin_scale).to(dtype)


# A compiler would put the cosines and sines into every kernel that rotates, and compute them anew for each
# head of each layer: a tenth of a training step at 135M parameters. It cannot look into an operator, which is
# named for its module: code that came with a checkpoint may be of another version.
_opaque = torch.library.custom_op(
    f"tessera::{__name__.replace('.', '_')}_rotary_tables", rotary_tables, mutates_args=()
)


@_opaque.register_fake
def _(position_ids, inv_freq, cos_scale, sin_scale, dtype):
    shape = (*position_ids.shape, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = False
) -> torch.Tensor:
    """Rotates the first `2 * cos.shape[-1]` channels of each head; the others pass.

    Interleaved pairs come out as (0, 2, ..., 1, 3, ...). Queries and keys are permuted alike, so their
    product is that of the interleaved order.

    Args:
        x: queries or keys [B, T, H, D].
        cos, sin: [B, T, rotary_dim / 2].
        interleave: whether the pairs are neighbours instead of half a head apart.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    width, passed = 2 * cos.shape[-1], []
    if width < x.shape[-1]:
        x, rest = x[..., :width], x[..., width:]
        passed = [rest]
    first, second = (x[..., ::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, *passed], dim=-1)


class TesseraGate(nn.Module):
    """Logits of a gate from the first `channels` of each token; a weight [gates, channels] and nothing else.

    No `nn.Linear`, so that quantisers leave it: it is a handful of numbers, of widths that their blocks do
    not divide, and a sigmoid follows.
    """

    def __init__(self, channels: int, gates: int):
        super().__init__()
        # The names of `nn.Linear`, which transformers' tensor parallelism asks for.
        self.in_features, self.out_features = channels, gates
        self.weight = nn.Parameter(torch.zeros(gates, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., C] -> [..., gates]."""
        return F.linear(x[..., : self.in_features], self.weight)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a linear layer is its weight alone, which may then be used without calling the layer.

    An adapter, a quantised layer or tensor, a shard, or a hook that gathers or moves the weight has to be
    called.
    """
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, torch.Tensor):
        return False
    hooked = layer._forward_pre_hooks or layer._forward_hooks or hasattr(layer, "_hf_hook")
    return not hooked and layer.bias is None


class TesseraSmear(nn.Module):
    """Mixes the previous token's embedding into each token's (nanochat, July 2026).

    `x[t] += strength * sigmoid(gate(first channels of x[t])) * x[t - 1]`. The first token of a document has
    no previous one. While decoding, embeddings are kept beside the layers' keys and values, as one more layer
    of the cache: it is reordered, cropped and repeated with the others, and a chunk that follows a cached
    prefix continues as if both had come at once.
    """

    def __init__(self, config: TesseraConfig):
        super().__init__()
        self.cache_idx = config.num_hidden_layers
        self.gate = TesseraGate(config.smear_gate_channels, 1)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache | None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, T, C] at positions [B, T] or [1, T] -> embeddings [B, T, C].

        `before` [B, T, C] are the embeddings before each token where the caller knows them, as continuous
        batching does; otherwise they are those to the left, and in the cache.
        """
        if before is not None:
            return self._mix(x, before, (position_ids > 0).unsqueeze(-1))
        carried = None if cache is None else self._exchange(x, cache)
        follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
        if carried is None:
            previous = torch.zeros_like(x[:, :1])
            first = torch.zeros_like(position_ids[:, :1], dtype=torch.bool)
        else:
            previous, first = carried, position_ids[:, :1] > 0
        previous = torch.cat([previous, x[:, :-1]], dim=1)
        return self._mix(x, previous, torch.cat([first, follows], dim=1).unsqueeze(-1))

    def _mix(self, x: torch.Tensor, previous: torch.Tensor, follows: torch.Tensor) -> torch.Tensor:
        gate = self.strength * torch.sigmoid(self.gate(x))
        return x + torch.where(follows, gate * previous, 0.0).to(x.dtype)

    def _exchange(self, x: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        """Stores the embeddings in the cache and returns the one before them [B, 1, C], if there is one."""
        if cache.layer_class_to_replicate is None and len(cache.layers) == self.cache_idx:
            if isinstance(cache, StaticCache):
                cache.layers.append(StaticSlidingWindowLayer(max_cache_len=2, sliding_window=2))
            else:
                # All of them and not the last alone, so that any number of tokens can be taken back.
                cache.layers.append(DynamicLayer())
        seen = len(cache.layers) > self.cache_idx and cache.layers[self.cache_idx].get_seq_length() > 0
        states = x.unsqueeze(1)
        kept, _ = cache.update(states, states[..., :0], self.cache_idx)
        if not seen:
            return None
        last = min(kept.shape[-2], cache.get_seq_length(self.cache_idx)) - x.shape[1] - 1
        return kept[:, 0, last : last + 1]

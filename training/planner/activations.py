"""What a training step keeps between forward and backward pass, in bytes for each token.

A formula for each tile of a layer, in the compiled step (what torch's min-cut partitioner saves) and the
eager one (what autograd saves). `tests/training/planner/test_activations.py` holds them against the bytes
that a traced step of a small model does keep. What belongs here: activations; what does not grow with the
tokens is in `memory.py`. Letters: C hidden, D head size, I intermediate, E experts, K chosen experts.
"""

from dataclasses import dataclass

from tessera.modeling.configuration_tessera import TesseraConfig

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class Arithmetic:
    """Which dtypes a step computes in.

    Attributes:
        weight: bytes of a weight.
        stream: bytes of a number of the residual stream: in bf16 what products are, whatever the weights
            are; fp32 under fp16's autocast.
        product: bytes of a number that goes into matrix products.
        compiled: whether the step is.
    """

    weight: int
    stream: int
    product: int
    compiled: bool

    @property
    def casts(self) -> bool:
        """Whether weights are copied to the dtype of the products."""
        return self.weight != self.product


def kept_by_layer(config: TesseraConfig, index: int, how: Arithmetic) -> dict[str, float]:
    """Bytes for each token that a layer keeps: its attention, and its feed-forward.

    Args:
        config: of the model.
        index: of the layer; from `num_hidden_layers` on, one for multi-token prediction.
        how: dtypes of the step.
    """
    latent = config.attention_type == "latent"
    attention = _latent_attention(config, how) if latent else _attention(config, index, how)
    attention += _enters(config, how, 1 if latent and config.q_lora_rank is None else 3)
    if config.residual_scalars and index < config.num_hidden_layers:
        attention += how.stream * config.hidden_size  # what the factor on the stream is multiplied with
    if config.feed_forward_kind(index) == "sparse":
        return {"attention": attention, "experts": _experts(config, how) + _enters(config, how, 1)}
    readers = 2 if config.gated_mlp else 1
    forward = _mlp(config, config.intermediate_size, how) + _enters(config, how, readers)
    return {"attention": attention, "feed-forward": forward}


def kept_around_layers(config: TesseraConfig, how: Arithmetic) -> float:
    """Bytes for each token that are kept before the first layer and after the last: ids, embeddings, norm,
    and the gradient of the last hidden states, which the loss leaves."""
    width = config.hidden_size
    kept = INDEX + how.stream * width + FLOAT + how.product * width
    if config.embedding_norm or config.smear:
        kept += how.weight * width + FLOAT  # the embedding as it was looked up
    if config.smear and how.stream == how.product:
        kept += how.product * width  # its gate reads a few channels, of which the whole is kept
    if config.embd_pdrop:
        kept += width
    return kept


def checkpointed_layer(config: TesseraConfig, how: Arithmetic) -> float:
    """Bytes for each token that stay of a layer which is computed again."""
    return how.stream * config.hidden_size


def backward_of_layer(config: TesseraConfig, index: int, how: Arithmetic) -> float:
    """Bytes for each token that the last layer's feed-forward takes beside what is kept, going backward: one
    gradient between its products. What else comes takes the place of what is used up."""
    inner = config.intermediate_size
    if config.feed_forward_kind(index) == "sparse":
        inner = config.num_experts_per_tok * config.moe_intermediate_size
    return how.product * inner


def _enters(config: TesseraConfig, how: Arithmetic, readers: int) -> float:
    """The stream where it is normed, the norm's own numbers, and what the products read.

    Compiled, the normed stream is rounded once for all of them; eager, autocast rounds it for each.
    """
    width = config.hidden_size
    dropout = width if config.resid_pdrop else 0
    if how.compiled:
        return how.stream * width + FLOAT + how.product * width + dropout
    normed = how.stream * width if config.norm_weight and config.norm_type != "layer_norm" else 0
    copies = readers if how.casts else 1
    if not how.casts and normed:
        copies = 1
    return how.stream * width + FLOAT + normed + copies * how.product * width + dropout


def _attention(config: TesseraConfig, index: int, how: Arithmetic) -> float:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query, key = heads * config.head_dim, groups * config.head_dim
    # Queries, keys, values, the output, and the normalizers.
    kept = how.product * 2 * (query + key) + FLOAT * heads
    if config.qk_norm is not None:
        # Rotated with cosines of the stream's dtype.
        wide = how.stream if config.qk_norm == "after_rope" else how.product
        kept += wide * (query + key) + FLOAT * (heads + groups)
        if not how.compiled and config.norm_weight:
            kept += wide * (query + key)
    if config.has_value_embedding(index):
        kept += how.product * (key + config.value_gate_channels + groups)
        if not how.compiled:
            kept += how.product * key
    return kept


def _latent_attention(config: TesseraConfig, how: Arithmetic) -> float:
    heads = config.num_attention_heads
    both, value = config.qk_head_dim, config.v_head_dim
    # Values are a view of the product that made them and the keys.
    kept = how.product * heads * (2 * both + config.qk_nope_head_dim + 2 * value) + FLOAT * heads
    # The latent as it was projected, with the shared key beside it, and normed.
    kept += how.product * (2 * config.kv_lora_rank + config.qk_rope_head_dim) + FLOAT
    if config.q_lora_rank is not None:
        kept += 2 * how.product * config.q_lora_rank + FLOAT
    return kept


def _mlp(config: TesseraConfig, width: int, how: Arithmetic) -> float:
    between = 3 if config.gated_mlp else 2
    if config.gated_mlp and not how.compiled:
        between = 4  # the activation too
    return how.product * between * width


def _experts(config: TesseraConfig, how: Arithmetic) -> float:
    """Rows gathered for the chosen experts and what is between their products; the router's scores and the
    order of the rows."""
    chosen, inner = config.num_experts_per_tok, config.moe_intermediate_size
    between = (3 if config.gated_mlp else 2) * inner
    if config.gated_mlp and not how.compiled:
        between += inner
    rows = how.product * chosen * (config.hidden_size + between)
    router = 3 * FLOAT * config.n_routed_experts + chosen * (4 * INDEX + FLOAT)
    # Its input is fp32 whatever the rest is, unless autocast rounds it.
    router += (how.product if how.casts else FLOAT) * config.hidden_size
    shared = config.n_shared_experts * inner
    return rows + router + (_mlp(config, shared, how) if shared else 0)

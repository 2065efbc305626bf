"""How long a training step takes: a sum over kinds of work, each at the rate that a card has for it.

Products at the model's own shapes, attention, what goes elementwise over memory, head and loss, the update,
what cards tell one another, and the launches that an eager step cannot hide. What belongs here: operations
and bytes of a step, and the rates that they go at.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tessera.modeling.accounting import attention_flops
from tessera.modeling.configuration_tessera import TesseraConfig

from . import peak
from .activations import Arithmetic
from .cards import Card
from .memory import Inventory, Setup

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Fitted to kernels of compiled steps on an H200 (torch 2.11, 2026-11-30, `benchmarks/planner.py`, rows that
# say "fitted"): Llama shapes of 110M (autocast) and of 135M and 1.1B (bf16), nanochat d12 (both), experts of
# 688M (bf16); and to `peak.py` there. Since then attention copies less and experts move fewer rows:
# PRODUCT_NUMBERS (17.5 as fitted) and ROW_NUMBERS (32) were lowered by counting what fell away. Steps that
# were timed after that are in `tests/training/planner/test_planner.py`.
#
# Numbers read and written elementwise, both ways, for each number of a token's stream in a layer: those in
# the stream's dtype (norms, residual sums), those in that of the products (rotations, copies to and from the
# attention kernels, gradients of the products' inputs), and for each that is between two products.
STREAM_NUMBERS = 27
PRODUCT_NUMBERS = 13.5
NORMED_HEADS_NUMBERS = 15  # more with norms on queries and keys
SCALARS_NUMBERS = 8  # more with factors on the residual stream
GATED_NUMBERS, PLAIN_NUMBERS = 8, 5
ROW_NUMBERS = 18  # for each number of a row that is gathered for an expert
EAGER = 2.5  # times the numbers of a compiled step: nothing is fused
# Bytes for each logit beside the head's products, in bf16, at the rate of a copy: 0.18 to 0.19 ms of a kernel
# for 4096 x 32,768 of them. tanh of a soft-cap is not free, and was counted.
LOGIT_BYTES, SOFTCAP_BYTES = 5.9, 0.5
# Of the time that a product's operands take to move, what it does not hide; and its time in a step, where
# some of them are still in the cache, against that of a probe.
PRODUCT_BYTES = 0.34
IN_A_STEP = 0.88
GROUPED = 0.8  # rate of grouped products against plain ones
# Attention against large products, causal, both ways, in long rows; by size of a head. With cuDNN's passes
# for the gradient's row sums and for the queries' gradient, which are kernels of their own.
ATTENTION = {64: 0.535, 128: 0.715}
HALF_LENGTH = 1100  # tokens in a row at which it has half that rate
UNEQUAL_HEADS = 0.9  # keys and values of different sizes
GROUPED_QUERIES = 0.85
WINDOW = 0.47  # flex attention with a window against the plain one, for what it sees
SLOW_ATTENTION = 0.3  # cards without fused kernels at full rate; a guess
NEWTON_SCHULZ = 0.6  # Muon's products against large ones
UPDATE = {2: 0.62, 4: 0.8}  # rate of the fused update against a copy, by bytes of a weight
GAPS = 0.042  # between a compiled step's kernels, as a share of them
EAGER_OPS = 230  # operations of an eager layer, both ways
OP_SECONDS = 7e-6  # of the processor that launches one
# Of the processor, which works ahead: these count where the card has less to do. A pass of 6 compiled layers
# took 9.6 ms to launch, 45 kernels a layer among it; with passes recorded as CUDA graphs, a step of that
# model took 6.5 ms, of which the card had work for 5 (shakespeare, docs/races.md).
PASS_SECONDS, COMPILED_OPS = 7.7e-3, 45
LOOP_SECONDS = 6e-3  # rows, norm, update and what is told of a step
STEP_SECONDS = 5e-4  # of the card between steps
OVERLAP = 0.7  # share of the backward pass that communication hides behind


@dataclass(frozen=True)
class Rates:
    """What a card does in a second.

    Attributes:
        source: where they are from, in words.
        ceiling: FLOP/s of large products, which utilisation is told against.
        bandwidth: bytes per second, read and written together.
        link: bytes per second to another card.
        device: to probe at the model's own shapes, or None.
        dtype: of the products.
        flash: whether fused attention runs at full rate.
    """

    source: str
    ceiling: float
    bandwidth: float
    link: float
    device: torch.device | None = None
    dtype: torch.dtype = torch.bfloat16
    flash: bool = True

    def product(self, m: int, n: int, k: int) -> float:
        """Seconds of [m, k] @ [k, n]."""
        if self.device is not None:
            probed = min(m, PROBED_ROWS), min(n, PROBED_ROWS), min(k, PROBED_ROWS)
            rate = peak.product_rate(self.device, self.dtype, *probed)
            if rate:
                return IN_A_STEP * 2 * m * n * k / rate
        moved = self.dtype.itemsize * (m * k + k * n + m * n)
        return 2 * m * n * k / self.ceiling + PRODUCT_BYTES * moved / self.bandwidth

    def attention(self, config: TesseraConfig, length: int) -> float:
        """FLOP/s of causal attention, both ways."""
        latent = config.attention_type == "latent"
        both = config.qk_head_dim if latent else config.head_dim
        value = config.v_head_dim if latent else config.head_dim
        shared = 1.0 if config.num_key_value_heads == config.num_attention_heads else GROUPED_QUERIES
        if self.device is not None:
            heads = config.num_attention_heads
            rows = max(1, min(8, PROBED_ROWS // length))
            rate = peak.attention_rate(self.device, self.dtype, rows, heads, length, both, value)
            if rate:
                return rate * shared
        share = SLOW_ATTENTION
        if self.flash:
            wide = min(max((both + value) / 2, 32), 128)
            share = ATTENTION[64] + (ATTENTION[128] - ATTENTION[64]) * (wide - 64) / 64
        if both != value:
            share *= UNEQUAL_HEADS
        return self.ceiling * shared * share * length / (length + HALF_LENGTH)


PROBED_ROWS = 16384


def rates_of(card: Card, precision: str) -> Rates:
    """What a card of the table does."""
    ceiling = card.peaks.get(precision, card.peaks["fp32"]) * card.reached
    return Rates(
        "data sheet",
        ceiling,
        card.bandwidth * card.copied,
        card.link,
        dtype=DTYPES[precision],
        flash=card.flash,
    )


def rates_here(device: torch.device, precision: str, link: float) -> Rates:
    """What this machine's device does when it is asked.

    Raises:
        ValueError: if it cannot multiply in that precision.
    """
    dtype = DTYPES[precision]
    ceiling = peak.measured_peak(device, dtype)
    bandwidth = peak.copy_rate(device, 512 if device.type == "cuda" else 64)
    if ceiling is None or bandwidth is None:
        raise ValueError(f"this {device.type} has no products in {precision}; take another --precision")
    return Rates("measured here", ceiling, bandwidth, link, device, dtype)


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step on each card, by kind of work."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())


def estimate_times(setup: Setup, inventory: Inventory, rates: Rates) -> Times:
    """Time of an optimizer step.

    Args:
        setup: the model and how it is trained.
        inventory: what the model is made of.
        rates: of the card.
    """
    config, tokens, count = setup.config, setup.tokens, setup.accumulation
    products = sum(rates.product(*shape) * times for shape, times in _layer_products(setup, inventory))
    attention = _attention_seconds(setup, rates)
    elementwise = _elementwise_bytes(setup, inventory) / rates.bandwidth
    rows, width = inventory.head
    loss = sum(
        rates.product(*shape)
        for shape in ((tokens, rows, width), (tokens, width, rows), (rows, width, tokens))
    )
    each = LOGIT_BYTES + (SOFTCAP_BYTES if config.final_logit_softcapping else 0.0)
    loss += each * tokens * rows / rates.bandwidth
    parts = {
        "matrix products": count * products,
        "attention": count * attention,
        "elementwise": count * elementwise,
        "head and loss": count * loss,
    }
    if setup.checkpoint_every:
        share = len(range(0, config.num_hidden_layers, setup.checkpoint_every)) / config.num_hidden_layers
        again = parts["matrix products"] + parts["attention"] + parts["elementwise"]
        parts["recomputation"] = share * again / 3
    parts["update"] = _update_seconds(setup, inventory, rates)
    if setup.gpus > 1:
        parts["communication"] = _exposed_communication(setup, inventory, rates, sum(parts.values()))
    parts["between kernels"] = STEP_SECONDS + GAPS * sum(parts.values())
    parts["waiting for launches"] = max(0.0, _launching_seconds(setup) - sum(parts.values()))
    return Times({name: seconds for name, seconds in parts.items() if seconds})


def _launching_seconds(setup: Setup) -> float:
    """Of the processor, for a step: it launches what the card does, unless the passes are recorded."""
    config = setup.config
    alone = setup.gpus == 1 and setup.precision != "fp16" and not setup.optimizer_in_backward
    if setup.compiled and alone and not config.n_routed_experts and not setup.checkpoint_every:
        return LOOP_SECONDS  # `cuda_graphs.py` records them where launching takes longer
    kernels = (COMPILED_OPS if setup.compiled else EAGER_OPS) * config.num_hidden_layers
    each = kernels * OP_SECONDS + (PASS_SECONDS if setup.compiled else 0.0)
    return LOOP_SECONDS + setup.accumulation * each


def _layer_products(setup: Setup, inventory: Inventory) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Shapes (m, n, k) of the layers' products of a micro-batch, forward and backward, and how often."""
    tokens = setup.tokens
    for (rows, columns), times in inventory.linears.items():
        for shape in ((tokens, rows, columns), (tokens, columns, rows), (rows, columns, tokens)):
            yield shape, times
    chosen = tokens * (setup.config.num_experts_per_tok or 0)
    for (rows, columns), times in inventory.experts.items():
        yield (chosen, rows, columns), 3 * times / GROUPED


def _attention_seconds(setup: Setup, rates: Rates) -> float:
    config, length = setup.config, setup.sequence_length
    ahead = config.num_mtp_layers if config.train_mtp else 0
    kinds = Counter(config.attention_kind(i) for i in range(config.num_hidden_layers + ahead))
    rate = rates.attention(config, length)
    seconds = 0.0
    for kind, times in kinds.items():
        windowed = kind == "sliding_attention" and config.sliding_window < length
        flops = 3 * attention_flops(config, kind, length) * setup.tokens * times
        seconds += flops / (rate * (WINDOW if windowed else 1.0))
    return seconds


def _elementwise_bytes(setup: Setup, inventory: Inventory) -> float:
    """Bytes that a micro-batch reads and writes beside the products."""
    config, how = setup.config, setup.arithmetic
    ahead = config.num_mtp_layers if config.train_mtp else 0
    moved = sum(_numbers(config, i, how) for i in range(config.num_hidden_layers + ahead)) * setup.tokens
    if not setup.compiled:
        moved *= EAGER
    if how.casts:
        # Weights are rounded, their gradients widened.
        moved += 2 * (how.weight + how.product) * inventory.multiplied
    if setup.accumulation > 1:
        moved += 3 * setup.weight_bytes * inventory.parameters
    return moved


def _numbers(config: TesseraConfig, index: int, how: Arithmetic) -> float:
    """Bytes for each token that a compiled layer reads and writes elementwise."""
    width, between = config.hidden_size, GATED_NUMBERS if config.gated_mlp else PLAIN_NUMBERS
    stream, product = STREAM_NUMBERS * width, PRODUCT_NUMBERS * width
    if config.qk_norm is not None:
        product += NORMED_HEADS_NUMBERS * width
    if config.residual_scalars:
        product += SCALARS_NUMBERS * width
    if config.feed_forward_kind(index) == "sparse":
        chosen = config.num_experts_per_tok
        product += between * (chosen + config.n_shared_experts) * config.moe_intermediate_size
        product += ROW_NUMBERS * chosen * width
    else:
        product += between * config.intermediate_size
    return how.stream * stream + how.product * product


def _update_seconds(setup: Setup, inventory: Inventory, rates: Rates) -> float:
    """The norm, its clipping, and the optimizer: bytes, and Muon's products."""
    size, moment = setup.weight_bytes, setup.moment_bytes
    moved = 3 * size * inventory.parameters  # the norm reads gradients, clipping reads and writes them
    plain = inventory.parameters
    flops = 0.0
    if setup.optimizer == "muon":
        plain -= inventory.muon
        # Gradient, weight and momentum; the update passes through bf16 and back.
        moved += (3 * size + 2 * moment + 8) * inventory.muon
        for (rows, columns), count in inventory.stacks.items():
            small, large = sorted((rows, columns))
            flops += 5 * count * (4 * small**2 * large + 2 * small**3)
    moments = 2 if setup.optimizer == "adamw-8bit" else 4 * moment
    moved += (3 * size + moments) * plain
    if setup.weights == "split":
        moved += 4 * inventory.parameters
    share = 1 / setup.gpus if setup.sharded else 1.0
    return share * (moved / (UPDATE[size] * rates.bandwidth) + flops / (NEWTON_SCHULZ * rates.ceiling))


def _exposed_communication(setup: Setup, inventory: Inventory, rates: Rates, busy: float) -> float:
    """Seconds of communication that no work hides.

    Replicated, gradients are summed once a step, behind the backward pass of the last micro-batch; sharded,
    weights are gathered for both passes of each micro-batch and gradients scattered.
    """
    ring = (setup.gpus - 1) / setup.gpus
    if setup.sharded:
        passes = setup.accumulation * (2 * setup.arithmetic.product + setup.weight_bytes)
        needed = ring * passes * inventory.parameters / rates.link
        return max(0.0, needed - OVERLAP * busy)
    needed = 2 * ring * setup.weight_bytes * inventory.parameters / rates.link
    return max(0.0, needed - OVERLAP * busy * 2 / 3 / setup.accumulation)

"""How much memory a training step takes at its peak, by part.

A step has four moments at which memory can be highest, and the largest of them counts: the loss, when all
activations are there; the start of the backward pass; its end, when all gradients are; and the update. What
belongs here: what is alive at these moments. What activations are made of is in `activations.py`.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.feed_forward import TesseraExperts, TesseraRouter, TesseraUngatedExperts
from tessera.modeling.layers import TesseraGate
from tessera.modeling.loss import FEWEST_TOKENS, LARGE_HEAD, LOGITS_AT_A_TIME, WIDE
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .activations import (
    Arithmetic,
    backward_of_layer,
    checkpointed_layer,
    kept_around_layers,
    kept_by_layer,
)

OPTIMIZERS = ("muon", "adamw", "adamw-8bit")
WEIGHTS = ("fp32", "bf16", "split")
PRECISIONS = ("bf16", "fp16", "fp32")
GIB = 2**30

# What the libraries of products and attention keep in the allocator: cuBLAS takes 32 MiB on Hopper.
WORKSPACE = 2**26
# Beside the allocator: the driver's context, libraries, kernels.
CONTEXT = 0.6 * GIB
# Reserved by the allocator over what it has handed out, on top of that.
FRAGMENTATION = 1.04


@dataclass(frozen=True)
class Setup:
    """A model and how it is trained.

    Attributes:
        config: the model.
        micro_batch_size: rows that a card takes at a time.
        batch_size: rows of a step, over all cards.
        sequence_length: tokens in a row.
        optimizer, weights, precision: of `OPTIMIZERS`, `WEIGHTS`, `PRECISIONS`.
        compiled: whether forward and backward pass are.
        checkpoint_every: every n-th layer is computed again in the backward pass; 0 for none.
        optimizer_in_backward: each gradient is used and dropped as soon as it is there.
        gpus: cards that share the batch.
        sharded: whether weights, gradients and optimizer state are split over them (FSDP).
        narrow_moments: whether the optimizer's moments are bf16, as torch's are beside bf16 weights.
    """

    config: TesseraConfig
    micro_batch_size: int
    batch_size: int
    sequence_length: int
    optimizer: str = "muon"
    weights: str = "fp32"
    precision: str = "bf16"
    compiled: bool = True
    checkpoint_every: int = 0
    optimizer_in_backward: bool = False
    gpus: int = 1
    sharded: bool = False
    narrow_moments: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each card."""
        return max(1, -(-self.batch_size // (self.micro_batch_size * self.gpus)))

    @property
    def weight_bytes(self) -> int:
        """Of a stored weight, and of its gradient."""
        return 4 if self.weights == "fp32" else 2

    @property
    def moment_bytes(self) -> int:
        """Of a number of the optimizer's state."""
        return 2 if self.narrow_moments else 4

    @property
    def arithmetic(self) -> Arithmetic:
        """The dtypes of a step."""
        product = 4 if self.precision == "fp32" else 2
        stream = 2 if self.precision == "bf16" else 4  # fp16 has too little range for sums
        return Arithmetic(self.weight_bytes, stream, product, self.compiled)


@dataclass(frozen=True)
class Inventory:
    """What a model is made of, counted on one without memory.

    Attributes:
        parameters: all of them; a tied head counts once.
        multiplied: those that products read, of which there are copies in the dtype of the products.
        muon: those that Muon updates.
        stacks: shapes that Muon stacks, and how many matrices of each.
        largest: numbers in the largest parameter.
        layer: parameters of the largest layer.
        linears: (rows, columns) of dense products in the layers, and how often.
        experts: (rows, columns) of stacked ones, of one expert, and how many such stacks.
        head: (rows, columns) of the head.
        tables: parameters of the tables that are looked up.
    """

    parameters: int
    multiplied: int
    muon: int
    stacks: Counter
    largest: int
    layer: int
    linears: Counter
    experts: Counter
    head: tuple[int, int]
    tables: int


def take_inventory(config: TesseraConfig) -> Inventory:
    """Counts a model; nothing is allocated."""
    with torch.device("meta"):
        model = TesseraForCausalLM(config)
    linears, experts, multiplied = Counter(), Counter(), 0
    for module in model.model.modules():
        if isinstance(module, nn.Linear | TesseraGate | TesseraRouter):
            linears[tuple(module.weight.shape)] += 1
            multiplied += module.weight.numel()
        elif isinstance(module, TesseraExperts | TesseraUngatedExperts):
            for p in module.parameters():
                experts[tuple(p.shape[1:])] += 1
                multiplied += p.numel()
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    # As `optimizers/groups.py` has it: Muon takes the matrices of the layers, and no table, gate or head.
    stacks, muon = Counter(), 0
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | TesseraGate)}
    for p in model.model.parameters():
        if p.ndim >= 2 and id(p) not in looked_up:
            stacks[tuple(p.shape[-2:])] += p.numel() // (p.shape[-2] * p.shape[-1])
            muon += p.numel()
    return Inventory(
        parameters=model.num_parameters(),
        multiplied=multiplied,
        muon=muon,
        stacks=stacks,
        largest=max(p.numel() for p in model.parameters()),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers),
        linears=linears,
        experts=experts,
        head=tuple(model.lm_head.weight.shape),
        tables=tables,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one card at the moment when they are most.

    Attributes:
        moment: "loss", "backward", "gradients" or "update".
        parts: bytes by name, in the order in which they are told.
        moments: bytes at each of the moments.
    """

    moment: str
    parts: dict[str, float]
    moments: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes that the allocator has handed out."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes that the card must have for it: with what the allocator holds beside, and the driver."""
        return self.peak * FRAGMENTATION + CONTEXT


def estimate_memory(setup: Setup, inventory: Inventory | None = None) -> Memory:
    """Peak memory of a training step on one card.

    Args:
        setup: the model and how it is trained.
        inventory: of the model, if it was taken.
    """
    inventory = inventory or take_inventory(setup.config)
    config, how, tokens = setup.config, setup.arithmetic, setup.tokens
    standing = _standing(setup, inventory)
    activations = _activations(setup)
    around = tokens * kept_around_layers(config, how)
    rows, width = inventory.head
    head = rows * width
    logits = LOGITS_AT_A_TIME if width < WIDE else LOGITS_AT_A_TIME // 2
    at_a_time = min(tokens, max(FEWEST_TOKENS, logits // rows))
    summed = how.product if not how.casts and head >= LARGE_HEAD else 4
    gradient = setup.weight_bytes * head  # of the head's weight, kept until the backward pass reaches it
    copies = how.product * inventory.multiplied if how.casts else 0
    if setup.sharded:
        # Of two layers at a time the whole weights are there.
        copies = 2 * how.product * inventory.layer
    last = _last_layer(setup)
    share = 1 / setup.gpus if setup.sharded else 1.0
    grads = setup.weight_bytes * inventory.parameters * share
    if setup.optimizer_in_backward:
        grads = setup.weight_bytes * inventory.largest
    earlier = grads if setup.accumulation > 1 and not setup.optimizer_in_backward else 0.0
    common = {
        **standing,
        "copies of weights": copies,
        **activations,
        "around the layers": around,
        "workspace": WORKSPACE,
    }
    moments = {
        "loss": {
            **common,
            "gradients": earlier,
            "loss and logits": how.product * at_a_time * rows
            + (summed + (how.weight if summed != how.weight else 0)) * head
            + (how.product * head if how.casts else 0),
        },
        "backward": {
            **common,
            "gradients": earlier,
            "loss and logits": gradient,
            "backward of a layer": tokens * last,
        },
        "gradients": {
            **standing,
            # A compiled pass hands out all its gradients at its end, and they are added up then.
            "gradients": grads + (earlier if setup.compiled else 0.0),
            "around the layers": around,
            "backward of a layer": tokens * backward_of_layer(config, 0, how) / 2,
            "workspace": WORKSPACE,
        },
        "update": {
            **standing,
            "gradients": grads,
            "update": _update(setup, inventory) * share,
            "workspace": WORKSPACE,
        },
    }
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=totals.get)
    parts = {name: size for name, size in moments[moment].items() if size}
    return Memory(moment, parts, totals)


def _standing(setup: Setup, inventory: Inventory) -> dict[str, float]:
    """What is there between steps."""
    share = 1 / setup.gpus if setup.sharded else 1.0
    others = inventory.parameters
    state = 0.0
    if setup.optimizer == "muon":
        others -= inventory.muon
        # Of replicas each keeps the momentum of the matrices that it updates.
        state += setup.moment_bytes * inventory.muon / (1 if setup.sharded else setup.gpus)
    # 8-bit moments have a scale of 4 bytes for every 256 numbers.
    state += (2 + 8 / 256 if setup.optimizer == "adamw-8bit" else 2 * setup.moment_bytes) * others
    if setup.weights == "split":
        state += 2 * inventory.parameters
    return {
        "weights": setup.weight_bytes * inventory.parameters * share,
        "optimizer state": state * share,
    }


def _activations(setup: Setup) -> dict[str, float]:
    """Bytes that the layers keep, by kind."""
    config, how = setup.config, setup.arithmetic
    ahead = config.num_mtp_layers if config.train_mtp else 0
    kept = {}
    for i in range(config.num_hidden_layers + ahead):
        if setup.checkpoint_every and i % setup.checkpoint_every == 0:
            parts = {"checkpoints": checkpointed_layer(config, how)}
        else:
            parts = kept_by_layer(config, i, how)
        for name, size in parts.items():
            kept[name] = kept.get(name, 0.0) + setup.tokens * size
    return kept


def _last_layer(setup: Setup) -> float:
    """Bytes for each token beside what is kept, while the last layer goes backward."""
    config, how = setup.config, setup.arithmetic
    last = config.num_hidden_layers - 1
    size = backward_of_layer(config, last, how)
    if setup.checkpoint_every:
        # The largest of those that are computed again has its activations back meanwhile.
        again = range(0, config.num_hidden_layers, setup.checkpoint_every)
        size += max(sum(kept_by_layer(config, i, how).values()) for i in again)
    return size


def _update(setup: Setup, inventory: Inventory) -> float:
    """Bytes that the optimizer's step takes for itself: Muon's, for the matrices that it iterates at once."""
    if setup.optimizer != "muon" or not inventory.stacks:
        return 0.0
    numbers = 0
    for (rows, columns), count in inventory.stacks.items():
        one = rows * columns
        numbers = max(numbers, one * min(count, max(1, min(MUON_AT_ONCE, MUON_NUMBERS // one))))
    return MUON_UPDATE * numbers


# As Muon batches matrices (`optimizers/mixed.py`), and bytes for each number: bf16 before and after a
# product, fp32 where the momentum looks ahead.
MUON_AT_ONCE, MUON_NUMBERS, MUON_UPDATE = 16, 2**28, 8

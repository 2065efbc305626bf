"""A run before it is run: what it takes of a card, how long, at what price, and what to change if it does not
fit.

What belongs here: from what a user asks to a plan, and ways to make it fit. What memory and time are made of
is in `memory.py` and `throughput.py`, hardware in `cards.py`, the plan in words in `report.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tessera.modeling.accounting import Costs, count_costs
from tessera.modeling.configuration_tessera import TesseraConfig

from .cards import Card, find_card
from .memory import (
    OPTIMIZERS,
    PRECISIONS,
    WEIGHTS,
    Inventory,
    Memory,
    Setup,
    estimate_memory,
    take_inventory,
)
from .throughput import Rates, Times, estimate_times, rates_here, rates_of

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022
STEP_TOKENS = 2**19  # half a million: what models of these sizes are usually given
MICRO_TOKENS = 2**16  # beyond, a card gains nothing
COMFORT = 0.92  # share of a card that a micro-batch is chosen for
MOST_CARDS = 1024


@dataclass(frozen=True)
class Change:
    """One way to make a run smaller, and what becomes of it.

    Attributes:
        title: what is changed, in words.
        flags: of `tessera pretrain`.
        setup, memory, times: as they are then.
        fits: whether the card is large enough then.
    """

    title: str
    flags: str
    setup: Setup
    memory: Memory
    times: Times
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        name: of the model.
        card: what it runs on.
        setup: the model and how it is trained.
        costs: parameters and operations, at the length of the rows.
        memory, times, rates: the estimates, and what they were made with.
        tokens: of the whole run.
        price: dollars for an hour of one card, or None.
        changes: each alone, in order of their cost, if it does not fit; the last may be several together.
    """

    name: str
    card: Card
    setup: Setup
    costs: Costs
    memory: Memory
    times: Times
    rates: Rates
    tokens: float
    price: float | None
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the card is large enough."""
        return self.memory.needed <= self.card.memory

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all cards."""
        return self.setup.batch_size * self.setup.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Over all cards."""
        return tokens_per_second(self.setup, self.times)

    @property
    def hours(self) -> float:
        """Of training; validation, checkpoints and the first compilation come on top."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def utilization(self) -> float:
        """Share of the card's ceiling that the model's own operations take."""
        return self.costs.training_flops * self.tokens_per_second / self.setup.gpus / self.rates.ceiling


def tokens_per_second(setup: Setup, times: Times) -> float:
    """Over all cards."""
    return setup.tokens * setup.accumulation * setup.gpus / times.step


def make_plan(
    name: str,
    config: TesseraConfig,
    gpu: str | None = None,
    gpus: int = 1,
    tokens: float | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    sequence_length: int | None = None,
    optimizer: str | None = None,
    weights: str = "fp32",
    precision: str = "auto",
    compiled: bool | None = None,
    checkpoint_every: int = 0,
    optimizer_in_backward: bool = False,
    sharded: bool = False,
    price: float | None = None,
) -> Plan:
    """Plans a run.

    Args:
        name: of the model, for the report.
        config: the model.
        gpu: a card of `cards.py`; "here" is this machine's, probed; default: that where it has one, else an
            H200.
        gpus: cards that share the batch.
        tokens: of the whole run; default: 20 for each parameter that a token uses.
        batch_size: rows of a step, over all cards; default: about half a million tokens.
        micro_batch_size: rows of a card at a time; default: what fits, at most 65,536 tokens.
        sequence_length: default: the model's context, at most 2048.
        optimizer, weights, precision: see `memory.Setup`; precision "auto" is the card's fastest.
        compiled: default: where the card has the compiler's kernels.
        checkpoint_every: every n-th layer is computed again; 0 for none.
        optimizer_in_backward: gradients go as they come.
        sharded: FSDP instead of DDP.
        price: dollars for an hour of a card.

    Raises:
        ValueError: for what cannot be: a card or a word that is not known, a number that makes no sense.
    """
    card, device = _card_of(gpu)
    optimizer = optimizer or "muon"
    for what, value, known in (("optimizer", optimizer, OPTIMIZERS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got '{value}'")
    precision = _precision(precision, card)
    if weights != "fp32" and precision != "bf16":
        raise ValueError(f"weights '{weights}' are bf16 in memory and need precision bf16, got {precision}")
    for what, value in (
        ("gpus", gpus),
        ("tokens", tokens),
        ("batch_size", batch_size),
        ("micro_batch_size", micro_batch_size),
        ("sequence_length", sequence_length),
        ("price", price),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{what} must be positive, got {value:g}")
    if checkpoint_every < 0:
        raise ValueError(f"gradient_checkpointing_every must not be negative, got {checkpoint_every}")
    context = config.max_position_embeddings
    length = min(context, 2048) if sequence_length is None else sequence_length
    if length > context:
        raise ValueError(
            f"sequence_length {length} is longer than the model's context of {context} positions"
        )
    if batch_size is None:
        batch_size = max(1, round(STEP_TOKENS / length / gpus)) * gpus
    if batch_size % gpus:
        raise ValueError(f"batch_size {batch_size} does not divide by {gpus} cards")
    setup = Setup(
        config=config,
        micro_batch_size=min(micro_batch_size or 1, batch_size // gpus),
        batch_size=batch_size,
        sequence_length=length,
        optimizer=optimizer,
        weights=weights,
        precision=precision,
        compiled=card.triton if compiled is None else compiled,
        checkpoint_every=checkpoint_every,
        optimizer_in_backward=optimizer_in_backward,
        gpus=gpus,
        sharded=sharded and gpus > 1,
    )
    if setup.sharded and optimizer == "adamw-8bit":
        raise ValueError("adamw-8bit does not take weights that are split over cards; take adamw, or ddp")
    inventory = take_inventory(config)
    if micro_batch_size is None:
        setup = _with_fitting_micro_batch(setup, inventory, card)
    if optimizer_in_backward and setup.accumulation > 1:
        raise ValueError(
            f"optimizer_in_backward updates at every micro-batch, and a step of {batch_size} rows has "
            f"{setup.accumulation} of {setup.micro_batch_size} on each card; give a smaller batch_size"
        )
    rates = rates_of(card, precision) if device is None else rates_here(device, precision, card.link)
    memory = estimate_memory(setup, inventory)
    times = estimate_times(setup, inventory, rates)
    costs = count_costs(config, length)
    changes = ()
    if memory.needed > card.memory:
        changes = tuple(suggest(setup, inventory, card, rates))
    whole = TOKENS_PER_PARAMETER * costs.active if tokens is None else tokens
    return Plan(name, card, setup, costs, memory, times, rates, whole, price, changes)


def suggest(setup: Setup, inventory: Inventory, card: Card, rates: Rates) -> Iterator[Change]:
    """Ways to fit, in order of what they cost: each alone at the mildest value that fits or, if none does, at
    its strongest; and all of them one upon the other, until it fits, if none does alone."""
    alone = [change for name in _WAYS if (change := _mildest(name, setup, inventory, card, rates))]
    yield from alone
    if any(change.fits for change in alone):
        return
    # 8-bit moments do not go with weights that are split over cards.
    for without in ("cards", "moments"):
        titles, flags, now = [], [], setup
        for name in _WAYS:
            change = None if name == without else _mildest(name, now, inventory, card, rates)
            if change is None:
                continue
            titles.append(change.title)
            flags.append(change.flags)
            now = change.setup
            if change.fits:
                yield replace(change, title="together: " + ", ".join(titles), flags=" ".join(flags))
                return


def _mildest(way: str, setup: Setup, inventory: Inventory, card: Card, rates: Rates) -> Change | None:
    change = None
    for title, flags, changed in _WAYS[way](setup):
        memory = estimate_memory(changed, inventory)
        times = estimate_times(changed, inventory, rates)
        change = Change(title, flags, changed, memory, times, memory.needed <= card.memory)
        if change.fits:
            break
    if change is None or change.memory.needed >= estimate_memory(setup, inventory).needed:
        return None  # what is most is elsewhere
    return change


_Steps = Iterator[tuple[str, str, Setup]]


def _smaller_micro_batch(setup: Setup) -> _Steps:
    rows = setup.micro_batch_size // 2
    while rows >= 1 and not setup.optimizer_in_backward:
        yield (
            f"micro-batch of {rows}",
            f"--micro-batch-size {rows}",
            replace(setup, micro_batch_size=rows),
        )
        rows //= 2


def _checkpointing(setup: Setup) -> _Steps:
    for every in (4, 3, 2, 1):
        if not setup.checkpoint_every or every < setup.checkpoint_every:
            layers = (
                "every layer"
                if every == 1
                else f"every {every}{'rd' if every == 3 else {2: 'nd'}.get(every, 'th')} layer"
            )
            yield (
                f"{layers} computed again",
                f"--gradient-checkpointing --gradient-checkpointing-every {every}",
                replace(setup, checkpoint_every=every),
            )


def _narrow_weights(setup: Setup) -> _Steps:
    if setup.weights == "fp32" and setup.precision == "bf16":
        yield "bf16 weights with the rest beside them", "--weights split", replace(setup, weights="split")


def _narrow_moments(setup: Setup) -> _Steps:
    if setup.optimizer == "adamw":
        yield "8-bit AdamW", "--optimizer adamw-8bit", replace(setup, optimizer="adamw-8bit")


def _update_in_backward(setup: Setup) -> _Steps:
    if setup.accumulation == 1 and not setup.optimizer_in_backward and not setup.sharded:
        yield (
            "the update within the backward pass, without clipping",
            "--optimizer-in-backward --clip 0",
            replace(setup, optimizer_in_backward=True),
        )


def _more_cards(setup: Setup) -> _Steps:
    if setup.optimizer == "adamw-8bit" or setup.optimizer_in_backward:
        return
    cards = 2 * setup.gpus if setup.sharded else max(2, setup.gpus)
    while cards <= MOST_CARDS:
        batch = -(-setup.batch_size // cards) * cards
        yield (
            f"split over {cards} cards (FSDP)",
            f"--parallel fsdp (accelerate launch --num_processes {cards})",
            replace(
                setup,
                gpus=cards,
                sharded=True,
                batch_size=batch,
                micro_batch_size=min(setup.micro_batch_size, batch // cards),
            ),
        )
        cards *= 2


_WAYS = {
    "micro-batch": _smaller_micro_batch,
    "checkpointing": _checkpointing,
    "weights": _narrow_weights,
    "moments": _narrow_moments,
    "update": _update_in_backward,
    "cards": _more_cards,
}


def _with_fitting_micro_batch(setup: Setup, inventory: Inventory, card: Card) -> Setup:
    """The largest power of two that leaves the card some room."""
    most = setup.batch_size // setup.gpus
    if setup.optimizer_in_backward:
        return replace(setup, micro_batch_size=most)
    rows = 1
    while 2 * rows <= most and 2 * rows * setup.sequence_length <= MICRO_TOKENS:
        larger = replace(setup, micro_batch_size=2 * rows)
        if estimate_memory(larger, inventory).needed > COMFORT * card.memory:
            break
        rows *= 2
    return replace(setup, micro_batch_size=rows)


def _precision(asked: str, card: Card) -> str:
    if asked == "auto":
        return card.precision
    if asked not in PRECISIONS:
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS[:-1])} or fp32, got '{asked}'")
    if asked not in card.peaks:
        raise ValueError(
            f"{card.title} has no {asked}; take {' or '.join(p for p in PRECISIONS if p in card.peaks)}"
        )
    return asked


def _card_of(gpu: str | None) -> tuple[Card, torch.device | None]:
    """A card of the table, or this machine's with the device to probe."""
    if gpu is None:
        gpu = "here" if torch.cuda.is_available() else "h200"
    if gpu.strip().lower() != "here":
        return find_card(gpu), None
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        title = f"this processor, {torch.get_num_threads()} threads"
        peaks = {"fp32": 1.0, "bf16": 1.0}
        card = Card("here", title, memory, 1.0, peaks, 1.0, 1e9, 15.0 * torch.get_num_threads(), triton=False)
        return replace(card, peaks={"fp32": 1.0}), torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    known = _known(name)
    major = torch.cuda.get_device_capability(device)[0]
    peaks = {"fp16": 1.0, "fp32": 1.0} if major < 8 else {"bf16": 1.0, "fp16": 1.0, "fp32": 1.0}
    card = Card(
        name="here",
        title=name,
        memory=torch.cuda.get_device_properties(device).total_memory,
        bandwidth=0.0,
        peaks=peaks,
        reached=1.0,
        link=known.link if known else 20e9,
        watts=known.watts if known else 0.0,
        triton=major >= 7,
        flash=major >= 8,
    )
    return card, device


def _known(name: str) -> Card | None:
    """The card of the table that a driver's name means, for what cannot be probed."""
    words = name.lower().replace("-", " ").split()
    for word in words:
        try:
            return find_card(word)
        except ValueError:
            continue
    return None

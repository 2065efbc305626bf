"""The dial: how long a model is trained, in what steps and at what rates, from its size alone.

`--depth` sets the sizes of the model (`configs/presets.py`); what is not given beside it follows here. What
is given stays. Two rules:

- Muon: nanochat's (`base_train.py`, July 2026). All was measured on one model, its depth 12, trained on 12
  tokens for each parameter of layers and head in steps of 2^19 tokens. From there the batch grows with the
  tokens to the power 0.383 (Bergsma et al., "Power Lines", 2025), rates with the root of the batch, and
  weight decay so that the stretch over which weights forget, batch / (rate x decay), stays the same share of
  a run (Wang and Aitchison, 2024). That these hold for Muon is nanochat's assumption.
- AdamW: the Step Law (Li et al., 2025), fitted to 3,700 dense and sparse models: a batch of
  0.58 D^0.571 tokens and a rate of 1.79 N^-0.713 D^0.307, for D tokens and N parameters outside of tables and
  head, with a weight decay of 0.1. D is 20 tokens a parameter (Hoffmann et al., 2022). With another batch the
  rate goes with its root (Malladi et al., 2022).

Both are extrapolations for models far smaller than those they were fitted to. What belongs here: numbers from
sizes. When the rates change in a run is `schedules.py`, whose rate they are `optimizers/groups.py`.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

from tessera.modeling.accounting import count_costs
from tessera.modeling.configuration_tessera import TesseraConfig

from .optimizers.groups import MATRIX_RATE
from .pretrain_arguments import LENGTHS, PretrainArguments

MUON_RATIO = 12.0  # tokens a parameter; nanochat's log found 10.5 to be the best use of operations
MUON_DECAY = 0.28
REFERENCE_BATCH = 2**19
# Matrices of nanochat at depth 12, with the gates of its value embeddings, and its width.
REFERENCE_LAYERS, REFERENCE_WIDTH = 84_935_088, 768
BATCH_EXPONENT = 0.383
MOST_FORGOTTEN = 0.05  # of a weight in a step, where the rule asks for more of a run of few steps

ADAMW_RATIO = 20.0
ADAMW_DECAY = 0.1
# The largest that was best for any size in the runs that the Step Law's authors released, which tried up to
# 2^-5.5.
MOST_ADAMW_RATE = 2**-7


@dataclass(frozen=True)
class Sizes:
    """Of a model, as the rules count them.

    Attributes:
        parameters: that a token is multiplied with: layers and head, K of E experts, no tables.
        layers: all parameters outside of tables and head.
        vocabulary: columns of the head.
    """

    parameters: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Rates:
    """What a rule makes of sizes and tokens: tokens in a step, rate of the matrices, weight decay."""

    batch_tokens: float
    learning_rate: float
    weight_decay: float


def measure(config: TesseraConfig) -> Sizes:
    """Counts a configuration; nothing is allocated."""
    costs = count_costs(config)
    vocabulary = config.padded_vocab_size
    head = vocabulary * config.hidden_size
    tied = head if config.tie_word_embeddings else 0  # counted with the tables
    layers = costs.parameters - costs.embedding + tied - head
    return Sizes(costs.active - costs.embedding + tied, layers, vocabulary)


def muon_rates(sizes: Sizes, tokens: float, ratio: float = MUON_RATIO, batch: float | None = None) -> Rates:
    """nanochat's rule.

    Args:
        sizes: of the model.
        tokens: of the whole run.
        ratio: tokens a parameter that the reference is thought to be trained on.
        batch: tokens in a step where that is given; else the power of two that is nearest to the rule.
    """
    reference = ratio * (REFERENCE_LAYERS + REFERENCE_WIDTH * sizes.vocabulary)
    if batch is None:
        batch = _power_of_two(REFERENCE_BATCH * (tokens / reference) ** BATCH_EXPONENT)
    root = math.sqrt(batch / REFERENCE_BATCH)
    rate, decay = MATRIX_RATE * root, MUON_DECAY * root * reference / tokens
    return Rates(batch, rate, min(decay, MOST_FORGOTTEN / rate))


def table_scale(args: PretrainArguments, config: TesseraConfig) -> float:
    """Factor on the rates of embeddings and head beside Muon: a root of the width, as in nanochat.

    With a depth alone, and for the start whose rates are nanochat's; they were found at a width of 768.
    """
    if args.depth is None or config.initializer != "nanochat":
        return 1.0
    return math.sqrt(REFERENCE_WIDTH / config.hidden_size)


def adamw_rates(sizes: Sizes, tokens: float, batch: float | None = None) -> Rates:
    """The Step Law; arguments as in `muon_rates`."""
    best = 0.58 * tokens**0.571
    rate = 1.79 * sizes.layers**-0.713 * tokens**0.307
    batch = _power_of_two(best) if batch is None else batch
    return Rates(batch, min(rate * math.sqrt(batch / best), MOST_ADAMW_RATE), ADAMW_DECAY)


def scale_arguments(
    args: PretrainArguments, config: TesseraConfig, length: int, processes: int = 1
) -> PretrainArguments:
    """What a run is told, with a length in tokens, and with what `depth` leaves to the rules filled in.

    Args:
        args: of the run, with its optimizer; `flops` and `tokens_per_parameter` become tokens, with or
            without a depth.
        config: of the model, with its vocabulary.
        length: positions in a row.
        processes: that rows are shared by; the batch comes to a multiple of them.

    Returns:
        Arguments whose `chosen` names what was filled in.
    """
    by_rule = args.depth is not None
    if not by_rule and args.flops is None and args.tokens_per_parameter is None:
        return args
    sizes, filled = measure(config), {}
    ratio = args.tokens_per_parameter
    if by_rule and all(getattr(args, name) is None for name in LENGTHS):
        ratio = filled["tokens_per_parameter"] = MUON_RATIO if args.optimizer == "muon" else ADAMW_RATIO
    limits = [] if args.tokens is None else [args.tokens]
    if ratio is not None:
        limits.append(ratio * sizes.parameters)
    if args.flops is not None:
        limits.append(args.flops / flops_per_token(config, length))
    if limits:
        filled["tokens"] = max(1, int(min(limits)))
    if by_rule:
        filled |= _fill(args, sizes, filled.get("tokens"), length, processes)
    # What is given stays; of two limits in tokens, the nearer one is the length.
    new = {name for name in filled if getattr(args, name) is None}
    filled = {name: value for name, value in filled.items() if name in new or name == "tokens"}
    return dataclasses.replace(args, **filled, chosen=sorted({*(args.chosen or []), *new}) or None)


def _fill(
    args: PretrainArguments, sizes: Sizes, tokens: int | None, length: int, processes: int
) -> dict[str, float]:
    """Batch, rate and weight decay of a run with a depth, given or not."""
    batch = None if args.batch_size is None else args.batch_size * length
    default = MUON_RATIO if args.optimizer == "muon" else ADAMW_RATIO
    if tokens is None and args.steps is not None and batch is not None:
        tokens = args.steps * batch
    # What lasts for steps of unknown size, for epochs or minutes is taken to be of the usual length.
    tokens = tokens or default * sizes.parameters

    def rates(batch: float | None) -> Rates:
        if args.optimizer == "muon":
            return muon_rates(sizes, tokens, args.tokens_per_parameter or MUON_RATIO, batch)
        return adamw_rates(sizes, tokens, batch)

    if batch is None:
        rows = max(1, round(rates(None).batch_tokens / length))
        batch = math.ceil(rows / processes) * processes * length
    found = rates(batch)
    return {
        "batch_size": batch // length,
        "learning_rate": found.learning_rate,
        "weight_decay": found.weight_decay,
    }


def flops_per_token(config: TesseraConfig, length: int) -> int:
    """Operations of training on one token of a row: forward and backward, attention as far as it sees."""
    config = copy.deepcopy(config)
    config.max_position_embeddings = length
    return count_costs(config).training_flops


def describe_scale(args: PretrainArguments) -> str | None:
    """A sentence on what the rules chose, for the start of a run; None if they chose nothing."""
    if not args.chosen:
        return None
    values = {name: getattr(args, name) for name in args.chosen}
    said = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in values.items()
        if value is not None
    ]
    return f"chosen by rule: {', '.join(said)}"


def _power_of_two(number: float) -> int:
    return 2 ** max(0, round(math.log2(number)))

"""`tessera pretrain --dry-run`: what a run would be, before anything is allocated or written.

What belongs here: sentences on sizes, length, steps and rates. What it would take of a certain GPU is the
planner's.
"""

import dataclasses

from tessera.configs.resolve import is_byte_gpt_file
from tessera.modeling.accounting import count_costs

from .feed import Feed, choose_accumulation, read_schedules
from .inputs import open_corpora, read_model_config, row_length
from .optimizers.groups import ADAMW_RATE, MATRIX_RATE
from .optimizers.in_backward import require_whole_steps
from .parallel import choose_layout
from .pretrain_arguments import PretrainArguments
from .records.trackers import check_trackers
from .scaling import describe_scale, flops_per_token, measure, scale_arguments
from .schedules import mean_size, warmup_share


def describe_run(args: PretrainArguments, processes: int = 1) -> str:
    """Says what a run would be.

    Args:
        args: of the run. Without `data_file` the vocabulary is the configuration's, and a length in epochs
            stays one.
        processes: that it would be started on.

    Raises:
        ValueError: for what would keep the run from starting, as far as arguments and data show it: what a
            GPU can do is not looked at, for the run may be meant for another machine.
    """
    if args.optimizer is None:
        args = dataclasses.replace(args, optimizer="adamw" if is_byte_gpt_file(args.config) else "muon")
    processes = choose_layout(args, processes, 0).data_size
    check_trackers(args.trackers)
    config, is_preset = read_model_config(args.config, args.depth)
    corpora = []
    if args.data_file:
        documents = args.packing != "contiguous" or args.isolate_documents
        follow = is_preset and args.ckpt_path is None
        corpora, config = open_corpora(args.data_file, args.tokenizer, config, follow, documents)
    length = row_length(args, config)
    args = scale_arguments(args, config, length, processes)
    accumulation = choose_accumulation(args, processes)
    if args.optimizer_in_backward:
        require_whole_steps(accumulation)
    stages, _ = read_schedules(args, length)
    costs, sizes = count_costs(config), measure(config)
    lines = [
        f"model: {config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} "
        f"heads, vocabulary {config.vocab_size:,}: {costs.parameters:,} parameters, {sizes.parameters:,} of "
        "them multiplied with in layers and head"
    ]
    batch = args.batch_size * length
    step = f"{args.batch_size} x {length} = {batch:,} tokens"
    if args.batch_schedule:
        step = f"up to {step} ({', '.join(args.batch_schedule)})"
    rows = -(-args.batch_size // (processes * accumulation))
    parts = f"a step: {accumulation} x {_count(rows, 'row')}"
    parts += f" on each of {processes} processes" if processes > 1 else ""
    total = None
    if corpora:
        feed = Feed(corpora, args, length, 0, processes)
        steps = feed.total_steps
        total = None if steps is None else feed.tokens_before(steps)
        have = sum(len(corpus.train.ids) for corpus in corpora)
        lines.append(f"data: {have:,} tokens to train on")
    else:
        mean = mean_size(stages) * length
        limits = [limit for limit in (args.tokens, args.steps and args.steps * mean) if limit]
        total = int(min(limits)) if limits else None
        steps = None if total is None else max(1, round(total / mean))
    warmup_share(args, steps or (args.epochs and 1))
    if total is None:
        limits = [args.minutes and _count(args.minutes, "minute")]
        limits.append(args.epochs and f"{_count(args.epochs, 'epoch')} of the data")
        whole = " or ".join(filter(None, limits))
        lines.append(f"length: {whole}, in steps of {step}")
    else:
        flops = total * flops_per_token(config, length)
        end = f", or {_count(args.minutes, 'minute')}" if args.minutes else ""
        lines.append(
            f"length: {steps:,} steps of {step}: {total:,} tokens, {total / sizes.parameters:.3g} a "
            f"parameter, {flops:.3g} FLOPs{end}"
        )
    lines.append(parts)
    rate = args.learning_rate
    if rate is None:
        rate = MATRIX_RATE if args.optimizer == "muon" else ADAMW_RATE
    fall = "constant" if args.schedule == "constant" else f"{args.schedule} down to {args.floor:g} of it"
    lines.append(
        f"rates: {args.optimizer}, learning rate {rate:.4g}, weight decay {args.weight_decay:.4g}; {fall}"
    )
    return "\n".join([*lines, *filter(None, [describe_scale(args)])])


def _count(number: float, what: str) -> str:
    """A number and what it counts: 1 row, 2 rows."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"

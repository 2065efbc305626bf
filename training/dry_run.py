"""`tessera pretrain --dry-run`: what a run would be, before anything is allocated or written.

What belongs here: sentences on sizes, length, steps and rates. What it would take of a certain GPU is the
planner's.
"""

import dataclasses

from tessera.configs.resolve import is_byte_gpt_file
from tessera.modeling.accounting import count_costs

from .feed import Feed
from .inputs import open_corpora, read_model_config
from .pretrain_arguments import PretrainArguments
from .scaling import describe_scale, flops_per_token, measure, scale_arguments


def describe_run(args: PretrainArguments, processes: int = 1) -> str:
    """Says what a run would be.

    Args:
        args: of the run. Without `data_file` the vocabulary is the configuration's, and a length in epochs
            stays one.
        processes: that it would be started on.

    Raises:
        ValueError: for what would keep the run from starting, as far as arguments and data show it.
    """
    if args.optimizer is None:
        args = dataclasses.replace(args, optimizer="adamw" if is_byte_gpt_file(args.config) else "muon")
    config, is_preset = read_model_config(args.config, args.depth)
    corpora = []
    if args.data_file:
        documents = args.packing != "contiguous" or args.isolate_documents
        follow = is_preset and args.ckpt_path is None
        corpora, config = open_corpora(args.data_file, args.tokenizer, config, follow, documents)
    length = args.sequence_length or min(config.max_position_embeddings, 1024)
    args = scale_arguments(args, config, length, processes)
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
    total = None
    if corpora:
        feed = Feed(corpora, args, length, 0, processes)
        steps = feed.total_steps
        total = None if steps is None else feed.tokens_before(steps)
        have = sum(len(corpus.train.ids) for corpus in corpora)
        lines.append(f"data: {have:,} tokens to train on")
    else:
        limits = [limit for limit in (args.tokens, args.steps and args.steps * batch) if limit]
        total = min(limits) if limits else None
        steps = None if total is None else max(1, round(total / batch))
    if total is None:
        whole = f"{args.minutes:g} minutes" if args.minutes else f"{args.epochs:g} epochs of the data"
        lines.append(f"length: {whole}, in steps of {step}")
    else:
        flops = total * flops_per_token(config, length)
        end = f", or {args.minutes:g} minutes" if args.minutes else ""
        lines.append(
            f"length: {steps:,} steps of {step}: {total:,} tokens, {total / sizes.parameters:.3g} a "
            f"parameter, {flops:.3g} FLOPs{end}"
        )
    rate = "its own" if args.learning_rate is None else f"{args.learning_rate:.4g}"
    lines.append(
        f"rates: {args.optimizer}, learning rate {rate}, weight decay {args.weight_decay:.4g}; "
        f"{args.schedule} down to {args.floor:g} of it"
    )
    return "\n".join([*lines, *filter(None, [describe_scale(args)])])

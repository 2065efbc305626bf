"""From a preset, a recipe and flags to a plan.

What belongs here: which of a run's arguments a plan reads, and what lies over what.
"""

from dataclasses import replace
from typing import Any

from tessera.configs.resolve import resolve_config

from .planner import Plan, make_plan
from .pretrain_arguments import gather_arguments
from .scaling import scale_arguments


def plan_run(
    preset: str | None,
    recipe: str | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    price: float | None = None,
    **flags: Any,
) -> Plan:
    """Plans what `tessera pretrain` would do.

    Args:
        preset: name or configuration file; may be left out with a recipe.
        recipe: as `tessera pretrain --recipe` takes it.
        gpu, gpus, price: as `make_plan`.
        flags: names and values of `PretrainArguments`; None is not given.

    Raises:
        ValueError: if nothing says which model, or for what `make_plan` refuses.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if preset is not None:
        given["config"] = preset
    elif recipe is None:
        raise ValueError("name a preset or --recipe to plan (`tessera presets` lists both)")
    args = gather_arguments({"data_file": "-", **given}, recipe, processes=gpus)
    depth = {} if args.depth is None else {"depth": args.depth}
    config = resolve_config(args.config, **depth)
    context = config.max_position_embeddings
    length = min(context, 2048) if args.sequence_length is None else args.sequence_length
    args = replace(args, optimizer=args.optimizer or "muon", sequence_length=length)
    args = scale_arguments(args, config, length, gpus)
    rows = args.micro_batch_size
    if rows is None and args.accumulation and args.batch_size:
        rows = max(1, args.batch_size // (args.accumulation * gpus))
    every = args.gradient_checkpointing_every
    checkpoints = args.gradient_checkpointing or "gradient_checkpointing_every" in given
    plan = make_plan(
        args.config if args.depth is None else f"{args.config} at depth {args.depth}",
        config,
        gpu,
        gpus,
        tokens=args.tokens,
        batch_size=args.batch_size,
        micro_batch_size=rows,
        sequence_length=length,
        optimizer=args.optimizer,
        weights=args.weights,
        precision=args.precision,
        compiled={"off": False, "on": True}.get(args.compile),
        checkpoint_every=every if checkpoints else 0,
        optimizer_in_backward=args.optimizer_in_backward,
        sharded=args.parallel != "ddp",
        price=price,
    )
    limits = [] if args.tokens is None else [args.tokens]
    if args.steps is not None:
        limits.append(args.steps * plan.step_tokens)
    if args.minutes is not None:
        limits.append(60 * args.minutes * plan.tokens_per_second)
    return replace(plan, tokens=min(limits)) if limits else plan

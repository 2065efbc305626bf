"""From a preset, a recipe and flags to a plan.

What belongs here: which of a run's arguments a plan reads, and what lies over what.
"""

from dataclasses import dataclass, replace
from typing import Any

from tessera.configs.resolve import resolve_config
from tessera.modeling.configuration_tessera import TesseraConfig

from ..pretrain_arguments import PretrainArguments, gather_arguments
from ..scaling import scale_arguments
from ..schedules import mean_size, read_stages
from .plan import Plan, make_plan


@dataclass(frozen=True)
class PlannedRun:
    """A plan, and what it says of the run that was asked for.

    Attributes:
        plan: of its largest step.
        steps: of the run.
        notes: sentences on what was chosen here, and on what is planned otherwise than it would be run.
    """

    plan: Plan
    steps: float
    notes: tuple[str, ...]


def plan_run(
    preset: str | None,
    recipe: str | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    price: float | None = None,
    **flags: Any,
) -> PlannedRun:
    """Plans what `tessera pretrain` would do with a recipe, or a sensible run of a preset.

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
    # A preset alone is no run yet, and what `tessera pretrain` takes then is meant for small machines.
    free = recipe is None
    length = args.sequence_length or min(config.max_position_embeddings, 2048 if free else 1024)
    args = replace(args, optimizer=args.optimizer or "muon", sequence_length=length)
    args = scale_arguments(args, config, length, gpus)
    batch = None if free and not {"batch_size", "depth"} & given.keys() else args.batch_size
    rows = args.micro_batch_size
    if rows is None and args.accumulation and batch:
        rows = max(1, batch // (args.accumulation * gpus))
    every = args.gradient_checkpointing_every
    checkpoints = args.gradient_checkpointing or "gradient_checkpointing_every" in given
    plan = make_plan(
        args.config if args.depth is None else f"{args.config} at depth {args.depth}",
        config,
        gpu,
        gpus,
        tokens=args.tokens,
        batch_size=batch,
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
    step_tokens = plan.step_tokens
    if args.batch_schedule is not None:
        step_tokens = length * mean_size(read_stages(args.batch_schedule, "batch_schedule"))
    limits = [] if args.tokens is None else [args.tokens]
    if args.steps is not None:
        limits.append(args.steps * step_tokens)
    if args.minutes is not None:
        limits.append(60 * args.minutes * plan.tokens_per_second)
    if limits:
        plan = replace(plan, tokens=min(limits))
    notes = _chosen(plan, config, given) if free else []
    return PlannedRun(plan, plan.tokens / step_tokens, (*notes, *_otherwise(args, plan, recipe, given)))


def _chosen(plan: Plan, config: TesseraConfig, given: dict[str, Any]) -> list[str]:
    """What a plan has of its own where `tessera pretrain` would take something else."""
    short = min(config.max_position_embeddings, 1024)
    flags, theirs = [], []
    for name, here, there in (
        ("batch_size", plan.setup.batch_size, 8),
        ("sequence_length", plan.setup.sequence_length, short),
    ):
        by_rule = name == "batch_size" and "depth" in given
        if name not in given and here != there and not by_rule:
            flags.append(f"--{name.replace('_', '-')} {here}")
            theirs.append(f"{there}")
    if not flags:
        return []
    return [f"chosen here: {' '.join(flags)}; otherwise `tessera pretrain` takes {' and '.join(theirs)}"]


def _otherwise(args: PretrainArguments, plan: Plan, recipe: str | None, given: dict[str, Any]) -> list[str]:
    """What of a run is planned otherwise than it would be run."""
    notes = []
    if args.batch_schedule is not None:
        notes.append(
            f"memory and speed are those of the schedule's largest batch, {plan.setup.batch_size}; smaller "
            "ones are slower a token"
        )
    if args.length_schedule is not None:
        notes.append(f"all windows are taken to be as long as the longest, {plan.setup.sequence_length}")
    if args.parallel == "hsdp" and plan.setup.gpus > 1:
        notes.append(
            f"hsdp is planned as fsdp over all {plan.setup.gpus} cards; a card holds more of the weights, "
            "gradients and moments where fewer share a copy (shard_size)"
        )
    for name in ("tensor_parallel", "expert_parallel", "context_parallel"):
        if getattr(args, name) > 1:
            notes.append(f"{name} is not planned: each card is taken to have whole layers and windows")
    # Without a recipe a pass over the data is only what `PretrainArguments` takes where nothing is said.
    told = recipe is not None or "epochs" in given
    if told and args.epochs is not None and args.tokens is args.steps is args.minutes is None:
        notes.append(
            "how long epochs are is not known without the data: 20 tokens for each parameter are planned"
        )
    return notes

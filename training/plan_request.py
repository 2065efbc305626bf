"""From a preset, a recipe and flags to a plan.

What belongs here: which of a run's arguments a plan reads, and what lies over what.
"""

from dataclasses import fields
from typing import Any

from tessera.configs.resolve import resolve_config

from .planner import Plan, make_plan
from .pretrain_arguments import PretrainArguments, gather_arguments

# Words of a run that a plan takes over as they are.
COMMON = ("batch_size", "micro_batch_size", "sequence_length", "optimizer", "tokens")


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
    told: dict[str, Any] = {}
    if recipe is not None:
        args = gather_arguments(
            {"data_file": "-"} | ({"config": preset} if preset else {}), recipe, processes=gpus
        )
        plain = {field.name: field.default for field in fields(PretrainArguments)}
        told = {name: value for name, value in vars(args).items() if value != plain.get(name)}
    told |= given
    preset = preset or told.get("config")
    if preset is None:
        raise ValueError("name a preset or --recipe to plan (`tessera presets` lists both)")
    depth = told.get("depth")
    config = resolve_config(preset, **({} if depth is None else {"depth": depth}))
    every = told.get("gradient_checkpointing_every", 1)
    checkpoints = told.get("gradient_checkpointing", "gradient_checkpointing_every" in given)
    if "accumulation" in told and told.get("batch_size") and "micro_batch_size" not in told:
        told["micro_batch_size"] = max(1, told["batch_size"] // (told["accumulation"] * gpus))
    parallel = told.get("parallel", "ddp")
    if parallel not in ("ddp", "fsdp", "hsdp", "fsdp2"):
        raise ValueError(f"parallel must be ddp or fsdp for a plan, got '{parallel}'")
    plan = make_plan(
        preset if depth is None else f"{preset} at depth {depth}",
        config,
        gpu,
        gpus,
        **{name: told[name] for name in COMMON if name in told},
        weights=told.get("weights", "fp32"),
        precision=told.get("precision", "auto"),
        compiled={"off": False, "on": True}.get(told.get("compile", "auto")),
        checkpoint_every=every if checkpoints else 0,
        optimizer_in_backward=told.get("optimizer_in_backward", False),
        sharded=parallel != "ddp",
        price=price,
    )
    return plan

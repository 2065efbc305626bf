"""A plan in words, and as figures for a program.

What belongs here: how a plan is told.
"""

from collections.abc import Sequence
from typing import Any

from .memory import GIB
from .plan import MOST_CARDS, Plan, tokens_per_second


def as_dict(plan: Plan, steps: float | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of a plan, for `--json`; arguments as in `report`."""
    setup = plan.setup
    return {
        "model": plan.name,
        "card": plan.card.title,
        "card_bytes": plan.card.memory,
        "gpus": setup.gpus,
        "parameters": plan.costs.parameters,
        "active_parameters": plan.costs.active,
        "flops_per_token": plan.costs.training_flops,
        "batch_size": setup.batch_size,
        "micro_batch_size": setup.micro_batch_size,
        "accumulation": setup.accumulation,
        "sequence_length": setup.sequence_length,
        "optimizer": setup.optimizer,
        "weights": setup.weights,
        "precision": setup.precision,
        "compiled": setup.compiled,
        "checkpoint_every": setup.checkpoint_every,
        "sharded": setup.sharded,
        "fits": plan.fits,
        "peak_bytes": plan.memory.peak,
        "needed_bytes": plan.memory.needed,
        "peak_moment": plan.memory.moment,
        "memory": plan.memory.parts,
        "rates_from": plan.rates.source,
        "tokens_per_second": plan.tokens_per_second,
        "step_seconds": plan.times.step,
        "seconds": plan.times.parts,
        "utilization": plan.utilization,
        "ceiling_flops": plan.rates.ceiling,
        "tokens": plan.tokens,
        "steps": plan.tokens / plan.step_tokens if steps is None else steps,
        "hours": plan.hours,
        "energy_kwh": plan.card.watts * setup.gpus * plan.hours / 1000,
        "cost": None if plan.price is None else plan.price * setup.gpus * plan.hours,
        "changes": [
            {
                "change": change.title,
                "flags": change.flags,
                "fits": change.fits,
                "peak_bytes": change.memory.peak,
                "needed_bytes": change.memory.needed,
                "tokens_per_second": tokens_per_second(change.setup, change.times),
            }
            for change in plan.changes
        ],
        "notes": list(notes),
    }


MOMENTS = {
    "loss": "at the loss",
    "backward": "as the backward pass starts",
    "gradients": "as the backward pass ends",
    "update": "in the optimizer's step",
}


def report(plan: Plan, steps: float | None = None, notes: Sequence[str] = ()) -> str:
    """A plan as it is printed.

    Args:
        plan: what is known of the run.
        steps: of the whole run; default: as many as are of the plan's size.
        notes: sentences on how the plan came about.
    """
    setup, memory = plan.setup, plan.memory
    cards = f"{setup.gpus} x {plan.card.title}" if setup.gpus > 1 else plan.card.title
    active = "" if plan.costs.active == plan.costs.parameters else f", {short(plan.costs.active)} for a token"
    how = [setup.precision, f"{setup.weights} weights", setup.optimizer]
    how.append("compiled" if setup.compiled else "eager")
    if setup.checkpoint_every:
        how.append(f"1 layer in {setup.checkpoint_every} computed again")
    if setup.gpus > 1:
        how.append("FSDP" if setup.sharded else "DDP")
    per_card = f" on each of {setup.gpus} cards" if setup.gpus > 1 else ""
    lines = [
        f"{plan.name} on {cards}: {short(plan.costs.parameters)} parameters{active}, "
        f"{short(plan.costs.training_flops)} FLOPs a token",
        f"{', '.join(how)}; a step is {setup.batch_size} x {setup.sequence_length} = "
        f"{plan.step_tokens:,} tokens, {setup.accumulation} x {setup.micro_batch_size} rows{per_card}",
        "",
    ]
    room = plan.card.memory / GIB
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(
        f"memory  {memory.peak / GIB:8.2f} GiB at the peak, {MOMENTS[memory.moment]}; "
        f"{memory.needed / GIB:.1f} with the allocator's and driver's own, of {room:.1f}: {verdict}"
    )
    lines += [
        f"        {size / GIB:8.2f} {name}"
        for name, size in sorted(memory.parts.items(), key=lambda part: -part[1])
        if size >= 0.005 * memory.peak
    ]
    lines.append("")
    lines.append(
        f"speed   {plan.tokens_per_second:10,.0f} tokens/s, {1e3 * plan.times.step:,.0f} ms a step, "
        f"{100 * plan.utilization:.0f} % of {plan.rates.ceiling / 1e12:,.3g} TFLOP/s ({plan.rates.source})"
    )
    lines += [
        f"        {100 * seconds / plan.times.step:8.1f} % {name}"
        for name, seconds in sorted(plan.times.parts.items(), key=lambda part: -part[1])
        if seconds >= 0.005 * plan.times.step
    ]
    lines.append("")
    steps = plan.tokens / plan.step_tokens if steps is None else steps
    lines.append(
        f"run     {short(plan.tokens)} tokens, {steps:,.0f} steps: {duration(plan.hours)}{_bill(plan)}"
    )
    lines += [f"note    {note}" for note in notes]
    if plan.changes:
        lines += ["", *_advice(plan)]
    return "\n".join(lines)


def _bill(plan: Plan) -> str:
    parts = []
    if plan.card.watts:
        parts.append(f"at most {plan.card.watts * plan.setup.gpus * plan.hours / 1000:,.3g} kWh")
    if plan.price is not None:
        parts.append(f"${plan.price * plan.setup.gpus * plan.hours:,.2f}")
    return "".join(f", {part}" for part in parts)


def _advice(plan: Plan) -> list[str]:
    lines = ["what to change, the cheapest first (GiB needed, tokens/s)"]
    for change in plan.changes:
        speed = tokens_per_second(change.setup, change.times)
        verdict = "fits" if change.fits else "not enough"
        figures = f"  {change.memory.needed / GIB:7.1f} {speed:10,.0f}  {verdict:10}"
        lines.append(f"{figures}  {change.title}  [{change.flags}]")
    if not any(change.fits for change in plan.changes):
        lines.append(f"nothing of this fits it, not even together on {MOST_CARDS} cards")
    return lines


def short(number: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    if hours < 1.5:
        return f"{60 * hours:.1f} minutes"
    if hours < 72:
        return f"{hours:.1f} hours"
    return f"{hours / 24:,.1f} days"

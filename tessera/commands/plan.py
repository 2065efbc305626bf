"""`tessera plan`: what a run takes, before it is run."""

from typing import Annotated

import typer

from ._common import silence_transformers


def plan(
    preset: Annotated[
        str | None, typer.Argument(help="Preset or config file; `tessera presets` lists them.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="t4, p100, v100, 3090, 4090, l4, a100-40gb, a100, h100, h200, b200, gb10; or here: this "
            "machine's own, measured [here, or h200 where there is none]."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Cards that share the batch.")] = 1,
    recipe: Annotated[str | None, typer.Option(help="Recipe to plan; flags lie over it.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Of the whole run, such as 2e9 [20 for each parameter].")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers; width and heads follow.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows in a step, over all cards [half a million tokens].")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Windows on a card at a time [what fits].")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window [the context, at most 2048].")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon, adamw or adamw-8bit [muon].")] = None,
    weights: Annotated[str | None, typer.Option(help="fp32, bf16 or split [fp32].")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, bf16, fp16 or fp32 [auto: the card's fastest].")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Layers are computed again in the backward pass.")
    ] = None,
    gradient_checkpointing_every: Annotated[
        int | None, typer.Option(help="Every n-th of them only [1].")
    ] = None,
    optimizer_in_backward: Annotated[
        bool | None, typer.Option(help="Each gradient is used as soon as it is there.")
    ] = None,
    parallel: Annotated[str | None, typer.Option(help="ddp, fsdp or hsdp, over several cards [ddp].")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars for an hour of one card.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures, for a program.")] = False,
) -> None:
    """Say what a run takes: memory, time, cost."""
    silence_transformers()
    import json

    from tessera.training.planner.report import as_dict, report
    from tessera.training.planner.request import plan_run

    made = plan_run(
        preset,
        recipe,
        gpu=gpu,
        gpus=gpus,
        tokens=tokens,
        depth=depth,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        optimizer=optimizer,
        weights=weights,
        precision=precision,
        compile="off" if eager else None,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_every=gradient_checkpointing_every,
        optimizer_in_backward=optimizer_in_backward,
        parallel=parallel,
        price=price,
    )
    told = (made.plan, made.steps, made.notes)
    typer.echo(json.dumps(as_dict(*told), indent=1) if as_json else report(*told))

"""`tessera eval`: how good a model is."""

import os
from typing import Annotated

import typer

from ._common import require_extra, silence_transformers


def evaluate(
    model: Annotated[str, typer.Option(help="Model directory, or a run directory.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out text (file, folder, Hub dataset) or prepared folder, for bpb, perplexity."
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "test",
    name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset, such as en.")] = None,
    bleu_data: Annotated[
        str | None,
        typer.Option(help="JSON lines of prompt (or source) and reference(s) (or target), for bleu."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Of bpb,perplexity,bleu; default: all that data are given for.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between them.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder of your own task files for the harness.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of each task, and pairs of --bleu-data, at most.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each item; default: the task's own number.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the model is given at most; default: its context.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens by which perplexity's window moves; default: half the context, at most 512."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation for bleu.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give tasks and prompts through the chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Windows, prompts or requests at a time.")] = 8,
    output: Annotated[
        str | None, typer.Option(help="JSON report; default: eval.json in the run, if the model is a run's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest.")] = None,
) -> None:
    """Score a model: bits per byte, perplexity, BLEU, benchmark tasks."""
    given = {key: value for key, value in locals().items() if key != "output"}
    given |= {"metrics": _names(metrics) if metrics is not None else None, "tasks": _names(tasks)}
    if output is not None and os.path.isdir(output):
        raise ValueError(f"--output {output} is a folder; give a file for the report")
    if given["tasks"]:
        require_extra("eval", "lm_eval")
    if bleu_data is not None:
        require_extra("eval", "sacrebleu")
    silence_transformers()
    from tessera.evaluation import report

    arguments = report.EvaluationArguments(**given)
    found = report.evaluate(arguments)
    typer.echo(report.format_table(found))
    if target := output or report.default_output(model):
        report.write_report(found, target)
        typer.echo(f"report: {target}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))

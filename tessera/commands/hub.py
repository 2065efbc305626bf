"""`tessera push`: a model to the Hub."""

from typing import Annotated

import typer

from ._common import silence_transformers


def push(
    model: Annotated[str, typer.Argument(help="Model directory, or a run directory.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="Name on the Hub: owner/name.", show_default=False)
    ],
    family: Annotated[
        str | None,
        typer.Option(
            "--as", help="Convert first, to load without code: llama, mistral, qwen3, gpt2, deepseek_v3, ..."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Round first to float32, bfloat16 or float16; default: as it is.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub calls it: apache-2.0, mit, ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go where.")] = False,
    output: Annotated[
        str | None, typer.Option(help="Directory to put the release in, instead of sending it.")
    ] = None,
) -> None:
    """Publish a model on the Hugging Face Hub.

    Weights, configuration, model code, tokenizer and a model card go up in one commit, after the directory
    was loaded in a process that has no Tessera and gave the same logits. After a lost connection the same
    command sends the rest.
    """
    if dry_run and output is not None:
        raise ValueError("--dry-run writes nothing, and --output a directory: choose one of them")
    silence_transformers()
    from tessera.conversion.push import push as run

    place = run(
        model,
        repo_id,
        family=family,
        dtype=dtype,
        private=private,
        revision=revision,
        message=message,
        license=license,
        output=output,
        dry_run=dry_run,
        say=typer.echo,
    )
    done = "written" if output is not None else "nothing was sent to" if dry_run else "pushed"
    typer.echo(f"{done}: {place}")

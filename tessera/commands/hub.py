"""`tessera push`: a model to the Hub."""

from typing import Annotated

import typer

from ._common import silence_transformers


def push(
    model: Annotated[str, typer.Argument(help="Model directory, or a run directory.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub: owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub calls it: apache-2.0, mit, ...")] = None,
    dry_run: Annotated[
        str | None, typer.Option(help="Directory to put the release in, instead of sending it.")
    ] = None,
) -> None:
    """Publish a model on the Hugging Face Hub.

    Weights, configuration, model code, tokenizer and a model card go up in one commit, after the directory
    was loaded in a process that has no Tessera and gave the same logits.
    """
    silence_transformers()
    from tessera.conversion.push import push as run

    place = run(
        model,
        repo_id,
        private=private,
        revision=revision,
        message=message,
        license=license,
        dry_run=dry_run,
    )
    typer.echo(f"loads without Tessera, with the same logits\n{'written' if dry_run else 'pushed'}: {place}")

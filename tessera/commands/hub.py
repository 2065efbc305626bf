"""`tessera push` and `tessera pull`: models to the Hub and from there."""

import shlex
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


def pull(
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="Name on the Hub: owner/name.", show_default=False)
    ],
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR", help="Directory to write; default: the repository's name.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    to: Annotated[
        str | None, typer.Option(help="Convert to tessera, native, llama, ... as `tessera convert` does.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Round to float32, bfloat16 or float16; default: as it is.")
    ] = None,
) -> None:
    """Fetch a model from the Hugging Face Hub.

    Safetensors, configuration, tokenizer and card come, and no pickles; they are compared with the hashes
    that the Hub gives, and opened. After a lost connection the same command goes on.
    """
    silence_transformers()
    from tessera.conversion.families import FAMILIES
    from tessera.conversion.hub_files import format_size
    from tessera.conversion.pull import pull as run

    done = run(repo_id, folder, revision=revision, to=to, dtype=dtype)
    came = f"{done.files} files, {format_size(done.size)}, with the hashes that the Hub gives"
    typer.echo(f"{repo_id} at {revision or 'main'}, commit {done.commit[:8]}: {came}")
    if done.left:
        more = f" and {len(done.left) - 8} more" if len(done.left) > 8 else ""
        typer.echo(f"stays there: {', '.join(done.left[:8])}{more}")
    for note in done.notes:
        typer.echo(note)
    beside = {"tokenizer": done.has_tokenizer, "chat template": done.has_template}
    extras = " and ".join(name for name, there in beside.items() if there) or "no tokenizer"
    typer.echo(f"{done.kind}: {done.parameters:,} parameters, context {done.context:,}, with {extras}")
    place = shlex.quote(str(done.folder) if folder is None else folder)
    typer.echo(f"written: {place}")
    if done.kind == "tessera":
        if done.has_template:
            typer.echo(f"go on:   tessera chat --model {place}")
        elif done.has_tokenizer:
            typer.echo(f"go on:   tessera generate --model {place} --interactive")
    elif done.kind in FAMILIES:
        typer.echo(f"go on:   tessera convert {place} NEW   (for chat, sft, eval and the others)")

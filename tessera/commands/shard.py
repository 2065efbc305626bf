"""`tessera shard`: a native checkpoint for another number of ranks."""

from typing import Annotated

import typer

from ._common import silence_transformers


def shard(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Directory in the native layout, of any number of ranks.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Directory to write; must not be there yet.")
    ],
    mp: Annotated[int, typer.Option(help="Model-parallel ranks to cut it for: one file each.")],
) -> None:
    """Cut a native checkpoint for another number of ranks.

    Tensors and experts are shared anew, without joining the model in memory; back at the first number the
    files are the same bytes again. What is no native checkpoint yet becomes one with `tessera convert`.
    """
    silence_transformers()
    from tessera.conversion.resharding import shard as run

    done = run(source, target, mp)
    typer.echo(
        f"{done.before} -> {done.after} ranks: {done.tensors:,} tensors, the largest file "
        f"{done.largest_file:,} bytes\nwritten: {target}"
    )

"""`tessera pretrain`, `tessera demo`: from text or tokens to a base model.

The options of `pretrain` are the fields of `PretrainArguments`, and a few that say where to take those from
and what to do with them.
"""

import inspect
import shlex
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from tessera.training.argument_fields import split_list
from tessera.training.pretrain_arguments import PretrainArguments, gather_arguments, launched_processes

from ._common import silence_transformers

_RECIPE = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "--train-config",
        help="Recipe (`tessera presets` lists them) or a YAML file, such as a run's; flags lie over it.",
    ),
]
_RESUME = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest good checkpoint; `--resume PATH`: of that run, or from that one; "
        "`--resume auto`: if there is one, else start.",
    ),
]
_SMOKE = Annotated[
    bool, typer.Option("--smoke", help="A few small steps of everything, in <save path>-smoke.")
]
_DRY_RUN = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what the run would be, and stop; without --data as far as that goes."
    ),
]
_RESUME_PATH = Annotated[str | None, typer.Argument(hidden=True, show_default=False)]
# name -> type, default, and the panel of the help that it is in
OWN = {
    "recipe": (_RECIPE, None, "Run"),
    "resume": (_RESUME, False, "Run"),
    "smoke": (_SMOKE, False, "Run"),
    "dry_run": (_DRY_RUN, False, "Run"),
    "resume_path": (_RESUME_PATH, None, ""),
}


class PanelCommand(TyperCommand):
    """Lists its options under the headings of the arguments that they are."""

    def format_options(self, ctx, formatter) -> None:
        """Writes a heading for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        of = {one.name: one.metadata["panel"] for one in fields(PretrainArguments)}
        of |= {name: panel for name, (_, _, panel) in OWN.items()}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panels.setdefault(of.get(parameter.name, "Run"), []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def _option(one: Field) -> inspect.Parameter:
    """The option of a field: unset unless given, so that it lies over a recipe only then."""
    kinds = [kind for kind in get_args(one.type) or [one.type] if kind is not NoneType]
    several = list[str] in kinds
    kind = list[str] if several else one.metadata["kind"] or kinds[0]
    option = typer.Option(*one.metadata["flags"], help=one.metadata["help"], show_default=False)
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def pretrain(**given: Any) -> None:
    """Train a base model on text; final/ is a complete model."""
    own = {name: given.pop(name) for name in OWN}
    flags = {name: value for name, value in given.items() if value is not None}
    # `--resume PATH` is the flag and a word that stands alone: an option whose value may be left out.
    path, resume = own["resume_path"], own["resume"]
    if path is not None and not resume:
        raise ValueError(f"'{path}' belongs to no option; a path to go on from is --resume PATH")
    for name, value in flags.items():
        if isinstance(value, list) and name != "data_file":
            flags[name] = [part for text in value for part in split_list(text)]
    if not flags.get("data_file", True):
        del flags["data_file"]
    if own["dry_run"]:
        flags.setdefault("data_file", "")
    args = gather_arguments(flags, own["recipe"], path or resume, launched_processes())

    silence_transformers()
    if own["dry_run"]:
        from tessera.training.dry_run import describe_run

        typer.echo(describe_run(args, launched_processes()))
        return
    from accelerate import PartialState

    from tessera.training.pretrain import pretrain as train
    from tessera.training.signals import Stopped

    try:
        result = train(args, resume=path or resume, smoke=own["smoke"])
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_code) from None
    # Of several processes, one says it.
    if PartialState().is_main_process:
        if result.sample:
            from tessera.training.samples import for_a_terminal

            typer.echo(f"sample:\n{for_a_terminal(result.sample)}")
        typer.echo(f"model: {result.final}")
        if not own["smoke"]:
            from tessera.data.token_files import is_prepared

            run = shlex.quote(str(result.folder))
            # Plain text was mostly trained on.
            one = isinstance(args.data_file, str) and is_prepared(args.data_file)
            held_out = shlex.quote(args.data_file) if one else "OTHER_TEXT"
            typer.echo(
                f"next: tessera eval --model {run} --data {held_out} | tessera sft --model {run} "
                f"--data CHATS.jsonl | tessera generate --ckpt-path {run} --interactive"
            )


# Typer reads options from a signature.
pretrain.__signature__ = inspect.Signature(
    [
        *(_option(one) for one in fields(PretrainArguments) if one.metadata["panel"]),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default, _) in OWN.items()
        ),
    ]
)


def demo(
    minutes: Annotated[float, typer.Option(help="Minutes of training.", envvar="TESSERA_DEMO_MINUTES")] = 2.5,
    data: Annotated[
        str | None,
        typer.Option(help="Text to train on; default: this Python's own sources.", envvar="TESSERA_DATA"),
    ] = None,
    save_path: Annotated[
        str, typer.Option(help="Run directory; an earlier demo there is replaced.")
    ] = "runs/demo",
) -> None:
    """Train a small model from nothing and load it elsewhere."""
    from tessera.training.demo import run_demo

    silence_transformers()
    run_demo(minutes, data, save_path)

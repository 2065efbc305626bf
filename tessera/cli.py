"""The `tessera` command: the map of the chain, and how errors end.

What belongs here: which commands there are, in the order in which a model comes about, and what becomes of an
error: a user's mistake ends with one sentence and exit code 2. Flags and help of each command are in
`commands/`; those files import what they need when a command runs, so that `tessera --help` does not wait for
torch.
"""

import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from tessera import __version__
from tessera.commands import (
    convert,
    data,
    evaluate,
    hub,
    plan,
    post_training,
    presets,
    pretrain,
    serve,
    shard,
    tokenizer,
)

# heading -> commands, in the order of a model's life
CHAIN = {
    "Text to tokens": ("tokenizer", "data"),
    "Tokens to a base model": ("presets", "plan", "pretrain", "demo"),
    "A base model to one that answers": ("sft", "dpo", "grpo"),
    "How good it is": ("eval",),
    "Use it": ("generate", "chat", "serve"),
    "Give it to others": ("convert", "shard", "push", "pull"),
}


class _Chain(TyperGroup):
    """Lists the commands as the chain that they are."""

    def list_commands(self, context) -> list[str]:
        """Names in the order of the chain."""
        return [name for names in CHAIN.values() for name in names]

    def format_commands(self, context, formatter) -> None:
        """Writes a heading for each part of the chain."""
        width = max(map(len, self.list_commands(context)))
        for heading, names in CHAIN.items():
            with formatter.section(heading):
                rows = [(name.ljust(width), self.get_command(context, name)) for name in names]
                formatter.write_dl([(name, command.get_short_help_str(80)) for name, command in rows])


app = typer.Typer(
    name="tessera",
    cls=_Chain,
    help="From a folder of text to a language model that others load and chat with: one command a stage.",
    no_args_is_help=True,
    add_completion=False,
    # Whoever comes from argparse types --batch_size.
    context_settings={
        "max_content_width": 110,
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tessera {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
for name, command in {
    "presets": presets.presets,
    "plan": plan.plan,
    "pretrain": pretrain.pretrain,
    "demo": pretrain.demo,
    "sft": post_training.sft,
    "dpo": post_training.dpo,
    "grpo": post_training.grpo,
    "eval": evaluate.evaluate,
    "generate": serve.generate,
    "chat": serve.chat,
    "serve": serve.serve,
    "convert": convert.convert,
    "shard": shard.shard,
    "push": hub.push,
    "pull": hub.pull,
}.items():
    panels = pretrain.PanelCommand if name == "pretrain" else None
    app.command(name, cls=panels)(command)


def run(arguments: list[str]) -> None:
    """Runs one command line and exits: 0, or 2 with a sentence for a user's mistake."""
    try:
        app(arguments, prog_name="tessera")
    except Exception as error:
        # By its name: torch is not to be imported for this.
        exhausted = type(error).__name__ == "OutOfMemoryError"
        # What torch says on a CPU.
        exhausted = exhausted or "DefaultCPUAllocator" in str(error)
        if not exhausted and not isinstance(error, ValueError | FloatingPointError | OSError | MemoryError):
            raise
        message = " ".join(str(error).split())
        if exhausted:
            message = f"memory is not enough; take a smaller model or batch, or shorter sequences ({message})"
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" in process {rank}"
        typer.echo(f"tessera: error{place}: {message}", err=True)
        sys.exit(2)


def main() -> None:
    """Entry point of the `tessera` command."""
    run(sys.argv[1:])

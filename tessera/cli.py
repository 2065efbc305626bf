"""The `tessera` command.

What belongs here: names, flags and help of the commands, and how errors end. Each command imports what it
needs when it runs, so that `tessera --help` does not wait for torch. A user's mistake ends with one sentence
and exit code 2.
"""

import os
import sys
from typing import Annotated

import typer

from tessera import __version__

app = typer.Typer(
    name="tessera",
    help="From text to a language model that others load: train, generate, look up presets.",
    no_args_is_help=True,
    add_completion=False,
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


@app.command()
def pretrain(
    config: Annotated[
        str, typer.Option(help="Preset, Tessera config file, or ByteGPT's own JSON (dim, inter_dim, ...).")
    ],
    data_file: Annotated[str, typer.Option(help="Text file, or folder of text files.")],
    save_path: Annotated[
        str, typer.Option(help="Run directory; a name ending in .safetensors also gets the weights.")
    ] = "runs/pretrain",
    ckpt_path: Annotated[str | None, typer.Option(help="Directory of weights to start from.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer directory or Hub name; default: bytes.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the text; default 1 if nothing limits.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a step, over all processes.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches that a step is split into.")] = 1,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="muon or adamw; default muon, for ByteGPT's own JSON adamw.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the matrices; default by optimizer.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    warmup: Annotated[float, typer.Option(help="Share of the run over which the rate rises.")] = 0.02,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights, data order and dropout.")] = 0,
    evaluations: Annotated[int, typer.Option(help="Validation passes during the run.")] = 4,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between checkpoints; 0: only the last.")
    ] = 10.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    sample_prompt: Annotated[str, typer.Option(help="What the sample at the end continues.")] = "\n",
    resume: Annotated[bool, typer.Option(help="Go on from the newest good checkpoint.")] = False,
) -> None:
    """Train a model on text; writes a run directory with a complete Hugging Face model in final/."""
    given = {key: value for key, value in locals().items() if key != "resume"}
    _silence_transformers()
    from accelerate import PartialState

    from tessera.training.pretrain import PretrainArguments
    from tessera.training.pretrain import pretrain as train

    result = train(PretrainArguments(**given), resume=resume)
    # Of several processes, one says it.
    if PartialState().is_main_process:
        if result.sample:
            typer.echo(f"sample:\n{result.sample}")
        typer.echo(f"model: {result.final}")


@app.command()
def generate(
    ckpt_path: Annotated[str, typer.Option(help="Model directory, or a run directory.")],
    config: Annotated[str | None, typer.Option(help="Configuration, if not the checkpoint's own.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.")] = None,
    input_file: Annotated[
        str | None, typer.Option(help="File of prompts, one a line, run as one batch.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Type prompts; /clear and /exit.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a completion.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.2,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this mass.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest.")] = None,
) -> None:
    """Continue prompts from flags, a file or the keyboard."""
    if not (prompt or input_file or interactive):
        raise ValueError("give --prompt, --input-file or --interactive")
    from pathlib import Path

    from tessera.serving import generate as serving

    _silence_transformers()
    prompts = list(prompt or [])
    if input_file is not None:
        if not Path(input_file).is_file():
            raise ValueError(f"there is no file {input_file}")
        prompts += [
            line for line in Path(input_file).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        if not prompts:
            raise ValueError(f"{input_file} holds no prompts")
    sampling = serving.Sampling(max_new_tokens, temperature, top_k, top_p)
    model, tokenizer = serving.load(ckpt_path, config, device)
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    completions = serving.complete(model, tokenizer, prompts, sampling) if prompts else []
    for text, completion in zip(prompts, completions, strict=True):
        typer.echo(f"Prompt: {text}\nCompletion: {completion}\n")
    if interactive:
        serving.converse(model, tokenizer, sampling)


@app.command()
def presets() -> None:
    """List the presets and what they cost."""
    from tessera.configs.presets import preset_names
    from tessera.modeling.accounting import count_costs
    from tessera.modeling.configuration_tessera import TesseraConfig

    columns = ("preset", "parameters", "active", "embedding", "FLOPs/token", "cache B/token", "context")
    rows = [columns]
    for name in preset_names():
        config = TesseraConfig.from_preset(name)
        costs = count_costs(config)
        numbers = (costs.parameters, costs.active, costs.embedding, costs.training_flops)
        context = str(config.max_position_embeddings)
        rows.append((name, *map(_short, numbers), f"{costs.cache_bytes:,}", context))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for name, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        typer.echo(f"{name.ljust(widths[0])}  {numbers}")
    typer.echo(
        "\nFLOPs/token: forward and backward at the full context. cache B/token: bf16, over all layers.\n"
        "Any other depth by the same rule: nanochat-d16, or TesseraConfig.from_preset(name, depth=16)."
    )


@app.command()
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
    """Train a small model from nothing, show its curve and text, and load it in a new process."""
    from tessera.training.demo import run_demo

    _silence_transformers()
    run_demo(minutes, data, save_path)


def _silence_transformers() -> None:
    """No bars for files that are written at once, and no report beside the sentence that says the same."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _short(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def run(arguments: list[str]) -> None:
    """Runs one command line and exits: 0, or 2 with a sentence for a user's mistake."""
    try:
        app(arguments, prog_name="tessera")
    except (ValueError, FloatingPointError, OSError) as error:
        message = " ".join(str(error).split())
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" in process {rank}"
        typer.echo(f"tessera: error{place}: {message}", err=True)
        sys.exit(2)


def main() -> None:
    """Entry point of the `tessera` command."""
    run(sys.argv[1:])

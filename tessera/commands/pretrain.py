"""`tessera pretrain`, `tessera demo`: from text or tokens to a base model."""

from typing import Annotated

import typer

from ._common import silence_transformers


def pretrain(
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "--model-config",
            help="Preset, config file (JSON, or YAML in llama's names or Tessera's), or ByteGPT's own JSON.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "--data-file",
            help="What `tessera data prepare` wrote, a text file, or a folder of text files. Several of the "
            "first kind are mixed: --data A:0.7 --data B:0.3.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--train-config",
            help="Recipe (`tessera presets` lists them) or a YAML file, such as a run's; flags lie over it.",
        ),
    ] = None,
    save_path: Annotated[
        str | None,
        typer.Option(
            help="Run directory [runs/pretrain]; a name ending in .safetensors also gets the weights."
        ),
    ] = None,
    ckpt_path: Annotated[str | None, typer.Option(help="Directory of weights to start from.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer directory or Hub name [the prepared tokens'; bytes for text]."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text [1 if nothing limits].")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 2e9.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a step, over all processes [8].")] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches that a step is split into [1].")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Windows on a device at a time, at most; sets the accumulation.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    packing: Annotated[
        str | None,
        typer.Option(help="Rows: contiguous, or best-fit, each from a document's start [contiguous]."),
    ] = None,
    isolate_documents: Annotated[
        bool | None, typer.Option(help="Documents of a row do not see one another [they do].")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="muon or adamw [muon; for ByteGPT's own JSON adamw].")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the matrices [by optimizer].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled weight decay [0].")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the run over which the rate rises [0.02].")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="The same in steps.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0 for none [1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order and dropout [0].")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Validation passes during the run [4].")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between them, instead.")] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(help="Minutes between checkpoints [10]; 0: only the last.")
    ] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto (bf16 where the GPU has it) or fp32 [auto].")
    ] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    sample_prompt: Annotated[
        str | None, typer.Option(help="What the sample at the end continues [the start of a document].")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest good checkpoint; `--resume PATH`: of that run, or from that one.",
        ),
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few small steps of everything, in <save path>-smoke.")
    ] = False,
    resume_path: Annotated[str | None, typer.Argument(hidden=True, show_default=False)] = None,
) -> None:
    """Train a base model on text; final/ is a complete model."""
    flags = {name: value for name, value in locals().items() if value is not None}
    # `--resume PATH` is the flag and a word that stands alone: an option whose value may be left out.
    for name in ("recipe", "resume", "resume_path", "smoke"):
        flags.pop(name, None)
    if resume_path is not None and not resume:
        raise ValueError(f"'{resume_path}' belongs to no option; a path to go on from is --resume PATH")
    data = flags.pop("data", None)
    if data:
        flags["data_file"] = data if len(data) > 1 else data[0]
    silence_transformers()
    from accelerate import PartialState

    from tessera.training.pretrain import pretrain as train
    from tessera.training.pretrain_arguments import gather_arguments, launched_processes

    args = gather_arguments(flags, recipe, resume_path or resume, launched_processes())
    result = train(args, resume=resume_path or resume, smoke=smoke)
    # Of several processes, one says it.
    if PartialState().is_main_process:
        if result.sample:
            typer.echo(f"sample:\n{result.sample}")
        typer.echo(f"model: {result.final}")
        if not smoke:
            from tessera.data.token_files import is_prepared

            run = result.folder
            # Plain text was mostly trained on.
            one = isinstance(args.data_file, str) and is_prepared(args.data_file)
            held_out = args.data_file if one else "OTHER_TEXT"
            typer.echo(
                f"next: tessera eval --model {run} --data {held_out} | tessera sft --model {run} "
                f"--data CHATS.jsonl | tessera generate --ckpt-path {run} --interactive"
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

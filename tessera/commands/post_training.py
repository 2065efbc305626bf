"""`tessera sft`, `tessera dpo`, `tessera grpo`: from a base model to one that answers."""

from typing import Annotated

import typer

from ._common import require_extra, silence_transformers

# What the three have in common.
Model = Annotated[str, typer.Option(help="Run directory, or model directory, to start from.")]
EvalData = Annotated[str | None, typer.Option(help="Data to evaluate on; default: a twentieth of --data.")]
MaxSeqLen = Annotated[
    int | None, typer.Option(help="Tokens in a row; default 2048, or the model's context if shorter.")
]
Accumulation = Annotated[int, typer.Option(help="Micro-batches that a step is split into.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data; default 1 without --steps.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
LearningRate = Annotated[float | None, typer.Option(help="Default: by the size of the model.")]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, more time.")
]
Lora = Annotated[bool, typer.Option("--lora", help="Train low-rank adapters; final/ has them merged.")]
LoraRank = Annotated[int, typer.Option(help="Rank of the adapters.")]
Split = Annotated[str | None, typer.Option(help="Split of a Hub dataset.")]
Name = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
Limit = Annotated[int | None, typer.Option(help="Rows of --data to use at most.")]
Seed = Annotated[int, typer.Option(help="Of data order, adapters and dropout.")]
Evaluations = Annotated[int, typer.Option(help="Evaluations during the run.")]
CheckpointMinutes = Annotated[float, typer.Option(help="Minutes between checkpoints; 0: none.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")]


def sft(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="Conversations: JSON lines, JSON, parquet, a folder, or a Hub dataset."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known dataset instead of --data, such as smoltalk.")
    ] = None,
    eval_data: EvalData = None,
    save_path: Annotated[str, typer.Option(help="Run directory.")] = "runs/sft",
    max_seq_len: MaxSeqLen = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a step, over all processes.")] = 8,
    accumulation: Accumulation = 1,
    epochs: Epochs = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    packing: Annotated[
        bool, typer.Option(help="Several conversations in a row, none of which sees another.")
    ] = True,
    too_long: Annotated[
        str, typer.Option(help="Conversations of over --max-seq-len tokens: truncate, split or drop.")
    ] = "truncate",
    gradient_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the data while training; needs --steps.")
    ] = False,
    split: Split = None,
    name: Name = None,
    limit: Limit = None,
    seed: Seed = 0,
    evaluations: Evaluations = 4,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    resume: Resume = False,
) -> None:
    """Fine-tune on conversations, on the assistant's words only."""
    given = {key: value for key, value in locals().items() if key not in ("resume", "preset")}
    if preset is not None:
        from tessera.data.chat import preset_path

        if data is not None:
            raise ValueError("give either --data or --preset")
        given["data"] = preset_path(preset)
    _run("sft", given, resume)


def dpo(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Rows of chosen and rejected, with prompt or as whole transcripts.")
    ],
    eval_data: EvalData = None,
    save_path: Annotated[str, typer.Option(help="Run directory.")] = "runs/dpo",
    beta: Annotated[float, typer.Option(help="How hard it is to leave the starting model.")] = 0.1,
    max_seq_len: MaxSeqLen = None,
    batch_size: Annotated[int, typer.Option(help="Pairs in a step, over all processes.")] = 8,
    accumulation: Accumulation = 1,
    epochs: Epochs = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    gradient_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    split: Split = None,
    name: Name = None,
    limit: Limit = None,
    seed: Seed = 0,
    evaluations: Evaluations = 4,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    resume: Resume = False,
) -> None:
    """Prefer the better of two answers (direct preferences)."""
    _run("dpo", {key: value for key, value in locals().items() if key != "resume"}, resume)


def grpo(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Problems: question or prompt, and answer.")] = None,
    task: Annotated[str | None, typer.Option(help="arithmetic: makes its own problems.")] = None,
    difficulty: Annotated[int, typer.Option(help="Digits of the numbers in --task arithmetic.")] = 1,
    eval_data: EvalData = None,
    save_path: Annotated[str, typer.Option(help="Run directory.")] = "runs/grpo",
    num_generations: Annotated[int, typer.Option(help="Answers to each problem.")] = 8,
    max_completion_len: Annotated[int, typer.Option(help="Tokens in an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 1.0,
    max_seq_len: MaxSeqLen = None,
    batch_size: Annotated[int, typer.Option(help="Answers in a step; a multiple of --num-generations.")] = 32,
    accumulation: Accumulation = 1,
    epochs: Epochs = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    gradient_checkpointing: Checkpointing = False,
    lora: Lora = False,
    lora_rank: LoraRank = 16,
    split: Split = None,
    name: Name = None,
    limit: Limit = None,
    seed: Seed = 0,
    evaluations: Evaluations = 4,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    resume: Resume = False,
) -> None:
    """Reinforce answers that a program can check (GRPO)."""
    _run("grpo", {key: value for key, value in locals().items() if key != "resume"}, resume)


def _run(stage: str, given: dict, resume: bool) -> None:
    require_extra("post", "trl", "peft", "datasets")
    silence_transformers()
    from importlib import import_module

    from accelerate import PartialState

    module = import_module(f"tessera.training.{stage}")
    arguments = getattr(module, f"{stage.upper()}Arguments")
    result = getattr(module, stage)(arguments(**given), resume=resume)
    # Of several processes, one says it.
    if PartialState().is_main_process:
        typer.echo(f"sample:\n{(result.folder / 'sample.txt').read_text(encoding='utf-8')}")
        typer.echo(f"model: {result.final}")

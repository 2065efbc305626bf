"""What a pretraining run is told, and how a recipe and what is given beside it become one.

What belongs here: an argument, its default, what it refuses, and which arguments give way to which.
"""

import difflib
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from tessera.configs.recipes import RECIPE_FILE, read_recipe
from tessera.data.training_rows import PACKINGS

from .pipeline_names import run_in_our_words


@dataclass
class PretrainArguments:
    """What a run is told; saved as `recipe.yaml`.

    Attributes:
        config: preset, Tessera config file (JSON or YAML), or ByteGPT's own JSON.
        data_file: folder of tokens that `tessera data prepare` wrote, text file, or folder of text files; or
            several such folders of tokens, each `folder:weight` with its share of the rows.
        packing: `contiguous`, the text cut into windows; or `best-fit`, rows that start at documents.
        isolate_documents: keep documents of a row from seeing one another.
        save_path: run directory; a name ending in `.safetensors` also gets the final weights as that file.
        ckpt_path: directory of weights or of a run to start from; passed over, with a word, if nothing is
            there yet.
        tokenizer: directory or Hub name; default: that of prepared tokens, bytes for text.
        epochs, steps, minutes, tokens: length of the run; the first that is reached ends it. Default: one
            epoch, which of several corpora is that of the first that is through.
        batch_size: windows in an optimizer step, over all processes.
        accumulation: micro-batches that a step is split into on each process; default 1.
        micro_batch_size: windows that a process takes at a time at most; sets the accumulation, whatever
            the number of processes.
        sequence_length: positions in a window; default: the model's context, at most 1024.
        optimizer: `muon` or `adamw`; default: muon, but adamw, as in the original, for ByteGPT's own JSON.
        learning_rate, weight_decay, warmup, floor, clip: see `optimizers.py` and `schedules.py`;
            `clip` is the largest gradient norm, 0 for none.
        warmup_steps: the warm-up in steps, instead of `warmup`, its share of the run.
        precision: `bf16`, `fp16`, `fp32` or `auto`: see `precision.py`.
        seed: of weights, data order and dropout.
        evaluations: validation passes during the run, beside those at its start and end.
        eval_steps: steps between them, instead.
        eval_tokens: tokens, about, of the validation text that those during the run see; the last sees all.
        checkpoint_minutes: minutes between checkpoints; 0 for none but the last.
        checkpoint_steps: steps between checkpoints; 0 for those of the minutes alone.
        log_steps: steps between records in `metrics.jsonl`.
        gradient_checkpointing: recompute activations in the backward pass.
        sample_prompt, sample_tokens: text that samples start with, and their length; default: the token that
            documents start after, or a line break for bytes.

    Raises:
        ValueError: for a number that makes no sense, or two arguments that exclude each other.
    """

    config: str
    data_file: str | list[str]
    save_path: str = "runs/pretrain"
    ckpt_path: str | None = None
    tokenizer: str | None = None
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    tokens: int | None = None
    batch_size: int = 8
    accumulation: int | None = None
    micro_batch_size: int | None = None
    sequence_length: int | None = None
    packing: str = "contiguous"
    isolate_documents: bool = False
    depth: int | None = None
    flops: float | None = None
    tokens_per_parameter: float | None = None
    batch_schedule: list[str] | None = None
    length_schedule: list[str] | None = None
    optimizer: str | None = None
    muon_features: list[str] | None = None
    optimizer_in_backward: bool = False
    weights: str = "fp32"
    momentum: float = 0.95
    momentum_start: float | None = None
    momentum_warmup_steps: int | None = None
    momentum_end: float | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    weight_decay_schedule: str = "constant"
    schedule: str = "cosine"
    decay: float | None = None
    warmup: float = 0.02
    warmup_steps: int | None = None
    floor: float = 0.0
    clip: float = 1.0
    z_loss: float = 0.0
    precision: str = "auto"
    compile: str = "auto"
    attention: str = "auto"
    parallel: str = "ddp"
    shard_size: int | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    bad_steps: int = 3
    rollbacks: int = 2
    seed: int = 0
    evaluations: int = 4
    eval_steps: int | None = None
    eval_tokens: int = 50_000
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    keep_last: int = 2
    keep_best: bool = False
    keep_every: int | None = None
    async_checkpoints: bool = True
    log_steps: int = 10
    trackers: list[str] | None = None
    peak_tflops: float | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_every: int = 1
    sample_prompt: str | None = None
    sample_tokens: int = 300

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        for name in (
            "batch_size",
            "accumulation",
            "micro_batch_size",
            "eval_steps",
            "eval_tokens",
            "log_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "steps", "minutes", "tokens", "sequence_length", "learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "evaluations", "sample_tokens", "seed", "warmup_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("checkpoint_minutes", "checkpoint_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise ValueError(f"precision must be auto, bf16, fp16 or fp32, got '{self.precision}'")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be {' or '.join(map(repr, PACKINGS))}, got '{self.packing}'")
        if isinstance(self.data_file, list) and len(self.data_file) == 1:
            self.data_file = self.data_file[0]
        if not self.data_file and isinstance(self.data_file, list):
            raise ValueError("data_file is an empty list; name a folder or a file")
        if self.accumulation is not None and self.micro_batch_size is not None:
            raise ValueError("accumulation and micro_batch_size both split a step; give one of them")
        if self.tokens is not None:
            self.tokens = int(self.tokens)  # 2e9 on a command line
        if self.epochs is None and self.steps is None and self.minutes is None and self.tokens is None:
            self.epochs = 1

    @property
    def weights_file(self) -> Path | None:
        """The file that also gets the final weights."""
        return Path(self.save_path) if self.save_path.endswith(".safetensors") else None

    @property
    def folder(self) -> Path:
        """The run directory."""
        return _folder_of(self.save_path)


# Two ways to say one thing: what lies above takes the place of all that lies below.
ALTERNATIVES = (
    ("epochs", "steps", "minutes", "tokens"),
    ("accumulation", "micro_batch_size"),
    ("warmup", "warmup_steps"),
    ("evaluations", "eval_steps"),
)


def gather_arguments(
    given: dict[str, Any], recipe: str | None = None, resume: bool | str = False, processes: int = 1
) -> PretrainArguments:
    """What a run is told by a recipe and by what is given, which lies over the recipe.

    A run that is resumed without a configuration or recipe takes its own, and a path to resume from means the
    run that it belongs to unless another is named.

    Args:
        given: names and values of `PretrainArguments`.
        recipe: file, run directory or name; the file may speak in the words of other pipelines.
        resume: whether the run is to go on, or the run or checkpoint that it goes on from.
        processes: of the launch, over which other pipelines count their batches.

    Raises:
        ValueError: for an unknown key, a value of another type, or if configuration or data are missing.
    """
    run = None
    if isinstance(resume, str):
        run = run_of(resume)
    elif resume:
        run = _folder_of(given.get("save_path", PretrainArguments.save_path))
    own = recipe is None and "config" not in given and run is not None and (run / RECIPE_FILE).is_file()
    if own:
        recipe = str(run)
    below = {} if recipe is None else _read(recipe, processes)
    if isinstance(resume, str) and (own or "save_path" not in below):
        # The recipe may name the place where the run was before somebody moved it.
        if "save_path" not in below or _folder_of(below["save_path"]).resolve() != run.resolve():
            below["save_path"] = str(run)
    for group in ALTERNATIVES:
        if any(name in given for name in group):
            below = {name: value for name, value in below.items() if name not in group}
    if given.get("optimizer") not in (None, below.get("optimizer", "muon")):
        below.pop("learning_rate", None)  # that of one optimizer is far off for another
    values = below | given
    for name, meaning in (
        ("config", "a preset, or a file with a configuration"),
        ("data_file", "a folder that `tessera data prepare` wrote, a text file, or a folder of text"),
    ):
        if name not in values:
            option = "--data" if name == "data_file" else f"--{name}"
            raise ValueError(f"option '{option}' is missing: {meaning}")
    return PretrainArguments(**values)


def launched_processes() -> int:
    """Processes that torchrun or accelerate has started for this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def run_of(path: str | Path) -> Path:
    """The run directory that a path to it or to one of its checkpoints means."""
    path = Path(path)
    if path.absolute().parent.name != "checkpoints":
        return path
    return Path(os.path.normpath(path / ".." / ".."))


def _folder_of(save_path: str) -> Path:
    return Path(save_path).with_suffix("") if save_path.endswith(".safetensors") else Path(save_path)


def _read(recipe: str, processes: int) -> dict[str, Any]:
    """The values of a recipe in our words; what is null is not given."""
    known = {field.name: field.type for field in fields(PretrainArguments)}
    values = run_in_our_words(read_recipe(recipe), processes, recipe)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"{recipe}: there is no '{name}' to tell a run{hint}")
        values[name] = _fit(value, known[name], f"{recipe}: {name}")
    return values


def _fit(value: Any, annotation: Any, what: str) -> Any:
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not NoneType]
    if list[str] in kinds and isinstance(value, list):
        if all(type(part) is str for part in value):
            return value
        raise ValueError(f"{what} must be a text, or a list of texts, got {value!r}")
    kind = kinds[0]
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 2e9
    fits = type(value) in (int, float) if kind is float else type(value) is kind
    if not fits:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{what} must be {names[kind]}, got {value!r}")
    return value

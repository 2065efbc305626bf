"""What a pretraining run is told, and how a recipe and what is given beside it become one.

What belongs here: an argument, its default, what it refuses, and which arguments give way to which. The
command line is made from these fields (`tessera.commands.pretrain`), so nothing here may import torch or
numpy.
"""

import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tessera.configs.recipes import RECIPE_FILE, read_recipe

from .argument_fields import check, fit, nearest, told
from .pipeline_names import run_in_our_words
from .schedules import DECAY_SCHEDULES, SCHEDULES, read_stages

# What says how long a run is; whatever is reached first ends it.
LENGTHS = ("epochs", "steps", "tokens", "tokens_per_parameter", "flops", "minutes")


@dataclass
class PretrainArguments:
    """What a run is told; saved as `recipe.yaml`. Each field says itself what it is.

    With `depth` some are unset until `scaling.py` has chosen them: `batch_size`, `weight_decay`.

    Raises:
        ValueError: for a number that makes no sense, a name that nobody knows, or two arguments that exclude
            each other.
    """

    config: str = told(
        MISSING,
        "Run",
        "Preset, config file (JSON, or YAML in llama's names or Tessera's), or ByteGPT's own JSON.",
        flags=("--config", "--model-config"),
    )
    data_file: str | list[str] = told(
        MISSING,
        "Run",
        "What `tessera data prepare` wrote, a text file, or a folder of text files. Several of the first "
        "kind are mixed: --data A:0.7 --data B:0.3.",
        flags=("--data", "--data-file"),
    )
    save_path: str = told(
        "runs/pretrain",
        "Run",
        "Run directory [runs/pretrain]; a name ending in .safetensors also gets the weights.",
    )
    ckpt_path: str | None = told(None, "Run", "Directory of weights, or of a run, to start from.")
    seed: int = told(0, "Run", "Of weights, data order and dropout [0].", least=0)
    depth: int | None = told(
        None,
        "Run",
        "Layers: the dial that sets all sizes of the model and, where not given, length, batch, rates and "
        "weight decay.",
        least=1,
    )

    tokenizer: str | None = told(
        None, "Data", "Tokenizer directory or Hub name [the prepared tokens'; bytes for text]."
    )
    sequence_length: int | None = told(
        None, "Data", "Tokens in a window [the model's context, at most 1024].", least=1
    )
    packing: str = told(
        "contiguous",
        "Data",
        "Rows: contiguous, or best-fit, each from a document's start [contiguous].",
        choices=("contiguous", "best-fit"),
    )
    isolate_documents: bool = told(False, "Data", "Documents of a row do not see one another [they do].")

    epochs: float | None = told(
        None, "Length", "Passes over the text, or the first of several [1 if nothing limits].", above=0
    )
    steps: int | None = told(None, "Length", "Optimizer steps.", above=0)
    tokens: int | None = told(None, "Length", "Tokens to train on, such as 2e9.", kind=float, above=0)
    tokens_per_parameter: float | None = told(
        None, "Length", "The same for each parameter of the layers and the head.", above=0
    )
    flops: float | None = told(
        None, "Length", "Floating-point operations of training, such as 1e18.", above=0
    )
    minutes: float | None = told(
        None, "Length", "Minutes of training; of several limits, the first that is reached ends it.", above=0
    )

    batch_size: int | None = told(None, "Batch", "Windows in a step, over all processes [8].", least=1)
    accumulation: int | None = told(
        None, "Batch", "Micro-batches that a process splits a step into [1].", least=1
    )
    micro_batch_size: int | None = told(
        None, "Batch", "Windows on a device at a time, at most; sets the accumulation.", least=1
    )
    batch_schedule: list[str] | None = told(
        None,
        "Batch",
        "Windows in a step from a share of the run on, such as 0:64,0.3:128.",
    )
    length_schedule: list[str] | None = told(
        None, "Batch", "Tokens in a window from a share of the run on, such as 0:512,0.2:2048."
    )

    optimizer: str | None = told(
        None,
        "Optimizer",
        "muon (and AdamW for what is no matrix), adamw, or adamw-8bit, by bitsandbytes [muon; for ByteGPT's "
        "own JSON adamw].",
        choices=("muon", "adamw", "adamw-8bit"),
    )
    muon_features: list[str] | None = told(
        None, "Optimizer", "Parts of Muon that are on, of equilibrate,renormalize,normuon,cautious [all]."
    )
    optimizer_in_backward: bool = told(
        False, "Optimizer", "Update each parameter as soon as its gradient is there; less memory."
    )
    learning_rate: float | None = told(
        None, "Optimizer", "Of the matrices [0.02 for muon, 0.001 for adamw].", above=0
    )
    weight_decay: float | None = told(None, "Optimizer", "Decoupled weight decay [0].", least=0)
    table_decay: float | None = told(
        None,
        "Optimizer",
        "Weight decay of value embeddings beside muon, of which other embeddings have a tenth [0.01 for "
        "nanochat's start, else 0].",
        least=0,
    )
    momentum: float = told(0.95, "Optimizer", "Of Muon [0.95].", least=0, most=1)
    momentum_start: float | None = told(None, "Optimizer", "Where it starts [there].", least=0, most=1)
    momentum_warmup_steps: int | None = told(
        None, "Optimizer", "Steps on its way from there [300 with a start].", least=0
    )
    momentum_end: float | None = told(
        None, "Optimizer", "Where it ends, with the learning rate's decay [there].", least=0, most=1
    )
    clip: float = told(1.0, "Optimizer", "Largest gradient norm; 0 for none [1].", least=0)
    z_loss: float = told(
        0.0, "Optimizer", "Weight of the squared log of the softmax's denominator in the loss [0].", least=0
    )

    schedule: str = told(
        "cosine",
        "Schedule",
        "The learning rate after the warm-up: cosine, linear, constant, or wsd, constant and then linear "
        "[cosine].",
        choices=SCHEDULES,
    )
    decay: float | None = told(
        None, "Schedule", "Share of the run over which wsd falls [0.4].", above=0, most=1
    )
    warmup: float = told(
        0.02, "Schedule", "Share of the run over which the rate rises [0.02].", least=0, most=1
    )
    warmup_steps: int | None = told(None, "Schedule", "The same in steps.", least=0)
    floor: float = told(0.0, "Schedule", "Share of the rate that is left at the end [0].", least=0, most=1)
    weight_decay_schedule: str = told(
        "constant",
        "Schedule",
        "Weight decay over the run: constant, or linear or cosine down to 0 [constant].",
        choices=DECAY_SCHEDULES,
    )

    precision: str = told(
        "auto",
        "Precision and memory",
        "auto (bf16 where the GPU has it), bf16, fp16 or fp32 [auto].",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    weights: str = told(
        "fp32",
        "Precision and memory",
        "fp32; bf16, rounded by chance; or split, bf16 and the bits that it lacks beside them [fp32].",
        choices=("fp32", "bf16", "split"),
    )
    compile: str = told(
        "auto",
        "Precision and memory",
        "auto (where there is a GPU), on or off [auto].",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: str = told(
        "auto",
        "Precision and memory",
        "auto (where launching kernels takes longer than they do: small models), on or off [auto].",
        choices=("auto", "on", "off"),
    )
    attention: str = told(
        "auto",
        "Precision and memory",
        "auto (the fastest that device and model have), or one of flash4, flash3, flash2, cudnn, flex, "
        "varlen, sdpa, eager [auto].",
        choices=("auto", "flash4", "flash3", "flash2", "cudnn", "flex", "varlen", "sdpa", "eager"),
    )
    gradient_checkpointing: bool = told(False, "Precision and memory", "Less memory, more time.")
    gradient_checkpointing_every: int = told(
        1, "Precision and memory", "The same, in every n-th layer alone [1].", least=1
    )

    parallel: str = told(
        "ddp",
        "Parallel",
        "ddp, whole models; fsdp, weights split over all processes; hsdp, over --shard-size [ddp].",
        choices=("ddp", "fsdp", "hsdp"),
    )
    shard_size: int | None = told(None, "Parallel", "Processes that share one copy of the weights.", least=1)
    tensor_parallel: int = told(1, "Parallel", "Processes that split each matrix [1].", least=1)
    expert_parallel: int = told(1, "Parallel", "Processes that split the experts [1].", least=1)
    context_parallel: int = told(
        1, "Parallel", "Processes that split each window: 1, more is refused so far [1].", least=1
    )

    checkpoint_minutes: float = told(
        10.0, "Checkpoints", "Minutes between checkpoints [10]; 0: only the last.", least=0
    )
    checkpoint_steps: int = told(0, "Checkpoints", "Steps between checkpoints.", least=0)
    keep_last: int = told(2, "Checkpoints", "Checkpoints that stay [2].", least=1)
    keep_best: bool = told(False, "Checkpoints", "The one with the lowest validation loss stays too.")
    keep_every: int | None = told(None, "Checkpoints", "Those of every so many steps stay too.", least=1)
    async_checkpoints: bool = told(True, "Checkpoints", "Write them while training goes on [yes].")
    bad_steps: int = told(
        3, "Checkpoints", "Steps without a finite loss that are skipped before a rollback [3].", least=0
    )
    rollbacks: int = told(
        2, "Checkpoints", "Rollbacks to the last checkpoint before the run ends [2].", least=0
    )

    evaluations: int = told(4, "Show", "Validation passes during the run, beside start and end [4].", least=0)
    eval_steps: int | None = told(None, "Show", "Steps between them, instead.", least=1)
    eval_tokens: int = told(
        50_000, "Show", "Tokens, about, that those during the run see; the last sees all [50,000].", least=1
    )
    log_steps: int = told(10, "Show", "Steps between records in metrics.jsonl [10].", least=1)
    trackers: list[str] | None = told(
        None, "Show", "Where records go beside metrics.jsonl, such as tensorboard,wandb,trackio."
    )
    peak_tflops: float | None = told(
        None, "Show", "TFLOP/s of the device that MFU is a share of [measured].", above=0
    )
    sample_prompt: str | None = told(
        None, "Show", "What the sample at the end continues [the start of a document]."
    )
    sample_tokens: int = told(300, "Show", "Length of the sample [300].", least=0)

    chosen: list[str] | None = told(None, "", "What `scaling.py` chose; another depth chooses it anew.")

    def __post_init__(self):
        for one in fields(self):
            check(one, getattr(self, one.name))
        if isinstance(self.data_file, list) and len(self.data_file) == 1:
            self.data_file = self.data_file[0]
        if not self.data_file and isinstance(self.data_file, list):
            raise ValueError("data_file is an empty list; name a folder or a file")
        if self.accumulation is not None and self.micro_batch_size is not None:
            raise ValueError("accumulation and micro_batch_size both split a step; give one of them")
        self._settle_schedules()
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay is of schedule 'wsd', not of '{self.schedule}'; leave one of them out")
        if self.momentum_end is not None and self.schedule == "constant":
            raise ValueError(
                "momentum_end is reached as the learning rate falls, which schedule 'constant' does not"
            )
        if self.momentum_warmup_steps and self.momentum_start is None:
            raise ValueError("momentum_warmup_steps needs momentum_start, where the momentum starts")
        if self.table_decay is not None and self.optimizer not in (None, "muon"):
            raise ValueError(
                f"table_decay is of the tables beside muon; optimizer '{self.optimizer}' has weight_decay "
                "for them"
            )
        if self.optimizer_in_backward and self.batch_schedule is not None:
            raise ValueError("optimizer_in_backward needs steps of one size; leave batch_schedule out")
        if self.gradient_checkpointing_every > 1:
            self.gradient_checkpointing = True
        if self.tokens is not None:
            self.tokens = int(self.tokens)  # 2e9 on a command line
        if self.depth is None:
            # With a depth these are left to its rules, as is the length.
            self.batch_size = 8 if self.batch_size is None else self.batch_size
            self.weight_decay = 0.0 if self.weight_decay is None else self.weight_decay
            if all(getattr(self, name) is None for name in LENGTHS):
                self.epochs = 1

    def _settle_schedules(self) -> None:
        """What a schedule goes up to is what stands where there is none."""
        for name, size in (("batch_schedule", "batch_size"), ("length_schedule", "sequence_length")):
            if getattr(self, name) is None:
                continue
            largest = max(stage.size for stage in read_stages(getattr(self, name), name))
            if getattr(self, size) not in (None, largest):
                raise ValueError(
                    f"{name} goes up to {largest}, and {size} says {getattr(self, size)}; leave {size} out"
                )
            setattr(self, size, largest)

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
    LENGTHS,
    ("accumulation", "micro_batch_size"),
    ("batch_size", "batch_schedule"),
    ("sequence_length", "length_schedule"),
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
        resume: whether the run is to go on ("auto": if it can), or the run or checkpoint that it goes on
            from.
        processes: of the launch, over which other pipelines count their batches.

    Raises:
        ValueError: for an unknown key, a value of another type, or if configuration or data are missing.
    """
    run = None
    resume = True if resume == "auto" else resume
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
        # Those of one optimizer are far off for another, or nothing to it.
        below.pop("learning_rate", None)
        below.pop("table_decay", None)
    if given.get("schedule") not in (None, below.get("schedule")):
        below.pop("decay", None)
    if given.get("gradient_checkpointing") is False:
        below.pop("gradient_checkpointing_every", None)
    chosen = below.pop("chosen", None)
    if chosen and any(given.get(name) not in (None, below.get(name)) for name in ("depth", "optimizer")):
        below = {name: value for name, value in below.items() if name not in chosen}
    elif chosen:
        below["chosen"] = chosen
    values = below | given
    for name, meaning in (
        ("config", "a preset, or a file with a configuration"),
        ("data_file", "a folder that `tessera data prepare` wrote, a text file, or a folder of text"),
    ):
        if name not in values:
            option = "--data" if name == "data_file" else f"--{name}"
            nor = "" if recipe is None else f", and '{name}' in {recipe}"
            raise ValueError(f"option '{option}' is missing{nor}: {meaning}")
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
    known = {one.name: one for one in fields(PretrainArguments)}
    values = run_in_our_words(read_recipe(recipe), processes, recipe)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{recipe}: there is no '{name}' to tell a run{nearest(name, known)}")
        values[name] = fit(value, known[name], f"{recipe}: {name}")
    return values

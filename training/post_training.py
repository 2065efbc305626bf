"""What supervised fine-tuning, preferences and reinforcement share: `sft.py`, `dpo.py`, `grpo.py`.

Notable:
- the loop is TRL's; what is here gives it a model and a tokenizer that can chat, and keeps what comes out:
  `metrics.jsonl`, checkpoints, and `final/`, a complete Hugging Face directory;
- a tokenizer of a plain base model learns to chat: the tokens and the template are added, and the embedding
  grows with them;
- generation stops at the end of a turn and at the end of a text.

What belongs here: only what all three need. `trainer_parts.py` has what a trainer lacks, `held_out.py` the
loops that measure.
"""

import copy
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from tessera.data.chat_rows import check_template
from tessera.modeling.loading import load_model, read_config
from tessera.tokenization import add_chat, build_byte_tokenizer, find_end_of_turn

from .checkpoints.store import find_checkpoint, newest_verified
from .held_out import answer
from .records.curves import read_metrics
from .trainer_parts import Journal

DEFAULT_LENGTH = 2048
DROPOUTS = ("attention_dropout", "embd_pdrop", "resid_pdrop")
TOKENIZER_META = "tokenizer_meta.json"  # notes that transformers does not copy with the tokenizer


@dataclass(kw_only=True)
class PostTrainingArguments:
    """What a run of any of the three is told; saved as `recipe.yaml`.

    Attributes:
        model: run or model directory to start from.
        split, name: of `data` where that is a Hub dataset; default: `train`, and its only configuration.
        data, eval_data: file, folder or Hub dataset to train and to evaluate on; without the latter a part of
            the former is held out.
        save_path: run directory.
        max_seq_len: tokens of a row; default: 2048, or the model's context where that is shorter.
        batch_size: rows of an optimizer step, over all processes.
        accumulation: micro-batches that a step is split into on each process.
        epochs, steps: length of the run; default: one epoch.
        learning_rate: default: by the size of the model, see `rate_by_size`.
        gradient_checkpointing: recompute activations in the backward pass.
        lora, lora_rank: train low-rank adapters of all linear layers but the head, and of experts.
        limit: rows of the data to use at most.
        seed: of data order, adapters and dropout.
        evaluations: evaluations during the run, beside those at its start and end.
        checkpoint_minutes: minutes between checkpoints; 0 for none.
        sample_tokens: length of the answer in `sample.txt`.
    """

    model: str
    data: str | None = None
    split: str | None = None
    name: str | None = None
    eval_data: str | None = None
    save_path: str
    max_seq_len: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    gradient_checkpointing: bool = False
    lora: bool = False
    lora_rank: int = 16
    limit: int | None = None
    seed: int = 0
    evaluations: int = 4
    checkpoint_minutes: float = 10.0
    sample_tokens: int = 200

    def __post_init__(self):
        for name in ("max_seq_len", "epochs", "steps", "learning_rate", "limit"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("batch_size", "accumulation", "lora_rank", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "evaluations", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            self.epochs = 1


@dataclass
class PostTrainingResult:
    """What a run leaves: where, and what was measured on held-out data before and after."""

    folder: Path
    final: Path
    before: dict[str, float]
    after: dict[str, float]


class Workshop:
    """A model and a tokenizer that can chat, and the run directory that comes of them.

    Making one checks what all three are told and writes nothing.

    Args:
        args: the run.
        resume: go on from the newest good checkpoint of `save_path`.
        dropout: whether the model's dropout is used. Where two models are compared it must not be.
        ahead: whether layers for multi-token prediction, if the model has some, are trained on. Where the
            loss is not that of the next token, they have none of their own.

    Raises:
        ValueError: for a model, tokenizer or run directory that cannot be used.
    """

    def __init__(self, args: PostTrainingArguments, resume: bool, dropout: bool = True, ahead: bool = False):
        self.args = args
        self.cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self.processes = PartialState(cpu=self.cpu)
        self.folder = Path(args.save_path)
        self.checkpoint = self._find_own_checkpoint(resume)
        set_seed(args.seed)
        self.source = find_checkpoint(args.model)
        config = read_config(self.source / "config.json")
        # Trainers change these, and whoever loads the model has not asked for it.
        self._config = {key: getattr(config, key) for key in ("output_router_logits", "use_cache", *DROPOUTS)}
        if not dropout:
            for key in DROPOUTS:
                setattr(config, key, 0.0)
        config.train_mtp = ahead and config.num_mtp_layers > 0
        if config.num_mtp_layers and not ahead:
            self.say("its layers for multi-token prediction are left out: this does not train them")
        self.model = load_model(self.source, config, dtype=torch.float32)
        self.tokenizer = self._load_chat_tokenizer(self.source)
        self._generation = copy.deepcopy(self.model.generation_config)
        context = self.model.config.max_position_embeddings
        self.length = args.max_seq_len or min(DEFAULT_LENGTH, context)
        if self.length > context:
            raise ValueError(
                f"--max-seq-len {self.length} is longer than the model's context of {context} tokens"
            )
        split = args.accumulation * self.processes.num_processes
        if args.batch_size % split:
            raise ValueError(
                f"--batch-size {args.batch_size} does not divide into {args.accumulation} micro-batches on "
                f"each of {self.processes.num_processes} processes"
            )
        self.micro = args.batch_size // split

    def _find_own_checkpoint(self, resume: bool) -> Path | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--save-path {self.folder} is a file")
        if not resume:
            if any(path.is_file() for path in self.folder.rglob("*")):
                raise ValueError(
                    f"{self.folder} already holds files; resume that run, or choose another --save-path"
                )
            return None
        newest, refused = newest_verified(self.folder / "checkpoints")
        for sentence in refused:
            self.say(f"passing over {sentence}")
        if newest is None:
            raise ValueError(f"{self.folder} has no checkpoint to resume from")
        self.say(f"resuming from {newest}")
        return newest

    def _load_chat_tokenizer(self, source: Path) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model; one of a plain base model learns to chat."""
        size = self.model.config.vocab_size
        if (source / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(source)
        elif size == 256:
            tokenizer = build_byte_tokenizer()
        else:
            raise ValueError(f"{source} has no tokenizer, and {size} tokens are not bytes")
        if tokenizer.chat_template is None:
            tokenizer = add_chat(tokenizer)
        check_template(tokenizer)
        self.grown = (new := len(tokenizer) - size) > 0
        if self.grown:
            if self.args.lora:
                raise ValueError(
                    f"the vocabulary of {source} lacks {new} tokens of the chat template, whose embeddings "
                    "are not learnt with --lora; leave it out, or start from a model fine-tuned without it"
                )
            self.say(f"adding {new} tokens of the chat template to the model's vocabulary")
            self.model.resize_token_embeddings(len(tokenizer))
        turn_end = find_end_of_turn(tokenizer)
        ends = [end for end in (turn_end, tokenizer.eos_token_id) if end is not None]
        if not ends:
            raise ValueError(f"nothing would end an answer: the tokenizer of {source} has no token for it")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[-1])
        generation = self.model.generation_config
        generation.eos_token_id = list(dict.fromkeys(ends))
        generation.pad_token_id, generation.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        return tokenizer

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes."""
        if self.processes.is_main_process:
            print(text, flush=True)

    # ---- what TRL is given ----

    def trainer_arguments(self, default_rate: float) -> dict:
        """What the three configurations of TRL have in common."""
        args = self.args
        bf16 = not self.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return {
            "output_dir": str(self.folder / "checkpoints"),
            "per_device_train_batch_size": self.micro,
            "gradient_accumulation_steps": args.accumulation,
            "num_train_epochs": args.epochs or 1,
            "max_steps": args.steps or -1,
            "learning_rate": args.learning_rate or default_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "gradient_checkpointing": args.gradient_checkpointing,
            "bf16": bf16,
            # Every step reaches every parameter: experts are one tensor.
            "ddp_find_unused_parameters": False,
            "use_cpu": self.cpu,
            "seed": args.seed,
            # What is told, drawn and kept is the journal's.
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def adapters(self):
        """What PEFT is to train, or None: every linear layer but the head, and the experts."""
        if not self.args.lora:
            return None
        from peft import LoraConfig

        ends = ("mlp.experts.gate_up_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
        names = [name for name, _ in self.model.named_parameters()]
        experts = [end for end in ends if any(name.endswith(end) for name in names)]
        return LoraConfig(
            r=self.args.lora_rank,
            lora_alpha=2 * self.args.lora_rank,
            target_modules="all-linear",
            target_parameters=experts or None,
            task_type="CAUSAL_LM",
        )

    # ---- the run ----

    def run(
        self,
        trainer: Trainer,
        evaluate: Callable[[nn.Module], dict[str, float]],
        describe: Callable[[dict[str, float]], str],
        question: list[dict],
        draw: Callable[[list[dict], Path], bool],
    ) -> PostTrainingResult:
        """Trains, evaluates before, during and after, and writes the run directory.

        Args:
            trainer: TRL's, with `PlainCheckpoints`.
            evaluate: measures the model on held-out data.
            describe: makes a line of what was measured.
            question: messages that the model answers in `sample.txt`.
            draw: draws the records of `metrics.jsonl`, if it can.

        Raises:
            ValueError: if the device's memory is not enough.
            FloatingPointError: if the loss is no longer a number.
        """
        journal = Journal(self, trainer, evaluate, describe)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(journal)
        with memory_advice(self.args), quietly():
            before = journal.begin()
            self.say(f"before training: {describe(before)}")
            if self.checkpoint is None:
                trainer.train()
            else:
                trainer.resume(self.checkpoint)
            after = journal.measure()
            with torch.no_grad(), trainer.accelerator.autocast():
                said = answer(trainer.model, self.tokenizer, [question], self.args.sample_tokens)[0]
        asked = "".join(f"{message['role']}: {message['content']}\n" for message in question)
        final = self._finish(trainer, f"{asked}assistant: {said}\n")
        if self.processes.is_main_process:
            curve = self.folder / "loss.png"
            drawn = draw(read_metrics(journal.file), curve)
            self.say(f"curve: {curve}" if drawn else "curve: not drawn, matplotlib is not installed")
        self.say(f"after training:  {describe(after)}")
        return PostTrainingResult(self.folder, final, before, after)

    def write_recipe(self) -> None:
        """Begins the run directory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = yaml.safe_dump(asdict(self.args), sort_keys=False, allow_unicode=True)
        (self.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        # Of an end that the resumed run is to replace.
        shutil.rmtree(self.folder / "final", ignore_errors=True)

    def _finish(self, trainer: Trainer, sample: str) -> Path:
        """Writes `final/`, and `adapter/` where there is one, aside and renamed."""
        model, final = trainer.accelerator.unwrap_model(trainer.model), self.folder / "final"
        if self.processes.is_main_process:
            if self.args.lora:
                with written_aside(self.folder / "adapter") as aside:
                    model.save_pretrained(aside)
                model = model.merge_and_unload()
            for key, value in self._config.items():
                setattr(model.config, key, value)
            model.generation_config = self._generation
            with written_aside(final) as aside:
                model.save_pretrained(aside)
                self.tokenizer.save_pretrained(aside)
                # What it says of the vocabulary holds where no token was added.
                if (notes := self.source / TOKENIZER_META).is_file() and not self.grown:
                    shutil.copyfile(notes, aside / TOKENIZER_META)
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
        self.processes.wait_for_everyone()
        return final


def rate_by_size(model: nn.Module, at_7b: float) -> float:
    """A learning rate from the one that is usual for 7 billion parameters: it falls with their square root.

    Fifty times that one is the most, so that models of a few million parameters get what suits them.
    """
    return at_7b * min(math.sqrt(7e9 / model.num_parameters()), 50)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the libraries say: bars of steps too quick to watch, advice to their own users."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "trl")]
    levels = [logger.level for logger in loggers]
    datasets.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def memory_advice(args: PostTrainingArguments) -> Iterator[None]:
    """Turns an exhausted GPU into a sentence about what to change, the cheapest first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        shorter = "--max-completion-len" if hasattr(args, "max_completion_len") else "--max-seq-len"
        advice = [
            f"a shorter {shorter}",
            "a smaller --batch-size, or more --accumulation for the same one",
        ]
        if not args.gradient_checkpointing:
            advice.append("--gradient-checkpointing")
        if not args.lora:
            advice.append("--lora")
        raise ValueError(
            f"the device's memory is not enough; try, in this order: {'; '.join(advice)} "
            f"({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes `folder` when all is written, in place of what was there."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    yield aside
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)

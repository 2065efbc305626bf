"""The ways out: what a Tessera model can become, and what each of these consists of on disk.

What belongs here: the list. A target says what has to change in the model before it fits, exactly and without
a change of its logits, and writes the files; the order of things around that is in `convert.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from . import gguf_target, native
from .checkpoints import Checkpoint
from .equivalents import cut_padding, pair_halves, pair_neighbours
from .families import FAMILIES, Family
from .fp8_checkpoints import HUGGING_FACE_FP8, NATIVE_FP8, Encoder, Fp8Layout, Quantized
from .journal import Journal
from .nanochat_original import ARCHITECTURES, Architecture, prepare_nanochat, write_nanochat
from .nanochat_tokenizer import write_ranks
from .report import Check
from .rules import Rule, to_theirs
from .tensor_files import LARGEST_FILE, planned_size, split_into_files, write_safetensors

Tensors = Mapping[str, torch.Tensor]
Prepared = tuple[TesseraConfig, Tensors]


@dataclass(frozen=True)
class Options:
    """What a user may ask of a target beside its name.

    Attributes:
        mp: model-parallel ranks, one file each.
        largest_file: bytes, where a target has several files.
        journal: of what is written already, and who is told of each tensor; goes to the writers of
            `tensor_files.py`.
        encode: to FP8, for a target that has it.
        dtype: for a target that rounds by itself, what to; None for as it is.
        tokenizer: whether a target of one file has the tokenizer in it.
        verify: what is compared beside every weight.
        source: the checkpoint that the model is from.
    """

    mp: int = 1
    largest_file: int = LARGEST_FILE
    journal: Journal | None = None
    encode: Encoder | None = None
    dtype: str | None = None
    tokenizer: bool = True
    verify: str | None = None
    source: Checkpoint | None = None


@dataclass(frozen=True)
class Written:
    """What a target has written, before it is kept.

    Attributes:
        folder: where it lies.
        source: the checkpoint that it came from.
        config, tensors: of the model that was to be written, under Tessera's names.
        options: that it was written with.
        device: to run models on.
    """

    folder: Path
    source: Checkpoint
    config: TesseraConfig
    tensors: Tensors
    options: Options
    device: str


@dataclass(frozen=True)
class Target:
    """One kind of checkpoint that a model can become.

    Attributes:
        name: on the command line.
        write: writes a prepared model's weights, and after them its configuration, into a directory that may
            hold what the journal in the options tells of.
        size: bytes that `write` will write, computed from shapes alone; raises ValueError for a model or
            options that it cannot write. Default: those of the tensors.
        verify: compares what was written with its source, for a layout that `open_checkpoint` does not read;
            default: `verify.py`, by reading it back.
        prepare: the same model as this target can have it.
        predicts_ahead: whether layers for multi-token prediction have a place.
        finish: adds what is made of the tokenizer, once that is there; gives sentences for the user.
        fp8: how it has matrices in FP8, if it can.
        rules: its tensors, where it can have them in FP8.
        dtypes: what `--dtype` may be, for a target that rounds by itself.
        suffix: of a target of one file, which has all that else comes along beside it.
        verifications: what `--verify` may be beside what it may be for all.
    """

    name: str
    write: Callable[[Path, TesseraConfig, Tensors, Options], None]
    prepare: Callable[[TesseraConfig, Tensors], Prepared] = lambda config, tensors: (config, tensors)
    predicts_ahead: bool = False
    size: Callable[[TesseraConfig, Tensors, Options], int] | None = None
    verify: Callable[[Written], list[Check]] | None = None
    finish: Callable[[Path], list[str]] = lambda folder: []
    fp8: Fp8Layout | None = None
    rules: Callable[[TesseraConfig], list[Rule]] | None = None
    dtypes: tuple[str, ...] | None = None
    suffix: str | None = None
    verifications: tuple[str, ...] = ()


def _write_tessera(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
    write_safetensors(folder, tensors, options.largest_file, options.journal)
    config.architectures = ["TesseraForCausalLM"]
    config.save_pretrained(folder)


def _size_tessera(config: TesseraConfig, tensors: Tensors, options: Options) -> int:
    return planned_size(split_into_files(tensors, options.largest_file))


def _write_native(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
    native.write_native(folder, config, tensors, options.mp, options.journal, options.encode)
    config.architectures = ["TesseraForCausalLM"]
    # Not a directory that transformers loads, so without the code for that.
    config.to_json_file(folder / "config.json")


def _size_native(config: TesseraConfig, tensors: Tensors, options: Options) -> int:
    return planned_size(native.rank_files(config, tensors, options.mp, options.encode))


def _family_target(family: Family) -> Target:
    def prepare(config: TesseraConfig, tensors: Tensors) -> Prepared:
        pair = pair_neighbours if family.fixed.get("rope_interleave") else pair_halves
        return pair(*cut_padding(config, tensors))

    def rename(config: TesseraConfig, tensors: Tensors, options: Options) -> Tensors:
        renamed = to_theirs(tensors, config, family.rules_to_write(config))
        return renamed if options.encode is None else options.encode(renamed)

    def write(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
        theirs = family.config_for(config)
        theirs.dtype = config.dtype
        renamed = rename(config, tensors, options)
        if isinstance(renamed, Quantized):
            theirs.quantization_config = renamed.settings
        write_safetensors(folder, renamed, options.largest_file, options.journal)
        theirs.save_pretrained(folder)

    def size(config: TesseraConfig, tensors: Tensors, options: Options) -> int:
        family.config_for(config)
        return planned_size(split_into_files(rename(config, tensors, options), options.largest_file))

    # Of the families DeepSeek-V3 is the one whose releases are in FP8.
    fp8 = HUGGING_FACE_FP8 if family.model_type == "deepseek_v3" else None
    return Target(
        family.model_type,
        write,
        prepare,
        family.predicts_ahead,
        size,
        fp8=fp8,
        rules=family.rules_to_write,
    )


def _nanochat_target(kind: Architecture) -> Target:
    def prepare(config: TesseraConfig, tensors: Tensors) -> Prepared:
        return prepare_nanochat(config, tensors, kind)

    def write(folder: Path, config: TesseraConfig, tensors: Tensors, options: Options) -> None:
        write_nanochat(folder, config, tensors, kind)

    return Target(kind.name, write, prepare, finish=write_ranks)


TARGETS = {
    target.name: target
    for target in (
        Target("tessera", _write_tessera, predicts_ahead=True, size=_size_tessera),
        Target("native", _write_native, size=_size_native, fp8=NATIVE_FP8, rules=lambda config: native.RULES),
        *map(_family_target, FAMILIES.values()),
        *map(_nanochat_target, ARCHITECTURES),
        Target(
            "gguf",
            gguf_target.write,
            gguf_target.prepare,
            size=gguf_target.size,
            verify=gguf_target.verify,
            dtypes=tuple(gguf_target.TYPES),
            suffix=gguf_target.SUFFIX,
            verifications=(gguf_target.LLAMA_CPP,),
        ),
    )
}


def require_dtype(dtype: str, kind: str | None) -> None:
    """Checks that weights can be rounded to a dtype, before anything is done for it.

    Args:
        dtype: as `--dtype` has it.
        kind: target; None for one that is not known yet.

    Raises:
        ValueError: if they cannot.
    """
    target = None if kind is None else TARGETS.get(kind)
    plain = ("float32", "bfloat16", "float16")
    if target is None:
        some = [name for name, each in TARGETS.items() if each.fp8 is not None]
        if dtype not in (*plain, "fp8"):
            told = f"{', '.join(plain)}, and fp8 for {', '.join(some)}"
            raise ValueError(f"--dtype {dtype}: choose from {told}")
        return
    choices = target.dtypes or (plain if target.fp8 is None else (*plain, "fp8"))
    if dtype not in choices:
        raise ValueError(f"--dtype {dtype} for {kind}: choose from {', '.join(choices)}")

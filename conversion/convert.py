"""From one checkpoint to another: read, translated, written aside, verified, and only then kept.

What belongs here: the order of these. Everything goes through Tessera's own names: a checkpoint of any kind
is read as a Tessera model (`sources.py`), and that is written as any kind (`targets.py`). Runs by itself with
the arguments of DeepSeek's converter:

    python -m tessera.conversion.convert <hf_ckpt_path> <save_path> <n_experts> <mp>
"""

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import tessera
from tessera.modeling.configuration_tessera import TesseraConfig

from .acceptance import KINDS, Verdict, accept, compare_models
from .aside import claimed, keep, keep_file, require_space, resolve_target
from .checkpoints import Checkpoint
from .equivalents import drop_predictions_ahead
from .journal import Journal
from .outlines import outline, size_of
from .quantization import Quantization
from .report import Report, check_against_report, hash_files
from .rules import Changed
from .sound_weights import require_one_dtype, sound
from .sources import open_checkpoint
from .targets import TARGETS, Options, Target, Written
from .tensor_files import LARGEST_FILE
from .tokenizer_checks import require_fitting_tokenizer
from .verify import Difference

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Beside these: matrices in blocks of FP8, for the targets that have them.
_FP8 = "fp8"
# What FP8 made of each matrix, beside the weights.
FP8_REPORT = "fp8_error.json"
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
# Of what the sources read, beside their side files.
_READ = (*_WEIGHTS, ".pth", ".json", ".model")
# Read by the router in fp32 whatever the model's dtype.
_ALWAYS_FP32 = "e_score_correction_bias"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source, target: kinds of checkpoint.
        parameters: numbers in the tensors written, ranks counted once.
        difference: of the logits of source and result in fp32; None where they were not compared.
        notes: what was left out, in sentences.
        report: all of it, as it is stored with the result.
        course: what became of an earlier call, in sentences.
    """

    source: str
    target: str
    parameters: int
    difference: Difference | None
    notes: list[str]
    report: Report
    course: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    n_experts: int | None = None,
    mp: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    max_shard_size: int = LARGEST_FILE,
    verify: str | None = None,
    verify_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: bool = True,
) -> Conversion:
    """Converts a checkpoint. The target appears when it is complete and verified, or not at all.

    What a call that was killed had written is not written again by the same call.

    Args:
        source: directory of any kind that `open_checkpoint` knows, or a run's.
        target: directory that does not exist yet, or is empty; for GGUF a file too, whose name ends so.
        to: one of `TARGETS`; default `native` if `mp` is given, `gguf` if the target's name ends so, else
            `tessera` for what is not Tessera's yet, or not in `dtype`.
        n_experts: routed experts that the caller expects, 0 for a dense model.
        mp: model-parallel ranks of the native layout.
        dtype: to round the weights to; default: as they are. With `fp8` the matrices of attention and
            feed-forward go to FP8 in blocks, and all else to bfloat16.
        device: that the verification runs on.
        max_shard_size: bytes of tensors in a file of the result.
        verify: what is compared beside every weight: `full`, the logits of whole models; `sample`, those of
            some of the layers; `weights`, none. Default: `full` if memory allows it, else `sample`. For GGUF
            also `llama.cpp`: `full`, and what llama.cpp makes of the file.
        verify_memory: bytes that the comparison may take; default: what is free.
        progress: told of bytes written and of all bytes.
        tokenizer: whether a GGUF file has the tokenizer in it.

    Raises:
        ValueError: for a source that is not understood, a target that cannot express the model or is in the
            way or has no room, or a result that is not the same model.
        OSError: if a file cannot be written.
    """
    began = time.monotonic()
    target = resolve_target(target)
    if to is None:
        to = next((name for name, each in TARGETS.items() if each.suffix == target.suffix != ""), None)
    _check_arguments(to, mp, dtype, device, max_shard_size, verify)
    if not tokenizer and (to is None or TARGETS[to].suffix is None):
        raise ValueError("--no-tokenizer is for --to gguf, whose file has the tokenizer in it")
    checkpoint = open_checkpoint(source)
    if to is None:
        to = "native" if mp is not None else "tessera"
        if to == checkpoint.kind == "tessera" and dtype is None:
            raise ValueError(
                f"{source} is a Tessera model already; say with --to what it shall become, or with --dtype "
                "what it shall be rounded to"
            )
    if n_experts is not None and n_experts != checkpoint.config.n_routed_experts:
        raise ValueError(
            f"n_experts is {n_experts}, but the model in {source} has {checkpoint.config.n_routed_experts}"
        )
    require_fitting_tokenizer(checkpoint)

    own_types = TARGETS[to].dtypes is not None
    rounding = None if own_types else _DTYPES.get(dtype)
    config, tensors = _prepare(checkpoint, TARGETS[to], rounding, dtype == _FP8)
    quantization = _plan_fp8(checkpoint, TARGETS[to], config) if dtype == _FP8 else None
    options = Options(
        mp=1 if mp is None else mp,
        largest_file=max_shard_size,
        encode=None if quantization is None else quantization.encode,
        dtype=dtype if own_types else None,
        tokenizer=tokenizer,
        verify=verify,
        source=checkpoint,
    )
    measure = TARGETS[to].size or (lambda config, tensors, options: size_of(tensors))
    size = measure(config, tensors, options)
    require_space(target, size + sum(file.stat().st_size for file in checkpoint.side_files))

    written_bytes = 0

    def tell(count: int) -> None:
        nonlocal written_bytes
        written_bytes += count
        if progress is not None:
            progress(written_bytes, size)

    identity = _identify(checkpoint, to, dtype, options)
    with claimed(target) as aside:
        journal = Journal(aside, identity, tell)
        options = replace(options, journal=journal)
        TARGETS[to].write(aside, config, tensors, options)
        check_against_report(checkpoint.folder)
        if TARGETS[to].suffix is None:
            checkpoint.copy_side_files(aside)
        checkpoint.notes += TARGETS[to].finish(aside)
        wrote = time.monotonic()
        written = Written(aside, checkpoint, config, tensors, options, device)
        if quantization is None:
            verdict = accept(written, TARGETS[to].verify, rounding, verify, verify_memory)
        else:
            verdict = _accept_fp8(written, quantization, verify, verify_memory)
            errors = json.dumps(quantization.report(), indent=2)
            (aside / FP8_REPORT).write_text(errors + "\n", encoding="utf-8")
        report = Report(
            source={"name": checkpoint.folder.resolve().name, "kind": checkpoint.kind},
            target={"name": target.name, "kind": to},
            parameters=sum(outline(tensors, name).numel() for name in tensors),
            dtype=options.dtype or (dtype if dtype == _FP8 else str(config.dtype).removeprefix("torch.")),
            files=hash_files(_weight_files(aside)),
            checks=verdict.checks,
            notes=checkpoint.notes + verdict.notes,
            seconds={"writing": round(wrote - began, 2), "verifying": round(time.monotonic() - wrote, 2)},
            versions=_versions(),
        )
        if TARGETS[to].suffix == target.suffix != "":
            keep_file(aside, target)
        else:
            report.write(aside)
            keep(aside, target)
    course = []
    if journal.discarded:
        course.append("what a different call had written for this target is discarded")
    if journal.bytes_found:
        course.append(f"{journal.bytes_found:,} bytes were there from a call that had not ended")
    return Conversion(
        checkpoint.kind, to, report.parameters, verdict.difference, report.notes, report, course
    )


def _check_arguments(
    to: str | None,
    mp: int | None,
    dtype: str | None,
    device: str,
    max_shard_size: int,
    verify: str | None,
) -> None:
    if to is not None and to not in TARGETS:
        raise ValueError(f"--to {to}: known targets are {', '.join(TARGETS)}")
    own = None if to is None else TARGETS[to]
    dtypes = (*_DTYPES, _FP8) if own is None or own.dtypes is None else own.dtypes
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: choose from {', '.join(dtypes)}")
    kinds = KINDS if own is None else KINDS + own.verifications
    if verify is not None and verify not in kinds:
        raise ValueError(f"--verify {verify}: choose from {', '.join(kinds)}")
    if max_shard_size < 1:
        raise ValueError(f"--max-shard-size must be at least a byte, got {max_shard_size}")
    if mp is not None and to not in (None, "native"):
        raise ValueError(f"model-parallel ranks are for the native layout, not for --to {to}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _prepare(
    checkpoint: Checkpoint, target: Target, rounding: torch.dtype | None, to_fp8: bool
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """The model that will be written: as the target can have it, in the dtype that was asked for."""
    config, tensors = copy.deepcopy(checkpoint.config), checkpoint.tensors
    if checkpoint.fp8 is not None and (rounding is not None or to_fp8):
        # Rounded once, from the product; or back to the numbers that it was made of.
        checkpoint.fp8.stored.dtype = torch.float32
    require_one_dtype(tensors, torch.bfloat16 if to_fp8 else rounding)
    tensors = sound(tensors)
    config.auto_map = {}
    if config.num_mtp_layers and not target.predicts_ahead:
        config, tensors = drop_predictions_ahead(config, tensors)
        checkpoint.notes.append(
            f"{target.name} has no place for multi-token prediction: its layers are left out"
        )
    config, tensors = target.prepare(config, tensors)
    if rounding is not None:
        config.dtype = rounding
        tensors = Changed(
            tensors, lambda name, tensor: tensor if name.endswith(_ALWAYS_FP32) else tensor.to(rounding)
        )
        tensors = sound(tensors, f"is not finite after rounding to {rounding}")
    elif config.dtype is None:
        config.dtype = outline(tensors, "model.embed_tokens.weight").dtype
    return config, tensors


def _plan_fp8(checkpoint: Checkpoint, target: Target, config: TesseraConfig) -> Quantization:
    if target.fp8 is None:
        can = ", ".join(name for name, other in TARGETS.items() if other.fp8 is not None)
        raise ValueError(f"--dtype fp8: {target.name} has no FP8 in blocks; targets that have it are {can}")
    if checkpoint.fp8 is None:
        config.dtype = torch.bfloat16
    return Quantization(target.fp8, target.rules(config), config, checkpoint.fp8)


def _accept_fp8(
    written: Written, quantization: Quantization, kind: str | None, memory: int | None
) -> Verdict:
    """The translation against the source's own class, and then the result against the rounded weights."""
    source, config = written.source, written.config
    rounded = quantization.round(written.tensors)
    if source.family is not None:
        translated = replace(source, config=config, tensors=written.tensors, family=None, fp8=None)
        compare_models(source, translated, written, kind, memory)
    source = replace(source, config=config, tensors=rounded, family=None, fp8=None)
    verdict = accept(replace(written, source=source, tensors=rounded), None, None, kind, memory)
    verdict.notes += quantization.describe()
    return verdict


def _identify(checkpoint: Checkpoint, to: str, dtype: str | None, options: Options) -> dict[str, Any]:
    """What makes two calls the same: what they read and what they write, and not what they compare."""
    place = checkpoint.folder.resolve()
    files = [place]
    if place.is_dir():
        read = {file for file in place.iterdir() if file.is_file() and file.suffix in _READ}
        files = sorted(
            read.union(place / file.relative_to(checkpoint.folder) for file in checkpoint.side_files)
        )
    return {
        "source": str(place),
        "files": [
            [str(file.relative_to(place.parent)), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
        ],
        "to": to,
        "dtype": dtype,
        "options": {
            key: value
            for key, value in vars(options).items()
            if key not in ("journal", "encode", "source", "verify")
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "tessera": tessera.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)


def main(arguments: list[str]) -> None:
    """Converts with the four arguments of DeepSeek's converter."""
    from tessera.cli import run

    if len(arguments) != 4 or not all(word.isdecimal() for word in arguments[2:]):
        usage = "usage: python -m tessera.conversion.convert <hf_ckpt_path> <save_path> <n_experts> <mp>"
        print(usage, file=sys.stderr)
        sys.exit(2)
    run(["convert", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

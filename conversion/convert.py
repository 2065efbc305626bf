"""From one checkpoint to another: read, translated, written aside, verified, and only then kept.

What belongs here: the order of these. Everything goes through Tessera's own names: a checkpoint of any kind
is read as a Tessera model (`sources.py`), and that is written as any kind (`targets.py`). Runs by itself with
the arguments of DeepSeek's converter:

    python -m tessera.conversion.convert <hf_ckpt_path> <save_path> <n_experts> <mp>
"""

import copy
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .checkpoints import Checkpoint
from .equivalents import drop_predictions_ahead
from .rules import Changed
from .sources import open_checkpoint
from .targets import TARGETS, Options, Target
from .verify import Difference, build_model, compare_logits, require_same_weights, round_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Read by the router in fp32 whatever the model's dtype.
_ALWAYS_FP32 = "e_score_correction_bias"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source, target: kinds of checkpoint.
        parameters: numbers in the tensors written, ranks counted once.
        difference: of the logits of source and result.
        notes: what was left out, in sentences.
    """

    source: str
    target: str
    parameters: int
    difference: Difference
    notes: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    n_experts: int | None = None,
    mp: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Conversion:
    """Converts a checkpoint. The target appears when it is complete and verified, or not at all.

    Args:
        source: directory of any kind that `open_checkpoint` knows, or a run's.
        target: directory that does not exist yet, or is empty.
        to: one of `TARGETS`; default `native` if `mp` is given, else `tessera` for what is not Tessera's yet.
        n_experts: routed experts that the caller expects, 0 for a dense model.
        mp: model-parallel ranks of the native layout.
        dtype: to round the weights to; default: as they are.
        device: that the verification runs on.

    Raises:
        ValueError: for a source that is not understood, a target that cannot express the model or is in the
            way, or a result that is not the same model.
    """
    target = Path(target).resolve()
    if target == Path.cwd():
        raise ValueError(f"{target} is the current directory, which cannot be replaced; name a new one")
    if to is not None and to not in TARGETS:
        raise ValueError(f"--to {to}: known targets are {', '.join(TARGETS)}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype}: choose from {', '.join(_DTYPES)}")
    if mp is not None and to not in (None, "native"):
        raise ValueError(f"model-parallel ranks are for the native layout, not for --to {to}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; choose another target")
    checkpoint = open_checkpoint(source)
    if to is None:
        to = "native" if mp is not None else "tessera"
        if to == checkpoint.kind == "tessera":
            raise ValueError(f"{source} is a Tessera model already; say with --to what it shall become")
    if n_experts is not None and n_experts != checkpoint.config.n_routed_experts:
        raise ValueError(
            f"n_experts is {n_experts}, but the model in {source} has {checkpoint.config.n_routed_experts}"
        )

    rounding = None if dtype is None else _DTYPES[dtype]
    config, tensors = _prepare(checkpoint, TARGETS[to], rounding)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        TARGETS[to].write(aside, config, tensors, Options(mp=1 if mp is None else mp))
        checkpoint.copy_side_files(aside)
        difference = _verify(checkpoint, aside, tensors, config, rounding, device)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    parameters = sum(tensors[name].numel() for name in tensors)
    return Conversion(checkpoint.kind, to, parameters, difference, checkpoint.notes)


def _prepare(
    checkpoint: Checkpoint, target: Target, rounding: torch.dtype | None
) -> tuple[TesseraConfig, Mapping[str, torch.Tensor]]:
    """The model that will be written: as the target can have it, in the dtype that was asked for."""
    config, tensors = copy.deepcopy(checkpoint.config), checkpoint.tensors
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
    elif config.dtype is None:
        config.dtype = tensors["model.embed_tokens.weight"].dtype
    return config, tensors


def _verify(
    source: Checkpoint,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: TesseraConfig,
    rounding: torch.dtype | None,
    device: str,
) -> Difference:
    result = open_checkpoint(folder)
    require_same_weights(tensors, result.tensors)

    def make_source():
        model = build_model(source)
        return model if rounding is None else round_weights(model, rounding)

    difference = compare_logits(make_source, lambda: build_model(result), config, device)
    if not difference.is_small:
        raise ValueError(
            f"the result is not the same model: logits differ by up to {difference.largest:.3g}, allowed are "
            f"{difference.allowed:.3g}; nothing is kept"
        )
    return difference


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

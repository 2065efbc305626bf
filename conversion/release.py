"""A release: the complete directory that others load, built from a model and tried without Tessera.

What belongs here: what a release consists of, what of a model's directory stays behind, and the proof that it
is the same model. How it gets to the Hub is in `push.py`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import tessera
from tessera import modeling
from tessera.modeling.loading import read_json

from .aside import claimed, keep
from .checkpoints import Checkpoint
from .convert import convert
from .families import FAMILIES
from .journal import Journal
from .model_card import NOTES, names_only, write_model_card
from .sources import open_checkpoint
from .targets import require_dtype
from .tensor_files import INDEX, SINGLE_FILE
from .verify import TOLERANCE, build_model

# What older versions of transformers wrote into configurations.
_PATHS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}
# Code that a family's model is loaded with elsewhere, and a release of it without.
_CODE = {"auto_map"}
# Conversions that no further attempt has asked for in so long, in seconds, are removed: a week.
_KEPT_FOR = 7 * 24 * 3600
# From this size on the Hub keeps a file apart from git's history, and tensors of any size: its own rule.
_LARGE_FILE = 10 << 20

# Loads a directory as somebody does who has transformers and no Tessera.
_LOAD = """
import sys
sys.modules["tessera"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, out, remote, has_tokenizer = sys.argv[1:]
ids, remote = load_file(ids)["ids"], remote == "True"
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=remote, dtype=torch.float32, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
if has_tokenizer == "True":
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    assert len(tokenizer) <= model.config.vocab_size, "the tokenizer has more tokens than the model"
with torch.no_grad():
    save_file({"logits": model.eval()(ids, use_cache=False).logits.float().contiguous()}, out)
model.generate(ids[:1, :1], max_new_tokens=2, do_sample=False, pad_token_id=0)
"""


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release.

    Attributes:
        name: in the repository.
        path: where its content is.
        size: bytes.
        what: what it is for, in a word or two.
    """

    name: str
    path: Path
    size: int
    what: str

    @property
    def is_large(self) -> bool:
        """Whether the Hub keeps it in its large-file storage."""
        return self.size >= _LARGE_FILE or self.name.endswith(".safetensors")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a release come from.

    Attributes:
        model: directory of the checkpoint that was named.
        run: directory of the run that it belongs to, with recipe, metrics and evaluation.
        step: of an unfinished run, whose checkpoint it is; None for a finished one or for none.
        converted: kind and dtype that it was converted from and to for the release, if it was.
        kept: what the conversion left behind for a further attempt, to remove after success.
        was_kept: whether an earlier attempt had left it.
        notes: what was left out of the weights, in sentences.
    """

    model: Path
    run: Path | None = None
    step: int | None = None
    converted: str | None = None
    kept: Path | None = None
    was_kept: bool = False
    notes: list[str] = field(default_factory=list)


def find_origin(
    model: str | Path, family: str | None = None, dtype: str | None = None
) -> tuple[Checkpoint, Origin]:
    """Opens the model that shall be released, converted first if another kind or dtype is asked for.

    A conversion is kept under `$HF_HOME/tessera/push` until `discard` is called, so that a further attempt
    after a lost connection does not begin with it; for a week, if there is none.

    Args:
        model: model directory, or a run's.
        family: to convert to: `tessera` or one of transformers'; default: as it is.
        dtype: to round to; default: as it is.

    Returns:
        The checkpoint whose files are released, and its `Origin`.

    Raises:
        ValueError: if the model cannot be opened, or not be expressed as the family.
    """
    if family is not None and family not in ("tessera", *FAMILIES):
        raise ValueError(f"--as {family}: transformers loads tessera, {', '.join(FAMILIES)}")
    checkpoint = open_checkpoint(model)
    run = find_run(model)
    step = None
    if run is not None and checkpoint.folder.parent.name == "checkpoints":
        step = _step_of(checkpoint.folder)
    if dtype is not None:
        require_dtype(dtype, family or checkpoint.kind)
    if family in (None, checkpoint.kind) and dtype is None:
        return checkpoint, Origin(checkpoint.folder, run, step, notes=list(checkpoint.notes))
    place = _place_of_conversion(checkpoint.folder, family, dtype)
    _remove_old(place)
    told = place.with_suffix(".json")
    was_kept = place.is_dir() and told.is_file()
    if was_kept:
        place.touch()
        told.touch()
    else:
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        done = convert(checkpoint.folder, place, to=family or checkpoint.kind, dtype=dtype)
        words = f"{done.source} to {done.target}" + (f" in {dtype}" if dtype else "")
        difference = f"{done.difference.largest:.2g}"
        about = {"what": f"{words}; the logits differ by at most {difference}", "notes": done.notes}
        told.write_text(json.dumps(about), encoding="utf-8")
    about = read_json(told)
    origin = Origin(checkpoint.folder, run, step, about["what"], place, was_kept, about["notes"])
    return open_checkpoint(place), origin


def discard(origin: Origin) -> None:
    """Removes what a conversion for the release left for a further attempt."""
    if origin.kept is not None:
        shutil.rmtree(origin.kept, ignore_errors=True)
        origin.kept.with_suffix(".json").unlink(missing_ok=True)


def build_release(
    checkpoint: Checkpoint,
    folder: Path,
    repo_id: str,
    *,
    origin: Origin | None = None,
    revision: str | None = None,
    license: str | None = None,
    on_hub: Callable[[str, str], bool] = lambda name, kind: False,
) -> list[str]:
    """Fills an empty directory with everything that others need. Weights are links to where they are.

    Args:
        checkpoint: of the model as it is released.
        folder: to fill.
        repo_id: where it will be, for the card.
        origin: of the weights; default: the checkpoint alone.
        revision: branch that it will be on, for the card; default: the main one.
        license: identifier for the card.
        on_hub: whether a name is a `model` or `dataset` there.

    Returns:
        What to say of it, in sentences.

    Raises:
        ValueError: if the checkpoint is of a kind that transformers does not load, or a file beside the
            weights cannot be read.
    """
    if checkpoint.kind not in ("tessera", getattr(checkpoint.family, "model_type", None)):
        raise ValueError(
            f"{checkpoint.folder} is in the layout '{checkpoint.kind}', which transformers does not load; "
            "convert it first, or name with --as what it shall become"
        )
    for file in _weight_files(checkpoint.folder):
        _link_or_copy(file, folder / file.name)
    for file in checkpoint.side_files:
        copy = folder / file.relative_to(checkpoint.folder)
        copy.parent.mkdir(exist_ok=True)
        _copy_side_file(file, copy)
    if checkpoint.family is None:
        config = checkpoint.config
        config.architectures = ["TesseraForCausalLM"]
        config.save_pretrained(folder)
    else:
        values = read_json(checkpoint.folder / "config.json")
        _write_json(folder / "config.json", _without(values, _PATHS | _CODE))
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)
    if not (folder / "tokenizer_config.json").is_file() and checkpoint.config.vocab_size == 256:
        from tessera.tokenization import build_byte_tokenizer

        build_byte_tokenizer().save_pretrained(folder)
    origin = origin or Origin(checkpoint.folder)
    return write_model_card(
        folder,
        repo_id,
        checkpoint.config,
        checkpoint.kind,
        model=origin.model,
        weights=checkpoint.folder,
        run=origin.run,
        step=origin.step,
        revision=None if revision == "main" else revision,
        license=license,
        converted=origin.converted,
        notes=origin.notes,
        on_hub=on_hub,
    )


def list_release(folder: Path) -> list[ReleaseFile]:
    """What a release consists of, the largest first."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files.append(ReleaseFile(name, path, path.stat().st_size, _purpose(path.name)))
    return sorted(files, key=lambda file: -file.size)


def left_out(model: Path, files: list[ReleaseFile]) -> list[str]:
    """What lies beside a model and is not sent: optimizer state, pickles, logs; folders with `/`."""
    # Of what is in a folder, the folder.
    names = {file.name.partition("/")[0] for file in files}
    # The code of the model comes from the package, or is not needed.
    code = {path.name for path in Path(modeling.__file__).parent.glob("*.py")}
    beside = sorted(model.iterdir()) if model.is_dir() else []
    return [
        f"{path.name}/" if path.is_dir() else path.name for path in beside if path.name not in names | code
    ]


def check_release(checkpoint: Checkpoint, folder: Path, scratch: Path) -> None:
    """Loads a release in a new process that cannot import Tessera nor go online, and compares the logits.

    Raises:
        ValueError: if it does not load, or is not the same model.
    """
    length = min(32, checkpoint.config.max_position_embeddings - 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.config.vocab_size, (2, max(length, 1)), generator=generator)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    arguments = [folder, scratch / "ids.safetensors", scratch / "logits.safetensors"]
    arguments += [checkpoint.family is None, (folder / "tokenizer_config.json").is_file()]
    environment = {
        **os.environ,
        # A home of its own: the code must come from the directory and from no cache.
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "home" / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, *map(str, arguments)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    if loaded.returncode < 0:
        raise ValueError(
            f"the process that loads the release was ended by signal {-loaded.returncode}; the model in "
            "float32 has to fit into this machine's memory"
        )
    if loaded.returncode:
        lines = [line for line in loaded.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(f"the release does not load without Tessera: {lines[-1]}")
    with torch.no_grad():
        expected = build_model(checkpoint)(ids, use_cache=False).logits.float()
    found = load_file(scratch / "logits.safetensors")["logits"]
    largest, allowed = (
        float((expected - found).abs().max()),
        TOLERANCE * max(1.0, float(expected.abs().max())),
    )
    if not largest <= allowed:
        raise ValueError(f"the release loads as another model: logits differ by up to {largest:.3g}")


def write_release(folder: Path, target: Path) -> None:
    """Puts a release into a directory of its own, where links become files; there whole or not at all."""
    target = target.absolute()
    with claimed(target) as aside:
        # The release's own place is another each time: what a call that was killed has left goes.
        Journal(aside, {"release": str(folder)})
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        keep(aside, target)


def find_run(model: str | Path) -> Path | None:
    """The run that a model belongs to."""
    path = Path(model).absolute()
    if path.is_file() and path.suffix == ".safetensors" and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if path.name == "final":
        path = path.parent
    elif path.parent.name == "checkpoints":
        path = path.parent.parent
    return path if (path / "recipe.yaml").is_file() else None


def _place_of_conversion(model: Path, family: str | None, dtype: str | None) -> Path:
    """Where the conversion of just these files is kept; files that change make it another."""
    files = [model] if model.is_file() else sorted(path for path in model.rglob("*") if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    made_by = tessera.__version__, transformers.__version__
    told = repr((str(model.resolve()), family, dtype, state, made_by))
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "tessera" / "push" / key


def _remove_old(place: Path) -> None:
    """Removes conversions beside this one that nobody has come back for."""
    now = time.time()
    for path in place.parent.iterdir() if place.parent.is_dir() else ():
        is_this = path.name.removeprefix(".").startswith(place.name)
        if not is_this and now - path.stat().st_mtime > _KEPT_FOR:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    if not step.isdecimal():
        raise ValueError(
            f"{checkpoint}: of a checkpoint the name says its step, as in step-000040; rename it, or put it "
            "outside of checkpoints/"
        )
    return int(step)


def _purpose(name: str) -> str:
    if name.endswith(".safetensors"):
        return "weights"
    if name.endswith(".py"):
        return "code of the model"
    known = {
        INDEX: "which weights are in which file",
        "config.json": "configuration",
        "generation_config.json": "settings for generating",
        "README.md": "model card",
        "loss.png": "curve of the training, on the card",
    }
    return known.get(name, "chat template" if name.startswith("chat_template") else "tokenizer")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE_FILE]
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [index, *(folder / name for name in sorted(set(places.values())))]


def _copy_side_file(source: Path, target: Path) -> None:
    """Copies a file that can be read, without paths of somebody's machine and names of code."""
    values = read_json(source) if source.suffix == ".json" else {}
    changed = values
    if source.name == "tokenizer_config.json":
        changed = _without(values, _PATHS | _CODE)
    elif source.name == NOTES:
        changed = names_only(values)
    elif source.name == "generation_config.json":
        # transformers goes on without one that is damaged.
        try:
            GenerationConfig.from_dict(values)
        except (AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{source} does not say how to generate: {reason}") from error
        changed = _without(values, _PATHS)
    if changed == values:
        shutil.copyfile(source, target)
    else:
        _write_json(target, changed)


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are large, and temporary files may be on another disk: a link where there are any."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copy(source, target)

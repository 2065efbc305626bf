"""Checkpoints of a run: written aside, hashed, renamed into place; the newest that verifies is the one
resumed from.

`checkpoints/step-000100/` holds the model (a Hugging Face directory), the optimizer's tensors and each
process's random state as safetensors, `state.json`, and `manifest.json` with the sha256 of every file. No
pickle is written or read.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from tessera.data.hashing import file_sha256

from .optimizer_state import gather_state, restore_state

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of a step and keeps it and those just before it. All processes call it.

    Later ones are removed too: a run is at an earlier step than its newest checkpoint only where that one was
    found to be broken.

    Args:
        folder: `checkpoints/` of the run.
        step: optimizer steps done.
        accelerator: of the run.
        model: wrapped or not.
        optimizer: the one inside accelerate's wrapper; state tensors are named after the parameters.
        state: what else a resumed run needs, as JSON.
        tokenizer: saved beside the model, so that the directory is complete.
        keep: checkpoints that stay.

    Returns:
        The directory of the checkpoint.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f".{final.name}.partial"
    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        for left in folder.glob(".step-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_file(_random_state(), aside / f"random-{accelerator.process_index}.safetensors")
    if accelerator.is_main_process:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        save_file(gather_state(model, optimizer), aside / "optimizer.safetensors")
        _write_json(aside / "state.json", {"step": step, **state})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_json(aside / MANIFEST, {file.name: file_sha256(file) for file in sorted(aside.iterdir())})
        if final.exists():
            final.rename(folder / f".{final.name}.old")
        aside.rename(final)
        done = [path for path in list_checkpoints(folder) if _step_of(path) <= step]
        for path in {*list_checkpoints(folder), *folder.glob(".step-*")} - {*done[-keep:]}:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what was left half-written is not among them."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)), key=_step_of)


def find_checkpoint(path: str | Path) -> Path:
    """The model directory that a path means: itself, or the end or newest good checkpoint of a run. The
    weights that `--save-path <name>.safetensors` wrote mean the run beside them.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors" and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    for candidate in (path, path / "final"):
        if any(candidate.glob("model*.safetensors")):
            return candidate
    if newest := newest_verified(path / "checkpoints")[0]:
        return newest
    raise ValueError(f"{path} holds no model.safetensors, neither itself nor in final/ or checkpoints/")


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files have the hashes of its manifest; a sentence for each newer one."""
    refused = []
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path, refused
        refused.append(f"{path}: {problem}")
    return None, refused


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file_sha256(file) != expected:
            return f"{name} is not what was written"
    return None


def load_checkpoint(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict:
    """Restores model, optimizer and random state in place.

    Returns:
        The state that `save_checkpoint` was given, and `step`.

    Raises:
        ValueError: if the checkpoint is of another model or optimizer.
    """
    from tessera.modeling.loading import load_model

    model = accelerator.unwrap_model(model)
    theirs = load_model(path, config=model.config, dtype=torch.float32)
    model.load_state_dict(theirs.state_dict())
    restore_state(model, optimizer, load_file(path / "optimizer.safetensors"), path)
    random = path / f"random-{accelerator.process_index}.safetensors"
    if random.is_file():
        restore_random(load_file(random))
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: dict[str, torch.Tensor]) -> None:
    """Sets torch's random state, of the CPU and of the GPU where both were saved."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

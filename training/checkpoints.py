"""Checkpoints of a run: written aside, hashed, renamed into place; the newest that verifies is the one
resumed from.

`checkpoints/step-000100/` holds the model (a Hugging Face directory), the optimizer's tensors and each
process's random state as safetensors, `state.json`, and `manifest.json` with the sha256 of every file. No
pickle is written or read.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of a step and removes those before the last `keep`. All processes call it.

    Args:
        folder: `checkpoints/` of the run.
        step: optimizer steps done.
        accelerator: of the run.
        model: wrapped or not.
        optimizer: the one inside accelerate's wrapper; state tensors are named after the parameters.
        state: what else a resumed run needs, as JSON.
        keep: checkpoints that stay.

    Returns:
        The directory of the checkpoint.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f".{final.name}.partial"
    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_file(_random_state(), aside / f"random-{accelerator.process_index}.safetensors")
    if accelerator.is_main_process:
        model.save_pretrained(aside)
        save_file(_named_state(model, optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        hashes = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what was left half-written is not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name))


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files have the hashes of its manifest, and a sentence for each newer
    one."""
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
        hashes = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
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
    _restore_state(model, optimizer, load_file(path / "optimizer.safetensors"), path)
    random = path / f"random-{accelerator.process_index}.safetensors"
    if random.is_file():
        _restore_random(load_file(random))
    return json.loads((path / "state.json").read_text())


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}:{key}": value.detach().contiguous().cpu()
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    params = dict(model.named_parameters())
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for full, value in saved.items():
        name, key = full.rsplit(":", 1)
        p = params.get(name)
        if p is None or p not in grouped or (value.ndim and value.shape != p.shape):
            raise ValueError(f"{path} holds the optimizer of another model: it has no place for {full}")
        optimizer.state.setdefault(p, {})[key] = value.to(p.device)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Checkpoints of a run: written aside, hashed, fsynced, renamed into place; the newest that verifies is the
one resumed from.

`checkpoints/step-000100/` holds the model (a Hugging Face directory), the optimizer's tensors, what routers
counted and each process's random state as safetensors, `state.json`, and `manifest.json` with size and sha256
of every file. No pickle is written or read. What belongs here: one checkpoint on a disk, and which ones there
are. Who writes it and when is `writer.py`.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from tessera.data.hashing import file_sha256
from tessera.data.journal import sync_folder
from tessera.modeling.configuration_tessera import TesseraConfig

from ..optimizers.state import restore_state
from ..parallel import load_whole_state_dict
from .durable import free_bytes, write_file
from .random_state import restore_random_state
from .snapshots import OPTIMIZER_FILE, ROUTERS_FILE, STATE_FILE, Snapshot, restore_tallies

MANIFEST = "manifest.json"
ROOM_TO_SPARE = 2**20  # bytes, for what a file system adds
# What a configuration says of a model's surroundings, and of what may be changed on the way.
NOT_ARCHITECTURE = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "converted_from",
    "distributed_config",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "initializer",
    "initializer_range",
    "latent_attention_mode",
    "mtp_layer_types",  # layers ahead are not in the configuration that is saved where nobody holds them
    "mtp_loss_coef",
    "mtp_mlp_layer_types",
    "num_mtp_layers",
    "output_router_logits",
    "pad_token_id",
    "resid_pdrop",
    "router_aux_loss_coef",
    "router_bias_update_speed",
    "train_mtp",
    "transformers_version",
    "use_cache",
}


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
    """Writes the checkpoint of a step, now, and keeps it and those just before it. All processes call it.

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

    Raises:
        OSError: if it cannot be written, in all processes. What was there before is still there.
    """
    from .policy import CheckpointPolicy
    from .writer import CheckpointWriter

    policy = CheckpointPolicy(keep_last=keep)
    writer = CheckpointWriter(folder, accelerator, policy, background=False)
    writer.save(step, model, optimizer, state, tokenizer)
    writer.finish()
    return place_of(folder, step)


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:06d}"


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Puts a snapshot on the disk, whole or not at all.

    Args:
        folder: `checkpoints/` of the run; made if it is not there.
        snapshot: of a step. Another checkpoint of that step is replaced.

    Raises:
        OSError: if it cannot be written. What was there before is still there, and nothing else.
    """
    final = place_of(folder, snapshot.step)
    aside, old = folder / f".{final.name}.partial", folder / f".{final.name}.old"
    clear_leftovers(folder)
    needed, free = snapshot.size + ROOM_TO_SPARE, free_bytes(folder)
    if free < needed:
        message = f"no space left: it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, message)
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_folder(path.parent)
        aside.mkdir()
        manifest = json.dumps(snapshot.write(aside), indent=2) + "\n"
        write_file(aside / MANIFEST, [manifest.encode("utf-8")])
        sync_folder(aside)
        if final.exists():
            os.rename(final, old)
        os.rename(aside, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return final


def clear_leftovers(folder: Path) -> None:
    """Removes what runs that were killed have left half-written or half-removed."""
    for left in folder.glob(".step-*"):
        step = left.name[1:].removesuffix(".old")
        if left.name.endswith(".old") and not (folder / step).exists():
            os.rename(left, folder / step)  # killed between the two renames of a replacement
        else:
            shutil.rmtree(left, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; whoever looks sees it whole or not at all."""
    going = path.with_name(f".{path.name}.partial")
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what was left half-written is not among them."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)), key=step_of)


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


def choose_checkpoint(path: Path, accelerator: Accelerator, run: bool) -> tuple[Path | None, list[str]]:
    """What to go on from; all processes call it. The first one hashes, and the others take its word: large
    checkpoints are read once for that.

    Args:
        path: a checkpoint, or the folder of a run's checkpoints.
        accelerator: of the run.
        run: which of the two it is.

    Returns:
        The checkpoint, or None if none verifies, and a sentence for each that was passed over.
    """
    chosen: list = [None, []]
    if accelerator.is_main_process:
        if run:
            chosen = list(newest_verified(path))
        else:
            problem = verify(path)
            chosen = [path, []] if problem is None else [None, [problem]]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0], chosen[1]


def can_go_on(run: Path) -> bool:
    """Whether a run has something to go on from, or has had: then damage is to be told, not written over."""
    return bool(list_checkpoints(run / "checkpoints"))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        # Before sizes were written down, there was nothing but the hash.
        files = {name: {"sha256": of} if isinstance(of, str) else of for name, of in files.items()}
        known = {name: (of["sha256"], of.get("bytes")) for name, of in files.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"no readable {MANIFEST}"
    if STATE_FILE not in known:
        return f"{MANIFEST} does not list {STATE_FILE}"
    for name, (sha256, size) in known.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if (size is not None and file.stat().st_size != size) or file_sha256(file) != sha256:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def differences(theirs: dict, ours: dict, keys: Iterable[str]) -> list[str]:
    """The keys whose values differ, in alphabetical order and with both values where these are short."""
    unknown, other = object(), []
    for key in sorted(keys):
        there, here = theirs.get(key, unknown), ours.get(key, unknown)
        if there != here:
            short = len(f"{there}{here}") < 60 and unknown not in (there, here)
            other.append(f"{key} ({there} there, {here} here)" if short else key)
    return other


def require_same_model(path: Path, config: TesseraConfig) -> None:
    """Refuses the checkpoint of another architecture.

    Raises:
        ValueError: naming what differs.
    """
    from tessera.modeling.loading import read_config

    theirs, ours = read_config(path / "config.json").to_dict(), config.to_dict()
    if other := differences(theirs, ours, (theirs.keys() | ours.keys()) - NOT_ARCHITECTURE):
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        raise ValueError(
            f"{path} is of another architecture: it differs in {', '.join(other[:4])}{more}; resume with the "
            "configuration that the run was started with, or start another run with --save-path"
        )


def read_state(path: Path, config: TesseraConfig) -> dict:
    """The state that a checkpoint was given, and `step`, if it is of a model of this configuration.

    Raises:
        ValueError: naming what differs.
    """
    require_same_model(path, config)
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict:
    """Restores model, optimizer and random state in place; all processes call it.

    Returns:
        The state that `save_checkpoint` was given, and `step`.

    Raises:
        ValueError: if the checkpoint is of another model or optimizer.
    """
    from tessera.modeling.loading import load_model

    model = accelerator.unwrap_model(model)
    state = read_state(path, model.config)
    theirs = load_model(path, config=model.config, dtype=torch.float32).state_dict()
    load_whole_state_dict(model, theirs)
    try:
        restore_state(model, optimizer, load_file(path / OPTIMIZER_FILE), path)
        if (path / ROUTERS_FILE).is_file():
            restore_tallies(model, load_file(path / ROUTERS_FILE), accelerator.process_index)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    restore_random_state(path, accelerator.process_index)
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state

"""What a run finds in the directories it is told of: whether it may write there, and what it goes on from.

What belongs here: looking, the sentences for what cannot be, and the first files of a run. What checkpoints
hold and how they are verified is `checkpoints/store.py`.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml
from accelerate import Accelerator

from tessera.configs.recipes import RECIPE_FILE
from tessera.data.journal import write_durably
from tessera.modeling.configuration_tessera import TesseraConfig

from .checkpoints.store import choose_checkpoint, differences, find_checkpoint
from .parallel import agree
from .pretrain_arguments import PretrainArguments, run_of


def check_folder(folder: Path, weights_file: Path | None, may_hold_files: bool) -> None:
    """Refuses a place to write to that has something of another run.

    Args:
        folder: of the run.
        weights_file: where the weights are copied to at its end, if anywhere.
        may_hold_files: the run that is there goes on, or is to go.

    Raises:
        ValueError: if the place is taken.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save-path {folder} is a file")
    if may_hold_files:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files; resume that run, or choose another --save-path")
    if weights_file and weights_file.exists():
        raise ValueError(f"{weights_file} is there already; choose another --save-path")


@contextmanager
def claimed(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of a run's directory, which is made if need be; all processes call it.

    Two jobs that are started for one run would go on from each other's checkpoints. The directory itself is
    locked, which a kill undoes; file systems that cannot do that, such as NFS, are not watched.

    Raises:
        ValueError: if another run is in it.
        OSError: if it cannot be made.
    """
    lock = problem = None
    made = not folder.exists()
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        except ValueError as error:
            problem = error
        except OSError as error:
            problem = cannot_write(folder, error)
    try:
        if agree(accelerator, problem is not None):
            raise problem or ValueError(f"the first process has no place for the run in {folder}")
        yield
    finally:
        if made and accelerator.is_main_process and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the lock; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(
            f"another process is training in {folder}; wait for it, end it, or choose another --save-path"
        ) from error
    except OSError:  # not on this file system
        os.close(lock)
        return None
    return lock


def cannot_write(folder: Path, error: OSError) -> OSError:
    """The error that names the run directory."""
    return OSError(f"--save-path {folder} cannot be written to: {error.strerror or error}")


def begin_folder(folder: Path, replace: bool, config: TesseraConfig, args: PretrainArguments) -> None:
    """Gives a run's directory its recipe and configuration; one process calls it.

    Args:
        folder: of the run; it is there.
        replace: whether what is there goes.
        config: of the model; `final` and the checkpoints have it with its code.
        args: of the run.

    Raises:
        OSError: if there is no room for them, or no right to write there.
    """
    try:
        for path in folder.iterdir() if replace else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        config.to_json_file(folder / "config.json")
        write_durably(folder / RECIPE_FILE, yaml.safe_dump(asdict(args), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise cannot_write(folder, error) from error


def goes_on_in_place(resume: bool | str, folder: Path) -> bool:
    """Whether the run that is resumed is that of the folder."""
    if isinstance(resume, str):
        return run_of(resume).resolve() == folder.resolve()
    return resume


def is_only_begun(folder: Path) -> bool:
    """Whether a run directory holds nothing that anybody would miss: no model, and no checkpoint."""
    if not folder.is_dir() or (folder / "final").exists():
        return False
    there = {path.name for path in folder.iterdir()}
    return RECIPE_FILE in there or there <= {"config.json", f".{RECIPE_FILE}.partial"}


def weights_to_start_from(given: str | None, say: Callable[[str], None]) -> Path | None:
    """The model that `ckpt_path` of a run names; None for random weights.

    Raises:
        ValueError: if there is something that is no model.
    """
    path = given and Path(given)
    if path and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        return find_checkpoint(path)
    if path:
        say(f"no checkpoint in {path} yet: starting from random weights")
    return None


def checkpoint_to_resume(
    resume: bool | str, folder: Path, accelerator: Accelerator, say: Callable[[str], None]
) -> Path:
    """The checkpoint that a run goes on from: the one it names, or the newest of its run that verifies. All
    processes call it.

    Raises:
        ValueError: if there is none, or the one that is named is damaged.
    """
    path = Path(resume) if isinstance(resume, str) else folder
    if path != run_of(path):
        chosen, problems = choose_checkpoint(path, accelerator, run=False)
        if chosen is None:
            raise ValueError(f"{path} cannot be resumed from: {'; '.join(problems)}")
        return chosen
    newest, refused = choose_checkpoint(path / "checkpoints", accelerator, run=True)
    for sentence in refused:
        say(f"passing over {sentence}")
    if newest is None:
        raise ValueError(f"{path} has no checkpoint to resume from")
    return newest


def check_rows(checkpoint: Path, theirs: dict, ours: dict) -> None:
    """Refuses to go on with other rows, or another optimizer, than a checkpoint was trained with.

    Raises:
        ValueError: with the names of what differs.
    """
    if theirs == ours:
        return
    other = differences(theirs, ours, ours.keys() | theirs.keys())
    raise ValueError(
        f"{checkpoint} was trained on other data, or with another batch, window, order, seed or optimizer: "
        f"it differs in {', '.join(other)}; resume with what the run was started with, or start another run "
        "with --save-path"
    )

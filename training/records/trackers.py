"""Trackers that a run reports to beside its own files: TensorBoard, wandb, trackio, driven by Accelerate.

Notable:
- a tracker works in a thread of its own, so one that is slow or cannot be reached costs the run nothing;
- one that raises is left alone from then on, with a sentence, and the run goes on;
- wandb without a network keeps the run on disk, for `wandb sync`.

What belongs here: which trackers there are and what becomes of one that fails. What is recorded is decided in
the loop.
"""

import importlib.util
import inspect
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "tessera"
SECONDS_TO_START = 10.0  # that a run waits at most; a tracker that takes longer starts while it trains
SECONDS_TO_FINISH = 30.0
# wandb tries for a minute and a half by itself before it says that there is no network.
SECONDS_TO_REACH_WANDB = 20.0

_END = object()


def check_trackers(names: list[str] | None) -> list[str]:
    """The trackers by these names, once each.

    Raises:
        ValueError: if there is no such tracker, or its package is not installed.
    """
    for name in names or []:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker '{name}'; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"tracker '{name}' needs a package that is not installed: pip install {name} "
                "(the extra 'track' has all of them)"
            )
    return list(dict.fromkeys(names or []))


class Trackers:
    """Trackers of one run; on the process that writes, and nowhere else.

    Args:
        names: as `check_trackers` returned them.
        folder: run directory; what a tracker keeps on disk goes into it, save trackio's own database.
        config: what the run was told, flat.
        identity: of the run, the same after it was resumed.
        step: that the run goes on from; what TensorBoard has of later ones is passed over.
        say: prints a sentence.
    """

    def __init__(
        self,
        names: list[str],
        folder: Path,
        config: dict[str, Any],
        identity: str,
        step: int = 0,
        say: Callable[[str], None] = print,
    ):
        told = {key: value for key, value in config.items() if value is not None}
        self.workers = [
            _Worker(name, lambda name=name: _start(name, folder, told, identity, step, say), say)
            for name in names
        ]
        for worker in self.workers:
            worker.started.wait(SECONDS_TO_START)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Gives values to all trackers, numbers or texts; returns at once."""
        for worker in self.workers:
            worker.put((values, step))

    def finish(self) -> None:
        """Waits until all is written or sent, but not for ever."""
        for worker in self.workers:
            worker.finish()
        self.workers = []


class _Worker:
    """One tracker and the thread that talks to it."""

    def __init__(self, name: str, start: Callable[[], GeneralTracker], say: Callable[[str], None]):
        self.name, self.say = name, say
        self.queue: queue.Queue = queue.Queue(maxsize=10_000)
        self.started, self.failed = threading.Event(), threading.Event()
        # A daemon: one that hangs does not keep the process alive.
        self.thread = threading.Thread(target=self._work, args=(start,), name=f"track-{name}", daemon=True)
        self.thread.start()

    def put(self, item: Any) -> None:
        if self.failed.is_set():
            return
        try:
            self.queue.put_nowait(item)
        except queue.Full:
            self._fail("it takes nothing any more")

    def finish(self) -> None:
        self.put(_END)
        if self.failed.is_set():
            return
        self.thread.join(SECONDS_TO_FINISH)
        if self.thread.is_alive():
            self._fail(f"it did not finish in {SECONDS_TO_FINISH:g} s and is left behind")

    def _work(self, start: Callable[[], GeneralTracker]) -> None:
        try:
            tracker = start()
            self.started.set()
            while (item := self.queue.get()) is not _END and not self.failed.is_set():
                values, step = item
                tracker.log(values, step=step)
            tracker.finish()
        except BaseException as error:  # whatever somebody else's package does is no reason to stop training
            self._fail(_first_line(error))
        finally:
            self.started.set()

    def _fail(self, reason: str) -> None:
        if not self.failed.is_set():
            self.failed.set()
            self.say(f"tracker {self.name} is off, training goes on: {reason}; metrics.jsonl has everything")


def _start(
    name: str, folder: Path, config: dict, identity: str, step: int, say: Callable[[str], None]
) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind("tensorboard", logging_dir=folder, purge_step=step + 1 if step else None)
        tracker.start()
        if not step:
            # Its own table of hyperparameters would be a run of its own beside this one.
            rows = "".join(f"    {key}: {value}\n" for key, value in config.items())
            tracker.log({"recipe": rows}, step=0)
        return tracker
    label = f"{folder.absolute().name}-{identity[:6]}"
    if name == "trackio":
        tracker = kind(PROJECT, name=label, config=config, resume="allow")
        tracker.start()
        return tracker
    return _start_wandb(kind, folder, config, label, identity, say)


def _start_wandb(
    kind: type[GeneralTracker],
    folder: Path,
    config: dict,
    label: str,
    identity: str,
    say: Callable[[str], None],
) -> GeneralTracker:
    import wandb

    # What is printed is not for it to record.
    settings = wandb.Settings(
        init_timeout=SECONDS_TO_REACH_WANDB, login_timeout=5, silent=True, console="off"
    )
    given = {
        "name": label,
        "id": identity,
        "resume": "allow",
        "config": config,
        "dir": folder,
        "settings": settings,
    }
    try:
        if os.environ.get("WANDB_MODE", "online") == "online" and not _has_account(wandb):
            raise ValueError("there is no account here, `wandb login` takes one")
        tracker = kind(PROJECT, **given)
        tracker.start()
    except Exception as error:
        tracker = kind(PROJECT, **given, mode="offline")
        tracker.start()
        say(
            f"wandb cannot be reached ({_first_line(error)}): the run is kept in {folder / 'wandb'}; send it "
            "later with `wandb sync`"
        )
        return tracker
    if address := getattr(tracker.tracker, "url", None):
        say(f"wandb: {address}")
    return tracker


def _has_account(wandb) -> bool:
    """Whether it has a key to log in with; on a terminal it would ask for one amid the progress."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return wandb.api.api_key is not None  # before 0.27 or so


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")

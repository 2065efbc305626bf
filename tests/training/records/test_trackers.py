"""Trackers: what they are given arrives, and one that fails is no reason to stop."""

import json
import os
import time
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate import PartialState
from helpers.runs import tiny_arguments, tiny_run

from tessera.training.records import trackers as room
from tessera.training.records.trackers import Trackers, check_trackers


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of a directory of TensorBoard by tag and step, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_what_metrics_has_also_after_a_resume(tmp_path):
    given = {"trackers": ["tensorboard"], "log_steps": 1, "checkpoint_steps": 4, "evaluations": 1}
    tiny_run(tmp_path, **given)
    tiny_run(tmp_path, resume=True, **{**given, "steps": 9})
    scalars = read_events(tmp_path / "run" / "tensorboard")
    for key in ("loss", "val_loss", "grad_norm", "learning_rate/matrices", "tokens_per_second"):
        # Two records of one step (a resumed run scores the text first): the last one counts.
        expected = {record["step"]: record[key] for record in records(tmp_path / "run") if key in record}
        assert scalars[key] == pytest.approx(expected, rel=1e-6), key
    assert set(scalars["loss"]) == set(range(1, 10))


class Broken(accelerate.tracking.GeneralTracker):
    """Raises at its start, at a later value, at its end; or hangs."""

    name, requires_logging_directory, main_process_only = "broken", False, True
    when = "start"
    logged: list = []

    def __init__(self, *_, **__):
        super().__init__()

    @property
    def tracker(self):
        return self

    def _maybe(self, now: str) -> None:
        if now == type(self).when:
            raise ConnectionError("no route to host\nand a long story")

    def start(self):
        self._maybe("start")

    def log(self, values, step=None, **_):
        if step is not None and step >= 3:
            if type(self).when == "hang":
                time.sleep(3600)
            self._maybe("log")
        type(self).logged.append(step)

    def finish(self):
        self._maybe("finish")


@pytest.mark.parametrize(
    "when",
    [
        "log",
        "hang",
        pytest.param("start", marks=pytest.mark.slow),
        pytest.param("finish", marks=pytest.mark.slow),
    ],
)
def test_a_tracker_that_fails_costs_a_sentence(when, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Broken)
    monkeypatch.setattr(Broken, "when", when)
    monkeypatch.setattr(Broken, "logged", [])
    monkeypatch.setattr(room, "SECONDS_TO_FINISH", 0.2)
    result = tiny_run(tmp_path, trackers=["trackio"], log_steps=1)
    assert result.final.is_dir()
    assert max(record["step"] for record in records(result.folder)) == 6
    said = [line for line in capsys.readouterr().out.splitlines() if "tracker trackio is off" in line]
    reason = "did not finish" if when == "hang" else "no route to host;"
    assert len(said) == 1 and reason in said[0] and "long story" not in said[0]
    assert (3 in Broken.logged) == (when == "finish")


def test_a_tracker_that_takes_long_to_start_does_not_hold_up_the_run(tmp_path, monkeypatch):
    class Slow(Broken):
        when = "never"

        def start(self):
            time.sleep(0.5)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Slow)
    monkeypatch.setattr(room, "SECONDS_TO_START", 0.05)
    monkeypatch.setattr(Slow, "logged", [])
    PartialState()
    started = time.perf_counter()
    trackers = Trackers(["trackio"], tmp_path, {}, "abc", say=print)
    trackers.log({"loss": 1.0}, 1)
    assert time.perf_counter() - started < 0.4
    trackers.finish()
    assert Slow.logged == [1]


def test_unknown_trackers_and_missing_packages_are_refused_before_anything_is_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; choose from tensorboard, wandb, trackio"):
        tiny_run(tmp_path, trackers=["tensorbord"])
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'wandb' needs a package that is not installed: pip install wandb"):
        tiny_run(tmp_path, trackers=["wandb"])
    assert not (tmp_path / "run").exists()
    assert check_trackers(None) == []


def test_trackers_are_named_once():
    assert check_trackers(["tensorboard", "trackio", "tensorboard"]) == ["tensorboard", "trackio"]


def test_wandb_asks_nobody_for_an_account(tmp_path, monkeypatch, capsys):
    """On a terminal it does, and waits for an answer among the lines of the run."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(
        wandb, "login", lambda prompt=True, verify=True: pytest.fail("asks") if prompt else False
    )
    modes = []

    class Kept(Broken):
        when = "never"

        def __init__(self, *_, mode="online", **__):
            modes.append(mode)

    room._start_wandb(Kept, tmp_path, {}, "run", "abc", print)
    assert modes == ["offline"]
    assert "no account here, `wandb login` takes one): the run is kept in" in capsys.readouterr().out


@pytest.mark.slow
def test_wandb_without_an_account_or_network_is_kept_on_disk(tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no account of whoever runs this
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    result = tiny_run(tmp_path, trackers=["wandb"], log_steps=1)
    [kept] = (result.folder / "wandb").glob("offline-run-*/run-*.wandb")
    # What is written last is written behind the back of whoever waits for it.
    for _ in range(100):
        if kept.stat().st_size > 500:
            break
        time.sleep(0.1)
    written = kept.read_bytes()
    assert b"grad_norm/matrices" in written and b"val_bits_per_byte" in written
    assert "wandb cannot be reached" in capsys.readouterr().out


def test_trackio_has_what_metrics_has(tmp_path, monkeypatch):
    from trackio import sqlite_storage as sqlite

    monkeypatch.setattr(sqlite, "TRACKIO_DIR", tmp_path / "trackio", raising=True)
    result = tiny_run(tmp_path, trackers=["trackio"], log_steps=1)
    [name] = sqlite.SQLiteStorage.get_runs("tessera")
    assert name.startswith("run-")
    kept = {
        row["step"]: row["loss"] for row in sqlite.SQLiteStorage.get_logs("tessera", name) if "loss" in row
    }
    expected = {record["step"]: record["loss"] for record in records(result.folder) if "loss" in record}
    assert kept == pytest.approx(expected)


def test_the_arguments_take_trackers(tmp_path):
    assert tiny_arguments(tmp_path, trackers=["wandb"]).trackers == ["wandb"]

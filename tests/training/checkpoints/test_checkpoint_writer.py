"""Checkpoints beside training: a consistent cut, one at a time, and nothing lost when a disk says no."""

import errno
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import tiny_config, tiny_model
from helpers.runs import one_step
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tessera import TesseraForCausalLM
from tessera.training.checkpoints import list_checkpoints, load_checkpoint, newest_verified, verify
from tessera.training.checkpoints import store as checkpoints
from tessera.training.checkpoints import writer as checkpoint_writer
from tessera.training.checkpoints.durable import safetensors_parts
from tessera.training.checkpoints.policy import CheckpointPolicy
from tessera.training.checkpoints.random_state import restore_random_state
from tessera.training.checkpoints.snapshots import Snapshots
from tessera.training.checkpoints.writer import CheckpointWriter
from tessera.training.optimizers import build_optimizer
from tessera.training.signals import StopSignals

SMALL = {"num_hidden_layers": 2}
CALLS = ("write", "fsync", "rename")


@pytest.fixture(scope="module")
def trained():
    model = tiny_model("llama-tiny", **SMALL).train()
    optimizer = build_optimizer(model, "muon", weight_decay=0.01)
    one_step(model, optimizer, 0)
    return model, optimizer


def writer_of(folder: Path, said: list | None = None, background: bool = True, **policy) -> CheckpointWriter:
    said = [] if said is None else said
    return CheckpointWriter(folder, Accelerator(), CheckpointPolicy(**policy), background, said.append)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Faults:
    """Stands in for calls of `os` and does something at the n-th of them."""

    def __init__(self, patch, what=None, at: int | None = None):
        self.count, self.what, self.at = 0, what, at
        for name in CALLS:
            patch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, call):
        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                self.what()
            return call(*args, **kwargs)

        return counted


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- the files ----


def test_tensors_are_written_as_the_library_would_read_them(tmp_path):
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.int8,
    )
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "yes": torch.tensor([True, False])}
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T
    tensors["small"] = torch.ones(3).to(torch.float8_e4m3fn)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(b"".join(safetensors_parts(tensors, {"format": "pt"})))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs)
    expected = load_file(theirs)
    for name, tensor in load_file(ours).items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert load_file(ours).keys() == expected.keys()
    with pytest.raises(ValueError, match="w is of torch.complex128"):
        list(safetensors_parts({"w": torch.zeros(1, dtype=torch.complex128)}))


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "bytegpt-tiny", "nanochat-tiny"])
def test_the_model_is_saved_under_the_names_and_files_of_save_pretrained(preset, tmp_path):
    model = tiny_model(preset)
    optimizer = build_optimizer(model)
    snapshot = Snapshots(Accelerator()).take(0, model, optimizer, {})
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert snapshot.tensors["model.safetensors"].keys() == expected.keys()
    for name, tensor in snapshot.tensors["model.safetensors"].items():
        assert torch.equal(tensor, expected[name]), name
    for file in tmp_path.iterdir():
        if file.suffix != ".safetensors":
            assert snapshot.files[file.name] == file.read_bytes(), file.name


def test_a_model_of_several_files_loads_like_any_other(tmp_path, trained, monkeypatch):
    model, optimizer = trained
    monkeypatch.setattr("tessera.training.checkpoints.snapshots.LARGEST_FILE", 200_000)
    writer = writer_of(tmp_path)
    writer.save(1, model, optimizer, {})
    writer.finish()
    [path] = list_checkpoints(tmp_path)
    assert len(list(path.glob("model-*.safetensors"))) > 1 and verify(path) is None
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    other = TesseraForCausalLM(tiny_config("llama-tiny", **SMALL))
    load_checkpoint(path, Accelerator(), other, build_optimizer(other))
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


# ---- beside training ----


def test_a_snapshot_is_a_consistent_cut_and_equals_one_that_training_waited_for(tmp_path, monkeypatch):
    """The writer is held until training has gone on; a second snapshot waits for it and uses its memory."""
    model = tiny_model("bytegpt-tiny", **SMALL).train()
    optimizer = build_optimizer(model)
    one_step(model, optimizer, 0)
    waited = writer_of(tmp_path / "waited", background=False, keep_last=9)
    beside = writer_of(tmp_path / "beside", keep_last=9)
    go = threading.Event()
    write, writing = checkpoints.write_checkpoint, []

    def held(folder, snapshot):
        go.wait(10)
        assert not writing, "two at a time"
        writing.append(snapshot.step)
        time.sleep(0.05)
        path = write(folder, snapshot)
        writing.pop()
        return path

    waited.save(1, model, optimizer, {"a": 1})
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", held)
    beside.save(1, model, optimizer, {"a": 1})
    assert not (tmp_path / "beside").exists()
    one_step(model, optimizer, 1)
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", write)
    waited.save(2, model, optimizer, {"a": 2})
    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", held)
    first = {name: memory.data_ptr() for name, memory in beside.snapshots.memory.items()}
    threading.Timer(0.05, go.set).start()
    beside.save(2, model, optimizer, {"a": 2})
    assert (tmp_path / "beside" / "step-000001").is_dir(), "the first was waited for"
    assert {name: memory.data_ptr() for name, memory in beside.snapshots.memory.items()} == first
    one_step(model, optimizer, 2)
    beside.finish()
    assert contents(tmp_path / "beside") == contents(tmp_path / "waited")
    assert beside.lost >= beside.cost > 0 and beside.writing >= 0.05


def test_counts_of_a_router_that_no_step_has_closed_are_kept(tmp_path):
    model = tiny_model("bytegpt-tiny").train()
    optimizer = build_optimizer(model)
    one_step(model, optimizer, 0)
    ids = torch.arange(32).reshape(2, 16)
    model(ids, labels=ids).loss.backward()
    gates = {name: gate for name, gate in model.named_modules() if hasattr(gate, "tally")}
    assert gates and all(gate.tally.sum() > 0 for gate in gates.values())
    writer = writer_of(tmp_path)
    writer.save(1, model, optimizer, {})
    writer.finish()
    other = TesseraForCausalLM(tiny_config("bytegpt-tiny"))
    load_checkpoint(tmp_path / "step-000001", Accelerator(), other, build_optimizer(other))
    for name, gate in gates.items():
        theirs = other.get_submodule(name)
        assert torch.equal(theirs.tally, gate.tally) and torch.equal(theirs.last_tally, gate.last_tally)


def test_random_states_of_python_numpy_and_torch_come_back_and_further_processes_get_their_own(
    tmp_path, trained
):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second one for the next call
    writer = writer_of(tmp_path)
    writer.save(1, *trained, {})
    writer.finish()
    draws = []
    for process in (None, 0, 1, 1, 2):
        if process is not None:
            restore_random_state(tmp_path / "step-000001", process)
        draws.append(
            (random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item())
        )
    assert draws[0] == draws[1]
    assert draws[2] == draws[3], "derived, not drawn"
    assert len(set(draws)) == 3


# ---- disks that say no ----


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_call_costs_a_sentence_and_nothing_else(stride, tmp_path, trained, monkeypatch):
    """Writes, fsyncs and renames of a checkpoint fail in turn, and each time the next attempt stands."""
    model, optimizer = trained
    said = []
    writer = writer_of(tmp_path, said, keep_last=1)
    writer.save(1, model, optimizer, {})
    writer.finish()
    good = contents(tmp_path)
    with monkeypatch.context() as patch:
        calls = Faults(patch)
        writer.save(2, model, optimizer, {})
        writer.finish()
    assert not said and calls.count > 20
    assert good.keys() != contents(tmp_path).keys()
    number, failed = 2, 0
    # From both ends: the last ones remove what is no longer kept, and cost no checkpoint.
    for k in sorted({*range(1, calls.count, stride), *range(calls.count - 5, calls.count + 1)}):
        last, before, number = writer.step, contents(tmp_path), number + 1
        with monkeypatch.context() as patch:
            Faults(patch, no_space, k)
            writer.save(number, model, optimizer, {})
            writer.wait()
        path, refused = newest_verified(tmp_path)
        assert path is not None and not refused
        assert not list(tmp_path.glob(".*")), "the partial one is gone"
        if said == ["an old checkpoint was not removed: no space left on device"]:
            assert verify(tmp_path / f"step-{number:06d}") is None
        else:
            failed += 1
            reason = "no space left on device"
            kept = f"that of step {last} is there"
            assert said == [f"the checkpoint of step {number} was not written ({reason}); {kept}"]
            assert before.items() <= contents(tmp_path).items()
            with pytest.raises(OSError, match=f"step {number} was not written"):
                writer.finish()
            writer.save(number, model, optimizer, {})  # the same step again
        said.clear()
        writer.finish()
        assert verify(tmp_path / f"step-{number:06d}") is None and not said
    assert failed > 20 // stride


def test_what_does_not_fit_is_not_begun(tmp_path, trained, monkeypatch):
    said = []
    writer = writer_of(tmp_path, said)
    writer.save(1, *trained, {})
    writer.finish()
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: 500_000)
    with monkeypatch.context() as patch:
        calls = Faults(patch)
        writer.save(2, *trained, {})
        writer.wait()
        assert calls.count == 0
    assert "no space left" in said[0] and "MB are free" in said[0] and "step 1 is there" in said[0]


def test_a_folder_that_vanished_is_made_again_and_one_that_cannot_be_written_costs_a_sentence(
    tmp_path, trained
):
    said = []
    run = tmp_path / "run"
    writer = writer_of(run / "checkpoints", said)
    run.mkdir()
    (run / "checkpoints").write_text("a file where the folder was")
    writer.save(1, *trained, {})
    writer.wait()
    assert len(said) == 1 and "step 1 was not written" in said[0] and "none before it" in said[0]
    (run / "checkpoints").unlink()
    run.rmdir()
    writer.save(2, *trained, {})
    writer.finish()
    assert verify(run / "checkpoints" / "step-000002") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_at_any_call_leaves_a_checkpoint_that_verifies(stride, tmp_path, trained):
    """At write, fsync and rename, and at those that remove what is no longer kept."""
    model, optimizer = trained
    writer = writer_of(tmp_path, background=False, keep_last=1)
    writer.save(1, model, optimizer, {})
    for k in itertools.count(1, stride):
        child = os.fork()
        if child == 0:
            Faults(pytest.MonkeyPatch(), lambda: os._exit(9), k)
            writer.save(1 + k, model, optimizer, {})
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path, refused = newest_verified(tmp_path)
        assert path is not None and not refused, k
        if code == 0:
            break
    assert k > 20, "every call had its turn"
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{1 + k:06d}"]


# ---- which ones, and when ----


def test_the_last_the_best_and_every_kth_are_kept(tmp_path, trained):
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0, 10: 1.5, 12: 1.4}
    writer = writer_of(tmp_path, keep_last=2, keep_best=True, keep_every=6)
    for number, score in scores.items():
        writer.save(number, *trained, {})
        if writer.is_better(score):
            writer.note_best(score)
    writer.save(14, *trained, {})
    writer.finish()
    kept = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
    assert kept == [4, 6, 12, 14]
    resumed = writer_of(tmp_path, keep_best=True)
    resumed.resumed(14)
    assert not resumed.is_better(1.0) and resumed.is_better(0.9)
    earlier = writer_of(tmp_path, keep_best=True)
    earlier.resumed(2)
    assert earlier.is_better(5.0), "the best lies ahead of it"


def test_a_step_that_is_saved_is_not_saved_again(tmp_path, trained):
    writer = writer_of(tmp_path)
    assert writer.save(1, *trained, {})
    assert not writer.save(1, *trained, {})
    assert writer.save(2, *trained, {})
    writer.finish()


@pytest.mark.parametrize(
    ("given", "step", "seconds", "due"),
    [
        ({}, 5, 1e9, False),
        ({"minutes": 1}, 5, 59.0, False),
        ({"minutes": 1}, 5, 60.0, True),
        ({"steps": 5}, 10, 0.0, True),
        ({"steps": 5}, 11, 1e9, False),
        ({"keep_every": 4}, 8, 0.0, True),
    ],
)
def test_when_a_checkpoint_is_due(given, step, seconds, due):
    assert CheckpointPolicy(**given).is_due(step, seconds) is due


def test_evaluations_are_saved_before_unless_that_costs_too_much_or_nobody_wants_checkpoints():
    policy = CheckpointPolicy(minutes=10)
    assert policy.is_due_before_evaluation(1.0, 0.0), "the price is not known yet"
    assert policy.is_due_before_evaluation(50.0, 1.0)
    assert not policy.is_due_before_evaluation(49.0, 1.0)
    assert not CheckpointPolicy().is_due_before_evaluation(1e9, 0.0)


@pytest.mark.parametrize("given", [{"keep_last": 0}, {"keep_every": 0}])
def test_a_policy_that_keeps_nothing_is_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be at least 1, got 0"):
        CheckpointPolicy(**given)


# ---- signals ----


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(name, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.number == 0
        os.kill(os.getpid(), number)
        assert signals.number == number
        os.kill(os.getpid(), number)  # what a launcher sends on
    assert signal.getsignal(number) is before
    assert f"{name}: finishing the step and saving it" in capfd.readouterr().err
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            signals.when -= 2
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (130 if name == "SIGINT" else -number)


def test_outside_the_main_thread_no_signal_is_taken():
    seen = []

    def enter():
        with StopSignals() as signals:
            seen.append(signals.number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [0]

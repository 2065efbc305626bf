"""When passes are recorded as CUDA graphs, and what a run does with recordings, on a CPU that plays a GPU.

That a GPU computes the same is in tests/gpu/test_cuda_graphs.py.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import tiny_arguments, write_config
from safetensors.torch import load_file

from tessera.training import engine as engines
from tessera.training.cuda_graphs import GraphChoice, GraphedPasses, choose_graphs
from tessera.training.pretrain import Run, pretrain
from tessera.training.signals import Stopped
from tessera.training.step import NORM, StepRunner, take_step

CUDA = torch.device("cuda")


def test_a_gpu_measures_before_it_records():
    choice = choose_graphs("auto", CUDA, {"several processes": False})
    assert choice.on and choice.measured
    assert not choose_graphs("on", CUDA, {}).measured


def test_the_first_obstacle_is_named():
    obstacles = {"experts": False, "several processes": True}
    assert str(choose_graphs("auto", CUDA, obstacles)) == "no CUDA graphs (not with several processes)"
    with pytest.raises(ValueError, match="cuda_graphs=on: not with several processes; take"):
        choose_graphs("on", CUDA, obstacles)
    with pytest.raises(ValueError, match="CPU has none"):
        choose_graphs("on", torch.device("cpu"), {})
    assert not choose_graphs("off", CUDA, {}).on


def test_a_shape_that_was_not_recorded_is_run():
    weight = torch.nn.Parameter(torch.tensor([2.0]))

    def run(batch, counted):
        loss = (weight * batch["x"]).sum() / counted
        loss.backward()
        return loss.detach()

    passes = GraphedPasses(run, [weight])
    passes.begin()
    loss = sum(passes({"x": torch.tensor([x])}, torch.tensor(2)) for x in (3.0, 5.0))
    assert loss == 8 and weight.grad == 4


def record_on_a_cpu(monkeypatch, measured: bool = False) -> list[tuple]:
    """A replay runs the recorded pass on the tensors that it was recorded with, and on no others.

    Returns:
        Filled with the address of a gradient at each replay, and the shape of the batch.
    """
    last, replays, plain = [], [], StepRunner.run

    def run(self, batch, counted, *more):
        loss = plain(self, batch, counted, *more)
        last[:] = self, batch, counted, loss
        return loss

    class Graph:
        def replay(self):
            runner, batch, counted, loss = self.recorded
            loss.copy_(plain(runner, batch, counted))
            replays.append((runner.parameters[0].grad.data_ptr(), tuple(batch["input_ids"].shape)))

    @contextmanager
    def graph(recording, **_):
        yield
        recording.recorded = tuple(last)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(StepRunner, "run", run)
    monkeypatch.setattr(engines, "choose_graphs", lambda *_: GraphChoice(True, measured))
    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return replays


def test_replays_train_as_launches_do_whatever_comes_between(tmp_path, monkeypatch):
    """Dropout, uneven micro-batches, two sizes of steps, an evaluation and a sample, a step that is no number
    and goes back to a checkpoint, and a stop and a start."""
    given = {
        "config": write_config(tmp_path, "gpt2-tiny", embd_pdrop=0.1),
        "batch_size": 5,
        "batch_schedule": ["0:3", "0.5:5"],
        "accumulation": 2,
        "steps": 6,
        "evaluations": 1,
        "checkpoint_steps": 2,
        "bad_steps": 1,
    }
    for name in ("draw_curves", "write_report"):
        monkeypatch.setattr(f"tessera.training.pretrain.{name}", lambda *_: None)
    weights, replays = [], []
    for graphs in (False, True):
        (folder := tmp_path / str(graphs)).mkdir()
        if graphs:
            replays = record_on_a_cpu(monkeypatch)
        run = Run(tiny_arguments(folder, **given))
        accumulate, get = run.engine.runner.accumulate, run.engine.rows.get

        def noted(step, run=run, get=get, stops=graphs):
            run.place = run.skipped.place_of(step)
            if stops and step == 3 and run.place > 3:
                run.signals.number = 2
            return get(step)

        def broken(data, sync=True, run=run, accumulate=accumulate):
            total = accumulate(data, sync)
            for p in run.model.parameters() if run.place == 3 else ():
                p.grad.fill_(torch.nan)
            return total

        run.place, run.engine.rows.get, run.engine.runner.accumulate = None, noted, broken
        with pytest.raises(Stopped) if graphs else nullcontext():
            run.run()
        if graphs:
            assert run.step == 5
            pretrain(tiny_arguments(folder, **given), resume=True)
        weights.append(load_file(folder / "run" / "final" / "model.safetensors"))
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    shapes = [shape for _, shape in replays]
    assert {(3, 32), (2, 32)} == set(shapes) and len(shapes) > 8
    assert len({address for address, _ in replays}) == 2  # of the run, and of the one that goes on


def test_recordings_are_given_up_where_memory_runs_out(tmp_path, monkeypatch, capsys):
    replays = record_on_a_cpu(monkeypatch)
    engine = Run(tiny_arguments(tmp_path)).engine
    engine.warm_up(0)
    engine.step(0)
    step = engine.runner.step

    def limited(data, *more):
        if len(data.batches[0]["input_ids"]) == 4:
            raise torch.OutOfMemoryError("injected")
        return step(data, *more)

    engine.runner.step = limited
    assert engine.step(1)[NORM].isfinite()
    assert engine.runner.graphs is None and [shape for _, shape in replays] == [(4, 32)] * 2
    assert "micro-batches of 2 rows instead of 4" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["launching", "record"])
def test_a_recording_that_fails_is_told(place, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("injected\nsecond line")

    record_on_a_cpu(monkeypatch, measured=True)
    monkeypatch.setattr(engines, "MOST_LAUNCHING", 0.0)
    monkeypatch.setattr(GraphedPasses, place, fail)
    engine = Run(tiny_arguments(tmp_path)).engine
    engine.warm_up(0)
    assert engine.runner.graphs is None and not engine.graphs.on
    assert "no CUDA graphs (recording failed: injected)\n" in capsys.readouterr().out
    engine.graphs = GraphChoice(True)  # asked for
    with pytest.raises(ValueError, match=r"cuda_graphs=on: recording failed \(injected\); take cuda_"):
        engine.warm_up(0)


def test_recordings_that_leave_no_room_for_a_step_are_given_up(tmp_path, monkeypatch, capsys):
    record_on_a_cpu(monkeypatch, measured=True)
    monkeypatch.setattr(engines, "MOST_LAUNCHING", 0.0)
    engine = Run(tiny_arguments(tmp_path)).engine

    def limited(*given):
        if engine.runner.graphs is not None:
            raise torch.OutOfMemoryError("injected")
        return take_step(*given)

    monkeypatch.setattr(engines, "take_step", limited)
    engine.warm_up(0)
    assert engine.runner.graphs is None and engine.step(0)[NORM].isfinite()
    assert "no CUDA graphs (memory ran out beside the recording)\n" in capsys.readouterr().out
    engine.args.cuda_graphs = "on"
    engine.graphs = GraphChoice(True)
    with pytest.raises(torch.OutOfMemoryError):
        engine.warm_up(0)


def test_launching_is_measured_without_the_gradients_of_a_pass_before(tmp_path, monkeypatch):
    record_on_a_cpu(monkeypatch)
    weight, held = torch.nn.Parameter(torch.ones(1)), []

    def run(batch, counted):
        held.append(weight.grad)
        weight.sum().backward()
        return counted

    assert 0 < GraphedPasses(run, [weight]).launching({}, torch.tensor(1)) <= 1
    assert held and all(gradient is None for gradient in held)


def test_a_dummy_batch_is_like_a_real_one(tmp_path):
    """Else no recording would ever be found for a step's rows."""
    engine = Run(tiny_arguments(tmp_path)).engine
    (real,), (dummy,) = engine.rows.get(0).batches, engine._dummy((4, 32)).batches
    assert list(real) == list(dummy)
    for name, value in real.items():
        assert (value.shape, value.dtype) == (dummy[name].shape, dummy[name].dtype), name
    assert real["labels"] is real["shift_labels"] and dummy["labels"] is dummy["shift_labels"]

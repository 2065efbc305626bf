"""Runs that are killed, stopped and spread anew end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

TESTS = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def seen_by(kind: str, *options: object, timeout: float = 300) -> dict:
    """What `helpers/killed_runs.py` saw."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "helpers.killed_runs", kind, *map(str, options)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=options[0]
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kills", "preset"),
    [
        (3, "bytegpt-tiny"),
        pytest.param(30, "llama-tiny", marks=pytest.mark.slow),
        pytest.param(30, "bytegpt-tiny", marks=pytest.mark.slow),
    ],
)
def test_runs_killed_at_random_moments_end_in_the_bits_of_one_that_was_not(kills, preset, tmp_path):
    """With dropout; ByteGPT has routers that biases balance. Every other kill waits for half a checkpoint."""
    seen = seen_by("killed", tmp_path, kills, preset, 7, timeout=60 * (5 + kills))
    assert seen["kills"] == kills and "errors" not in seen, seen
    assert seen["finished"] >= 1 and seen["same"], seen
    assert seen["writing"] >= kills // 3, "killed in the middle of a checkpoint"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "optimizer", "kept"),
    [
        ("ddp", "adamw", "fp32"),
        ("fsdp", "adamw", "fp32"),
        ("ddp", "muon", "fp32"),
        ("fsdp", "muon", "fp32"),
        ("ddp", "muon", "split"),
        ("ddp", "adamw", "bf16"),
    ],
)
def test_two_processes_are_stopped_and_one_two_or_three_go_on_with_the_same_samples(
    parallel, optimizer, kept, tmp_path
):
    """SIGTERM goes to one of the two, and both end at the same step. Whole weights become split ones, Muon's
    momentum is with other processes. The first process alone hashes what they go on from."""
    seen = seen_by("elastic", tmp_path, parallel, optimizer, kept)
    assert seen["whole"] == [0] and seen["two"] == [143, 143], seen
    assert len(seen["stopped"]) == 1, "both stopped at the same step"
    stopped = int(seen["stopped"][0].removeprefix("step-"))
    assert 0 < stopped < 12
    expected = rows_of(tmp_path / "whole", "all", 1)
    assert rows_of(tmp_path / "two", "first", 2) == expected[:stopped]
    weights = load_file(tmp_path / "whole" / "run" / "final" / "model.safetensors")
    losses = losses_of(tmp_path / "whole")
    for processes in (1, 2, 3):
        assert seen[f"on{processes}"] == [0] * processes, seen
        folder = tmp_path / f"on{processes}"
        assert rows_of(folder, "then", processes) == expected[stopped:], "the same rows in every step"
        assert (folder / "then-0.hashed").read_text().split() == seen["stopped"]
        assert not any((folder / f"then-{rank}.hashed").exists() for rank in range(1, processes))
        assert losses_of(folder) == pytest.approx(losses, abs=1e-4 if kept == "fp32" else 5e-3)
        for name, tensor in load_file(folder / "run" / "final" / "model.safetensors").items():
            if kept == "fp32":
                assert_close(tensor, weights[name], atol=1e-4, rtol=0, msg=f"{name} on {processes}")


def rows_of(folder: Path, log: str, processes: int) -> list[list[int]]:
    """The numbers of the rows of each step, of all processes in their order."""
    parts = [
        [json.loads(line) for line in (folder / f"{log}-{rank}.rows").read_text().splitlines()]
        for rank in range(processes)
    ]
    return [sum(step, []) for step in zip(*parts, strict=True)]


def losses_of(folder: Path) -> list[float]:
    """The loss after each step; the average begins anew where a run went on."""
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["val_loss"] for record in records if "val_loss" in record and record["step"] in (0, 12)]

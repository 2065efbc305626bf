"""Runs on several processes are the run of one: losses, gradients and weights, however it is spread.

The processes are those of `helpers/engine_ranks.py`, on a CPU through gloo.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from helpers import engine_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

DENSE, SPARSE = "preset=llama-tiny", "preset=bytegpt-tiny"
LAYOUTS = {
    "accumulated": (1, "ddp", "accumulation=8"),
    "ddp": (2, "ddp"),
    "ddp, accumulated": (2, "ddp", "accumulation=2"),
    "fsdp": (2, "fsdp"),
    "fsdp, accumulated": (2, "fsdp", "accumulation=2"),
    "hsdp": (4, "hsdp", "shard_size=2"),
    "tensors": (2, "ddp", "tensor_parallel=2"),
    "tensors and data": (4, "fsdp", "tensor_parallel=2"),
}
EXPERTS = {"fsdp": (2, "fsdp"), "experts": (2, "fsdp", "expert_parallel=2")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `engine_ranks.py` found, by its arguments; a launch that was made already is not made again."""

    @lru_cache
    def launch(processes: int, *given: str) -> tuple[dict, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("run")
        program = [engine_ranks.__file__, "report.json", str(folder), *given]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), *program]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "report.json").read_text()), load_file(folder / "report.st")

    return launch


def assert_alike(ours, theirs, tolerance: float = 1e-4) -> None:
    for key in ("losses", "norms", "evaluated"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=tolerance), key
    assert ours[1].keys() == theirs[1].keys()
    for name, tensor in ours[1].items():
        # AdamW turns the least difference in a gradient near zero into a step of its own.
        torch.testing.assert_close(tensor, theirs[1][name], atol=4e-4, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_model_trains_alike_however_it_is_spread(layout, found):
    processes, parallel, *given = LAYOUTS[layout]
    one, spread = found(1, "ddp", DENSE), found(processes, parallel, DENSE, *given)
    assert_alike(spread, one)
    whole = one[0]["held"]
    shares = {"fsdp": 0.5, "hsdp": 0.5, "tensors": 0.51, "tensors and data": 0.26}
    share = shares.get(layout.partition(",")[0], 1.0)
    assert spread[0]["held"] <= share * whole * 1.01
    # A head that is split by tensor has to be called; all others leave their logits to the loss.
    assert spread[0]["wrote_logits"] is layout.startswith("tensors")


@pytest.mark.parametrize("layout", EXPERTS)
def test_a_mixture_of_experts_trains_alike_however_it_is_spread(layout, found):
    """The load-balancing loss is that of a process's own rows, so it is left out."""
    processes, parallel, *given = EXPERTS[layout]
    one = found(1, "ddp", SPARSE, "balance=0")
    assert_alike(found(processes, parallel, SPARSE, "balance=0", *given), one)


def test_memory_that_runs_out_on_one_process_halves_the_micro_batches_of_all(found):
    one, two = found(1, "ddp", DENSE), found(2, "ddp", DENSE, "fails_at=1", "fails_on=1")
    assert_alike(two, one)
    assert two[0]["tried"] == 5 and two[0]["parts"] == [2, 2]
    (said,) = two[0]["said"]
    assert "micro-batches of 2 rows instead of 4" in said

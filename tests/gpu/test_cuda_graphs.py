"""Runs whose passes are replayed from CUDA graphs learn what the same runs learn without."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import PretrainArguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def train(folder: Path, text: Path, **how) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights of a short run, and its losses."""
    common = {"evaluations": 0, "log_steps": 1, "sample_tokens": 0, "sequence_length": 64}
    pretrain(PretrainArguments(data_file=str(text), save_path=str(folder), **common, **how))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return load_file(folder / "final" / "model.safetensors"), [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_replayed_passes_equal_launched_ones(tmp_path, compiled):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(torch.randint(97, 123, (20_000,)).tolist()))
    how = {"config": "bytes-demo", "steps": 12, "batch_schedule": ["0:4", "0.5:8"], "micro_batch_size": 4}
    # Two launched ones show how far apart runs are that nothing distinguishes.
    (weights, losses), (again, _), (replayed, replayed_losses) = (
        train(tmp_path / name, text, compile=compiled, cuda_graphs=graphs, **how)
        for name, graphs in (("first", "off"), ("second", "off"), ("replayed", "on"))
    )
    assert len(losses) >= 12
    assert replayed_losses == pytest.approx(losses, abs=2e-3)
    for name, value in weights.items():
        noise = (again[name] - value).norm()
        assert (replayed[name] - value).norm() <= 3 * noise + 2e-2 * value.norm().clamp_min(1e-3), name


def test_dropout_differs_from_step_to_step(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"abcdefgh" * 2000)
    how = {"config": "shakespeare", "steps": 6, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-12}
    _, losses = train(tmp_path / "run", text, compile="off", cuda_graphs="on", **how)
    assert len(set(losses)) > 3

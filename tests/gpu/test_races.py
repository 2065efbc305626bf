"""What the recipes with a clock promise, on the GPU that their figures are of."""

import os
from pathlib import Path

import pytest
import torch

from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import gather_arguments

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.shared,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="the clock is that of an H100 or better",
)
def test_fifteen_seconds_reach_nano_gpt_on_tinyshakespeare(tmp_path):
    text = SHARED / "data" / "tinyshakespeare" / "input.txt"
    told = {"data_file": str(text), "save_path": str(tmp_path / "run"), "sample_tokens": 0}
    result = pretrain(gather_arguments(told, "shakespeare-15s"))
    assert result.seconds < 16
    assert result.after.tokens == 111_538
    assert result.after.nats <= 1.4697

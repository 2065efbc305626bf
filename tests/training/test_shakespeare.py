"""The demo model on a real text, for as long as its figure says."""

import os
from pathlib import Path

import pytest

from tessera.training.demo import PRESET
from tessera.training.pretrain import PretrainArguments, pretrain

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.mark.slow
@pytest.mark.shared
def test_three_minutes_on_a_cpu_reach_160_nats_per_byte(tmp_path):
    args = PretrainArguments(
        config=PRESET,
        data_file=str(SHARED / "data" / "tinyshakespeare" / "input.txt"),
        save_path=str(tmp_path / "run"),
        minutes=3,
        batch_size=4,
        sequence_length=256,
        evaluations=0,
    )
    assert pretrain(args).after.nats <= 1.60

"""The Triton kernel of the loss without a GPU: its program, interpreted, against float64."""

import json
import math
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from tessera.modeling.loss_kernel import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is for Linux")
def test_the_interpreted_kernel_equals_float64():
    script = Path(helpers.__file__).with_name("interpreted_loss.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    rounding = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 5e-4}
    for case, error in said["errors"].items():
        assert error["loss"] < 5e-6, case
        assert error["gradient"] < rounding[case.split()[0]], case
    assert len(said["errors"]) == 6 and math.isnan(said["beyond"])

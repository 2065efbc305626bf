"""The `trl` command, which imports no code but what lies beside the model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.chats import COLOURS, write_rows
from helpers.trainers import stack_model
from safetensors.torch import load_file


@pytest.mark.distributed
def test_dpo_on_the_command_line_runs_the_code_beside_the_model(tmp_path):
    """Of nanochat, whose head is padded; the reference model is loaded from the directory too."""
    folder, out = stack_model(tmp_path / "model", "nanochat-tiny"), tmp_path / "out"
    (tmp_path / "data").mkdir()
    rows = [
        {"prompt": f"Which colour has {thing}? ", "chosen": colour, "rejected": "I never saw one."}
        for thing, colour in COLOURS.items()
    ]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    options = {
        "model_name_or_path": folder,
        "dataset_name": tmp_path / "data",
        "output_dir": out,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    result = subprocess.run(
        [Path(sys.executable).with_name("trl"), "dpo", *flags, "--trust_remote_code", "--use_cpu"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    code = tmp_path / "home" / "modules" / "transformers_modules"
    assert any(code.rglob("modeling_tessera.py")), "the package was used, and not the code of the directory"
    logged = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=2e-3) and logged[1]["loss"] < 0.68
    before, after = (load_file(Path(path) / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before)
    assert (out / "modeling_tessera.py").is_file()

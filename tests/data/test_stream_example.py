"""The example that streams a dataset does so from a Hub, and packs it to rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers.chats import chat_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_dataset.py"


def test_the_example_streams_packed_rows_from_a_hub(tmp_path):
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer", str(tmp_path / "tokenizer"), "--length", "512", "--rows", "3"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^row (\d): (\d+) conversations, (\d+) of 512 tokens, (\d+) trained on$", done.stdout, re.M
    )
    assert [number for number, *_ in rows] == ["1", "2", "3"]
    for _, parts, tokens, trained in rows:
        assert int(parts) >= 1 and 0.9 * 512 < int(tokens) <= 512 and 0 < int(trained) < int(tokens)
    assert "<|im_start|>assistant\n⟦" in done.stdout and "<|im_end|>⟧" in done.stdout

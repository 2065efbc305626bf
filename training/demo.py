"""`make demo`: a model from nothing in minutes, on text that every machine has.

The text is the standard library of the Python that runs this, its sources and its help texts, unless another
is given. It becomes a folder of tokens as `tessera data prepare` makes them, here of bytes. The model is the
preset that learns fastest on two CPU cores (`benchmarks/shakespeare_cpu.py`).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tessera.data.mixing import Source
from tessera.data.prepare import prepare
from tessera.data.token_files import is_prepared

from .pretrain import PretrainArguments, PretrainResult, Run
from .samples import for_a_terminal

PRESET = "bytes-demo"
DEMO_MARK = ".tessera-demo"
# Twice what the demo reads in its minutes; a tenth is held out, and scored before and after.
TEXT_BYTES = 4_000_000
HELD_OUT = 0.1

# Run by a new Python, which knows nothing of this one.
_LOAD = """
import sys, tessera
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.6, pad_token_id=0)
print(type(model).__name__, type(tokenizer).__name__)
print(tokenizer.decode(out[0]))
"""


def standard_library_text(folder: Path) -> Path:
    """Writes help topics and top-level modules of this Python below `folder`, `TEXT_BYTES` of them or so."""
    from pydoc_data import topics

    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, text in topics.topics.items():
        total += (folder / f"topic-{name}.txt").write_text(text, encoding="utf-8")
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if total > TEXT_BYTES:
            break
        shutil.copyfile(source, folder / source.name)
        total += source.stat().st_size
    return folder


def run_demo(minutes: float = 2.5, data: str | None = None, save_path: str = "runs/demo") -> PretrainResult:
    """Trains, shows bits per byte before and after, the curve's path and a sample, and loads the model
    elsewhere.

    Args:
        minutes: of training.
        data: text as for `tessera data prepare`, or what that wrote; the standard library if not given.
        save_path: run directory; what an earlier demo left there is replaced, anything else is not.

    Raises:
        ValueError: if `save_path` holds something else, or the text is too short.
    """
    folder = Path(save_path)
    if folder.exists() and any(folder.iterdir()) and not (folder / DEMO_MARK).exists():
        raise ValueError(f"{folder} holds something other than a demo; choose another --save-path")
    print(f"text: {data or 'the standard library of this Python'}")
    tokens = data if data and is_prepared(data) else str(_prepare(data, folder))
    args = PretrainArguments(
        config=PRESET,
        data_file=tokens,
        save_path=str(folder / "run"),
        minutes=minutes,
        batch_size=4,
        sequence_length=256,
        sample_prompt="\n" if data else "def ",
    )
    run = Run(args, replace=True)
    _claim(folder)
    result = run.run()
    print(f"sample:\n{for_a_terminal(result.sample)}\n")
    print(f"loading {result.final} in a new process:", flush=True)
    subprocess.run(
        [sys.executable, "-c", _LOAD, str(result.final.resolve()), args.sample_prompt],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    print(
        f"\n{result.before.bits_per_byte:.2f} -> {result.after.bits_per_byte:.2f} bits per byte in "
        f"{result.seconds:.0f} s of training, {result.tokens:,} tokens. Next: "
        f"tessera generate --ckpt-path {result.folder} --interactive"
    )
    return result


def _prepare(data: str | None, folder: Path) -> Path:
    """Tokens of the text in `folder`, in the place of those of an earlier demo once they are whole."""
    with tempfile.TemporaryDirectory() as scratch:
        text = data or str(standard_library_text(Path(scratch) / "text"))
        made = Path(scratch) / "tokens"
        meta = prepare([Source(text)], made, val_fraction=HELD_OUT)
        _claim(folder)
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        shutil.move(made, folder / "tokens")
    counts = meta["train"]["documents"], meta["train"]["tokens"], meta["val"]["tokens"]
    print("tokens: {:,} documents, {:,} bytes to train on, {:,} held out".format(*counts))
    return folder / "tokens"


def _claim(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEMO_MARK).touch()

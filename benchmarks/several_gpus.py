"""Tokens per second of the trainer's own steps on one GPU and on several: DDP and FSDP2 against one process.

    python benchmarks/several_gpus.py [--gpus 2] [--rows one ddp fsdp] [--shape llama-1.1b] [--tiny]

Each row is a launch of `torchrun` whose processes make the engine that `tessera pretrain` makes, on random
tokens: bf16 autocast over fp32 weights and AdamW, unless `--set weights=split` or the like says otherwise.
The rows of a step grow with the processes, so that each has the same work (weak scaling). What is timed are
steps with all that belongs to them (data, gradients, their exchange and norm, update); compiling is not.
`--rows one` alone measures the trainer on one GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tessera import TesseraConfig
from tessera.training.pretrain import Run
from tessera.training.pretrain_arguments import PretrainArguments

# Length, windows a GPU takes at a time, of how many it makes a step, and fields of the configuration.
SHAPES = {
    "llama-135m": (
        2048,
        32,
        2,
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "llama-1.1b": (
        4096,
        4,
        4,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "tiny": (
        64,
        2,
        2,
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
}


def write_inputs(folder: Path, fields: dict, length: int, vocabulary: int) -> None:
    """A configuration, and a folder of random tokens of a tokenizer of words that nobody says."""
    config = TesseraConfig(
        **fields, vocab_size=vocabulary, max_position_embeddings=length, tie_word_embeddings=False
    )
    config.to_json_file(folder / "model.json")
    data = folder / "data"
    (data / "tokenizer").mkdir(parents=True)
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<end>": vocabulary - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(data / "tokenizer")
    chance = np.random.default_rng(0)
    for split, count in (("train", 2048 * length), ("val", 4 * length)):
        chance.integers(0, vocabulary, count).astype("<u2").tofile(data / f"{split}.bin")
    (data / "data_meta.json").write_text(json.dumps({"dtype": "uint16"}))


def work(given: dict, steps: int, out: str) -> None:
    """Times steps, in each process of a launch; the first writes what came of it."""
    run = Run(PretrainArguments(**given))
    engine, accelerator = run.engine, run.accelerator
    cuda = accelerator.device.type == "cuda"
    engine.model.train()
    start = time.perf_counter()
    engine.warm_up(0)
    ready = time.perf_counter() - start
    before = 3
    for step in range(before):
        engine.step(step)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    for step in range(before, before + steps):
        engine.step(step)
    if cuda:
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - start
    if accelerator.is_main_process:
        tokens = run.feed.tokens_before(before + steps) - run.feed.tokens_before(before)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        row = {"tokens_per_s": tokens / seconds, "step_ms": 1e3 * seconds / steps, "peak_GiB": peak}
        row |= {"ready_s": ready, "compiled": str(engine.compiles), "layout": str(engine.layout)}
        Path(out).write_text(json.dumps(row))
    accelerator.end_training()


def launch(processes: int, given: dict, steps: int, folder: Path) -> dict:
    """Runs this file in so many processes and returns what the first one measured."""
    out = folder / "row.json"
    told = json.dumps({"given": given, "steps": steps, "out": str(out)})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", __file__, "--worker", told]
    environment = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{given['parallel']} on {processes} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(out.read_text())


def main() -> None:
    """Prints a row for each launch, and its ratio to the first one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=["one", "ddp", "fsdp"], default=["one", "ddp", "fsdp"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the run")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(**json.loads(args.worker))
    length, micro, accumulation, fields = SHAPES["tiny" if args.tiny else args.shape]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.shape}, {args.set or 'fp32 weights, AdamW'}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, fields, length, 512 if args.tiny else 32768)
        for kind in args.rows:
            processes = 1 if kind == "one" else args.gpus
            given = {
                "config": str(folder / "model.json"),
                "data_file": str(folder / "data"),
                "save_path": str(folder / "run"),
                "steps": 1000,
                "batch_size": micro * accumulation * processes,
                "micro_batch_size": micro,
                "sequence_length": length,
                "optimizer": "adamw",
                "parallel": "ddp" if kind == "one" else kind,
                **dict(item.split("=", 1) for item in args.set),
            }
            row = launch(processes, given, args.steps, folder)
            rows.append({"row": kind, "processes": processes, **row})
            print(
                f"{kind:5} x{processes} {row['step_ms']:9.1f} ms {row['tokens_per_s']:11,.0f} tokens/s "
                f"{row['peak_GiB']:7.2f} GiB  {row['tokens_per_s'] / rows[0]['tokens_per_s']:.3f}x  "
                f"ready {row['ready_s']:.0f} s; {row['compiled']}; {row['layout']}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""tinyshakespeare in fifteen seconds of a GPU: validation nats per character against nanoGPT's 1.4697.

    python benchmarks/shakespeare_gpu.py input.txt [--seconds 15] [--seeds 0 1 2]

The recipe `shakespeare-15s` under `tessera pretrain`: it sees the first 90 % of the text, byte by byte (all
of it is ASCII, so bytes are characters), and is scored on every byte of the last 10 %, in windows of its own
length that do not overlap. nanoGPT's figure is the one of its README for one A100 and about three minutes.
The clock is that of the run: compiling, evaluation and saving are not in it.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import transformers

from tessera import TesseraConfig
from tessera.configs.recipes import read_recipe
from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import gather_arguments

RECIPE = "shakespeare-15s"
NANOGPT = 1.4697


def run(path: str, seconds: float, seed: int, given: dict, model: dict) -> dict:
    """Trains once and gives the row of the table; `given` and `model` lie over the recipe and its preset."""
    with tempfile.TemporaryDirectory() as folder:
        told = {
            "data_file": path,
            "save_path": f"{folder}/run",
            "minutes": seconds / 60,
            "evaluations": 0,
            "checkpoint_minutes": 0.0,
            "sample_tokens": 0,
            "seed": seed,
        }
        if model:
            told["config"] = f"{folder}/model.json"
            TesseraConfig.from_preset(read_recipe(RECIPE)["config"], **model).to_json_file(told["config"])
        result = pretrain(gather_arguments(told | given, recipe=RECIPE))
    return {
        "seed": seed,
        "seconds": round(result.seconds, 2),
        "characters_seen_M": round(result.tokens / 1e6, 2),
        "nats_per_character": round(result.after.nats, 4),
        "bits_per_character": round(result.after.bits_per_byte, 4),
        "characters_scored": result.after.tokens,
    }


def main() -> None:
    """Prints a line for each seed, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="input.txt of tinyshakespeare")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the run over the recipe's"
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=VALUE", help="the same of the model")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    given, model = (
        {name: json.loads(value) for name, _, value in (item.partition("=") for item in items)}
        for items in (args.set, args.model)
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for seed in args.seeds:
        rows.append(run(args.text, args.seconds, seed, given, model))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    mean = statistics.mean(row["nats_per_character"] for row in rows)
    print(f"mean {mean:.4f} nats per character; nanoGPT {NANOGPT}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

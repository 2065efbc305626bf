"""The four-minute speedrun: bits per byte on held-out Wikipedia after 240 seconds of training on one GPU.

    python benchmarks/speedrun.py train_200mb.txt.xz valid.txt [--seconds 240] [--seeds 0 1]
    python benchmarks/speedrun.py train_200mb.txt.xz valid.txt --ablate [--seconds 30] [--only "16 layers"]

All of it goes through the package: a BPE trained on the training text, `tessera data prepare`, and the recipe
`speedrun-4min` under `tessera pretrain`, whose steps are fitted to the time by a short run before. The clock
is that of the run: compiling, evaluation and saving are not in it. Scored are all of the held-out text's
tokens, ends of documents too, in windows that do not overlap; nats over ln 2 and over the bytes of the text.
A second figure has every token but the first ones given half a window or more, by windows that overlap.
`--ablate` trains the recipe, and the recipe with one thing changed at a time, for so many seconds each.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.configs.recipes import read_recipe
from tessera.data.mixing import Source
from tessera.data.prepare import prepare
from tessera.data.sources import read_texts
from tessera.evaluation.documents import Document, read_held_out
from tessera.evaluation.perplexity import perplexity
from tessera.tokenization.train import train_tokenizer
from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import gather_arguments

RECIPE = "speedrun-4min"
VOCABULARY = 16384
TRIAL_STEPS = 80


@dataclasses.dataclass(frozen=True)
class Change:
    """What an ablation changes in the recipe."""

    name: str
    model: dict = dataclasses.field(default_factory=dict)
    run: dict = dataclasses.field(default_factory=dict)
    vocabulary: int = VOCABULARY


PLAIN = {"value_embedding_interval": None, "residual_scalars": False, "smear": False, "backout": False}
ABLATIONS = [
    Change("the recipe"),
    Change("the recipe, another seed", run={"seed": 1}),
    Change("no value embeddings", {"value_embedding_interval": None}),
    Change("no smear, no backout", {"smear": False, "backout": False}),
    Change("no residual scalars", {"residual_scalars": False}),
    Change("SwiGLU and none of nanochat's extras", PLAIN | {"hidden_act": "silu", "gated_mlp": True}),
    Change("no NorMuon", run={"muon_features": ["equilibrate", "renormalize", "cautious"]}),
    Change("Muon alone", run={"muon_features": []}),
    Change("AdamW", run={"optimizer": "adamw", "learning_rate": 2e-3}),
    Change("65,536 tokens throughout", run={"batch_size": 16}),
    Change("windows of 4096 throughout", run={"sequence_length": 4096}),
    Change("half the rate", run={"learning_rate": 0.007}),
    Change("no weight decay", run={"weight_decay": 0.0}),
    Change("half the weight decay", run={"weight_decay": 0.75}),
    Change("a quarter of the tables' decay", run={"table_decay": 0.1}),
    Change("nanochat's decay of tables", run={"table_decay": 0.01}),
    Change("no dropout", {"embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    Change(
        "a third of all that works against recall",
        {"embd_pdrop": 0.04, "resid_pdrop": 0.04},
        {"weight_decay": 0.8, "table_decay": 0.12},
    ),
    Change("value embeddings in every fifth layer", {"value_embedding_interval": 5}),
    Change("vocabulary of 8k", vocabulary=8192),
    Change("vocabulary of 32k", vocabulary=32768),
]


def prepare_tokens(train: str, valid: str, vocabulary: int, folder: Path, given: str | None) -> Path:
    """Tokens of the text by a tokenizer trained on its training part; made once in `folder`."""
    tokens = folder / f"tokens-{vocabulary}"
    if tokens.is_dir():
        return tokens
    workers = os.cpu_count() or 1
    start = time.perf_counter()
    tokenizer = Path(given) if given else folder / f"tokenizer-{vocabulary}"
    if not tokenizer.is_dir():
        train_tokenizer(read_texts([train]), vocab_size=vocabulary, output=tokenizer, workers=workers)
    between = time.perf_counter()
    meta = prepare([Source(train)], tokens, tokenizer=str(tokenizer), val_data=[valid], workers=workers)
    print(
        f"vocabulary {vocabulary}: tokenizer {between - start:.0f} s, {meta['train']['tokens']:,} and "
        f"{meta['val']['tokens']:,} tokens in {time.perf_counter() - between:.0f} s, "
        f"{meta['val']['bytes'] / meta['val']['tokens']:.3f} bytes a token",
        flush=True,
    )
    return tokens


def with_more_context(model_folder: Path, tokens: Path, length: int) -> float:
    """Bits per byte of the held-out stream in windows of so many tokens that overlap by half."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TesseraForCausalLM.from_pretrained(model_folder).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        stream = read_held_out(str(tokens), tokenizer).stream
        document = Document(stream.ids, 0, stream.num_bytes)
        found = perplexity(model, tokenizer, [document], length, length // 2, batch_size=4)
    return found.bits_per_byte[0]


def run(
    change: Change, tokens: Path, seconds: float, given: dict, steps: int | None = None, score: bool = False
) -> dict:
    """Trains once and gives the row of the table.

    Args:
        change: of the recipe.
        tokens: folder that was prepared.
        seconds: of training, after which the run ends wherever it is.
        given: arguments of the run over all others.
        steps: of the run.
        score: whether windows that overlap are scored too.
    """
    told = {"data_file": str(tokens), "minutes": seconds / 60, "evaluations": 0, "sample_tokens": 0}
    told |= {"checkpoint_minutes": 0.0} | ({"steps": steps} if steps else {}) | change.run | given
    with tempfile.TemporaryDirectory() as folder:
        told["save_path"] = f"{folder}/run"
        if change.model:
            preset = told.get("config") or read_recipe(RECIPE)["config"]
            config = TesseraConfig.from_preset(preset, vocab_size=change.vocabulary, **change.model)
            told["config"] = f"{folder}/model.json"
            config.to_json_file(told["config"])
        args = gather_arguments(told, recipe=RECIPE)
        start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = pretrain(args)
        whole = time.perf_counter() - start
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None
        overlapping = None
        if score:
            length = TesseraConfig.from_pretrained(result.folder / "final").max_position_embeddings
            overlapping = round(with_more_context(result.folder / "final", tokens, length), 4)
    return {
        "run": change.name,
        "seed": args.seed,
        "seconds": round(result.seconds, 2),
        "steps": args.steps,
        "tokens_M": round(result.tokens / 1e6, 1),
        "tokens_per_s": round(result.tokens / result.seconds),
        "nats_per_token": round(result.after.nats, 4),
        "bits_per_byte": round(result.after.bits_per_byte, 4),
        "stderr": round(result.after.bits_per_byte_stderr or 0.0, 4),
        "overlapping_windows": overlapping,
        "peak_GiB": peak,
        "with_compiling_s": round(whole, 1),
    }


def steps_in(seconds: float, change: Change, tokens: Path, given: dict) -> int:
    """Steps that fit into the time, by a short run whose stages have the same shares."""
    row = run(change, tokens, 60.0, given, TRIAL_STEPS)
    return max(1, round(TRIAL_STEPS * seconds / row["seconds"]))


def values_of(given: list[str]) -> dict:
    """NAME=VALUE, the values in JSON or as text."""
    values = {}
    for name, _, value in (item.partition("=") for item in given):
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def main() -> None:
    """Prints a line for each run, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="training text, plain or .xz")
    parser.add_argument("valid", help="held-out text")
    parser.add_argument("--seconds", type=float, help="of training [240; 30 with --ablate]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="ablations whose names contain one of these")
    parser.add_argument("--tokenizer", help="a tokenizer that was trained before, of 16,384 tokens")
    parser.add_argument("--work", help="folder where tokenizers and tokens stay [a temporary one]")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the run over the recipe's"
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=VALUE", help="the same of the model")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    given, model = values_of(args.set), values_of(args.model)
    changes = ABLATIONS if args.ablate else [Change("the recipe")]
    changes = [dataclasses.replace(one, model=one.model | model) for one in changes]
    changes = [one for one in changes if not args.only or any(part in one.name for part in args.only)]
    if not changes:
        sys.exit(f"no ablation is called that; there are: {', '.join(one.name for one in ABLATIONS)}")
    seconds = args.seconds or (30.0 if args.ablate else 240.0)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {seconds:g} s each")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        for change in changes:
            own = args.tokenizer if change.vocabulary == VOCABULARY else None
            tokens = prepare_tokens(args.train, args.valid, change.vocabulary, work, own)
            steps = given.get("steps") or steps_in(seconds, change, tokens, given)
            for seed in args.seeds:
                rows.append(run(change, tokens, seconds, {"seed": seed} | given, steps, score=True))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Encoding a corpus to disk: `tessera data prepare` against tokenizers' and tiktoken's batch encoders.

    python benchmarks/encode_corpus.py --text corpus.txt --tokenizer DIR [--megabytes 100] [--threads 2]

The text holds documents with lines `<|endoftext|>` between them. All take the same documents through the same
BPE on the same number of cores, and end with uint16 or uint32 ids in a file; tiktoken is given the merges of
the tokenizer, which has to split as GPT-4's does. Peers read the whole text at once and cut it at the lines;
ours reads, hashes, splits and writes as it always does, and each of its processes learns its words anew. Each
runs in a process of its own, whose peak memory is that of it and of its largest child. Loading the tokenizer
is timed, imports are not; ours has those of its processes on top.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WAYS = ("tokenizers", "tiktoken", "tessera")
BATCH = 256  # documents that a peer is given at once: more of them at a time are no faster


def main() -> None:
    """Prints a line a way, and the ratio to the faster peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", required=True, help="directory of a byte-level BPE")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        with open(args.text, "rb") as source:
            data = source.read(int(args.megabytes * 1e6))
        text.write_bytes(data[: data.rindex(b"\n<|endoftext|>\n") + 1])
        size = text.stat().st_size / 1e6
        print(f"{size:.1f} MB, {args.threads} threads")
        rates = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--text", str(text), "--tokenizer", args.tokenizer]
            command += ["--threads", str(args.threads), "--way", way]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rates[way] = size / found["seconds"]
            print(
                f"{way:10} {rates[way]:6.1f} MB/s  {found['tokens']:,} tokens  {found['seconds']:6.1f} s  "
                f"peak {found['peak_mb']:,.0f} MB",
                flush=True,
            )
        print(
            f"ours over the faster peer: {rates['tessera'] / max(rates['tokenizers'], rates['tiktoken']):.2f}"
        )


def run(args: argparse.Namespace) -> dict:
    """One way, timed from its first document to its files being closed."""
    with tempfile.TemporaryDirectory() as folder:
        if args.way == "tessera":
            seconds, tokens = prepare_it(args, Path(folder) / "out")
        else:
            import tiktoken  # noqa: F401
            import tokenizers  # noqa: F401

            import tessera.tokenization.byte_level  # noqa: F401, so that imports are not what is timed

            start = time.perf_counter()
            text = Path(args.text).read_text(encoding="utf-8")
            documents = [part.strip("\r\n") for part in text.split("<|endoftext|>\n")]
            documents = [document for document in documents if document]
            del text
            encode = tiktoken_encoder(args) if args.way == "tiktoken" else tokenizers_encoder(args)
            tokens = 0
            with (Path(folder) / "train.bin").open("wb") as file:
                for i in range(0, len(documents), BATCH):
                    for ids in encode(documents[i : i + BATCH]):
                        file.write(np.array([*ids, 0], dtype="<u2").tobytes())
                        tokens += len(ids) + 1
            seconds = time.perf_counter() - start
    own, child = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    peak = own + (args.threads * child if args.way == "tessera" else 0)
    return {"seconds": seconds, "tokens": tokens, "peak_mb": peak / 1e3}


def prepare_it(args: argparse.Namespace, output: Path) -> tuple[float, int]:
    """Ours; the start of its processes is part of it."""
    from transformers import AutoTokenizer

    from tessera.data.mixing import Source
    from tessera.data.prepare import prepare

    AutoTokenizer.from_pretrained(args.tokenizer)  # so that what it imports is not what is timed
    start = time.perf_counter()
    meta = prepare([Source(args.text)], output, tokenizer=args.tokenizer, workers=args.threads)
    return time.perf_counter() - start, meta["train"]["tokens"] + meta["val"]["tokens"]


def tokenizers_encoder(args: argparse.Namespace):
    """`encode_batch_fast`, which has as many threads as it is told before it starts."""
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(args.threads), "true"
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")
    backend.encode_special_tokens = True
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def tiktoken_encoder(args: argparse.Namespace):
    """`encode_ordinary_batch` of the same merges: a token's rank is its id."""
    import tiktoken

    from tessera.tokenization.byte_level import BYTE_NAMES, GPT4_PATTERN

    content = json.loads((Path(args.tokenizer) / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in content["added_tokens"]}
    byte_of = {name: byte for byte, name in BYTE_NAMES.items()}
    ranks = {
        bytes(byte_of[sign] for sign in token): id
        for token, id in content["model"]["vocab"].items()
        if token not in special
    }
    encoding = tiktoken.Encoding("same", pat_str=GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=args.threads)


if __name__ == "__main__":
    main()

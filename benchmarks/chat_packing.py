"""Packing conversations to rows: ours beside TRL's, on the same rows, in one process.

    python benchmarks/chat_packing.py --data chats.jsonl --tokenizer DIR --length 2048

Prints for each: rows, share of them that holds tokens, tokens that were lost, seconds, and the peak memory of
the process so far. Without --data the lengths are drawn: log-normal, median 245 tokens, sigma 1, as chats
have them. `in memory` lets all conversations wait; `stream` lets 1000.
"""

import argparse
import random
import resource
import time

from datasets.utils.logging import disable_progress_bar
from trl import pack_dataset

from tessera.data.chat import load_conversations
from tessera.data.chat_rows import BUFFER, IGNORED, Packed, RowEncoder, pack_best_fit, row_dataset
from tessera.tokenization import load_chat_tokenizer


def drawn(count: int, length: int) -> list[dict]:
    """Rows of made-up lengths, at most `length`."""
    draw = random.Random(0)
    sizes = [min(length, max(8, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(count)]
    return [{"input_ids": [7] * size, "labels": [IGNORED] + [7] * (size - 1)} for size in sizes]


def report(name: str, rows: int, tokens: int, total: int, length: int, seconds: float) -> None:
    """One line of the table."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    full = 100 * tokens / (rows * length)
    print(f"{name:<18}{rows:>8,}{full:>9.2f} %{total - tokens:>10,}{seconds:>9.2f} s{peak:>9,.0f} MB")


def main() -> None:
    """Packs with all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="conversations; default: drawn lengths")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--count", type=int, default=20_000, help="conversations at most")
    args = parser.parse_args()
    disable_progress_bar()
    if args.data is None:
        rows = drawn(args.count, args.length)
    else:
        conversations = load_conversations(args.data, limit=args.count)
        start = time.perf_counter()
        rows = list(RowEncoder(load_chat_tokenizer(args.tokenizer), args.length).encode(conversations))
        print(f"encoding: {len(rows) / (time.perf_counter() - start):,.0f} conversations a second")
    total = sum(len(row["input_ids"]) for row in rows)
    print(f"{len(rows):,} conversations, {total:,} tokens, rows of {args.length}\n")
    print(f"{'':<18}{'rows':>8}{'full':>11}{'lost':>10}{'time':>11}{'peak':>12}")
    flat = row_dataset(lambda: rows, packed=False, streaming=False)
    for name, buffer in (("ours, in memory", None), ("ours, stream", BUFFER)):
        packed, start = Packed(args.length), time.perf_counter()
        for _ in pack_best_fit(rows, args.length, buffer=buffer, packed=packed):
            pass
        seconds = time.perf_counter() - start
        report(name, packed.rows, packed.tokens, total, args.length, seconds)
    start = time.perf_counter()
    theirs = pack_dataset(flat, args.length)
    seconds = time.perf_counter() - start
    report("TRL bfd", len(theirs), sum(map(sum, theirs["seq_lengths"])), total, args.length, seconds)


if __name__ == "__main__":
    main()

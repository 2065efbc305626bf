"""tinyshakespeare in three minutes on a CPU: this package's demo model against nanoGPT's CPU setting.

    python benchmarks/shakespeare_cpu.py input.txt [--minutes 3] [--seeds 2]

Both see the first 90 % of the text, byte by byte, and are scored on every byte of the last 10 %, in
non-overlapping windows of their own training length, after the same minutes of training (evaluation is not
counted). The peer is transformers' GPT-2 at the size and settings that nanoGPT's README gives for a CPU (4
layers, 4 heads, 128 wide, context 64, batch 12, AdamW 1e-3 falling to 1e-4, no dropout), trained for as long.
"""

import argparse
import math
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from tessera.data.text import Tokens
from tessera.data.training_rows import ContiguousRows, RowSequence
from tessera.evaluation.bits_per_byte import text_loss
from tessera.training.demo import PRESET
from tessera.training.pretrain import PretrainArguments, pretrain


def ours(path: str, minutes: float, seed: int) -> tuple[float, int]:
    """Validation nats per byte of the demo preset, and the tokens it saw."""
    with tempfile.TemporaryDirectory() as folder:
        result = pretrain(
            PretrainArguments(
                config=PRESET,
                data_file=path,
                save_path=f"{folder}/run",
                minutes=minutes,
                batch_size=4,
                sequence_length=256,
                evaluations=0,
                sample_tokens=0,
                seed=seed,
            )
        )
    return result.after.nats, result.tokens


def peer(path: str, minutes: float, seed: int) -> tuple[float, int]:
    """The same for GPT-2 at nanoGPT's CPU settings."""
    torch.manual_seed(seed)
    text = Path(path).read_bytes()
    cut = len(text) - int(len(text) * 0.1)
    train, val = (np.frombuffer(part, dtype=np.uint8) for part in (text[:cut], text[cut:]))
    config = transformers.GPT2Config(
        vocab_size=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=64,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    rows = RowSequence([ContiguousRows(Tokens(train, len(train)), 64, seed)], seed=seed)
    step, seconds = 0, 0.0
    while (progress := seconds / (60 * minutes)) < 1:
        start = time.perf_counter()
        rate = 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = min(rate, 1e-3 * (step + 1) / 100)
        batch = rows.batch(range(step * 12, step * 12 + 12))
        logits = model(torch.from_numpy(batch.input_ids), use_cache=False).logits
        targets = torch.from_numpy(batch.targets)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds += time.perf_counter() - start
    return text_loss(model, val, len(val), 64).nats, step * 12 * 64


def main() -> None:
    """Prints one line a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {args.minutes:g} minutes each"
    )
    for seed in range(args.seeds):
        for name, run in (("tessera", ours), ("GPT-2, nanoGPT's CPU setting", peer)):
            nats, tokens = run(args.text, args.minutes, seed)
            line = f"{name}, seed {seed}: {nats:.4f} nats per byte ({nats / math.log(2):.4f} bits)"
            print(f"{line}, {tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()

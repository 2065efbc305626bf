"""Decoding on a static cache, compiled: Tessera against transformers' Llama of the same weights, one process.

    python benchmarks/decode.py [--sizes 124m 1.1b] [--batches 1 8 64]

`generate(cache_implementation="static")`, greedy, bf16, prompt of 512, on each side as it is called by
default (transformers compiles with CUDA graphs). Tokens per second is that of the steps alone: the time of
160 new tokens less that of 32, medians. The time to the first token is that of one new token.
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from tessera import TesseraConfig

SIZES = {
    "124m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SHORT, LONG, PROMPT = 32, 160, 512


def seconds(model, ids: torch.Tensor, new: int, repeats: int) -> float:
    """Median seconds of `generate` for `new` tokens, after two calls that compile and capture."""
    times = []
    for i in range(repeats + 2):
        if ids.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    assert out.shape[1] == ids.shape[1] + new
    return statistics.median(times)


def main() -> None:
    """Prints a row for each side and batch, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    for size in args.sizes:
        common = {
            **SIZES[size],
            "vocab_size": 32768,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        peer_config = LlamaConfig(**common)
        our_config = TesseraConfig(**common, rms_norm_eps=peer_config.rms_norm_eps)
        torch.manual_seed(0)
        with torch.device(device):
            peer = AutoModelForCausalLM.from_config(peer_config, dtype=torch.bfloat16).eval()
            ours = AutoModelForCausalLM.from_config(our_config, dtype=torch.bfloat16).eval()
        ours.load_state_dict(peer.state_dict())
        for batch in args.batches:
            ids = torch.randint(0, 32768, (batch, PROMPT), device=device)
            rates, firsts, peaks = {}, {}, {}
            for side, model in (("transformers", peer), ("tessera", ours)):
                model.generation_config.pad_token_id = 0
                torch._dynamo.reset()
                # Both sides keep the length of the longest cache so far.
                long = seconds(model, ids, LONG, args.repeats)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                short = seconds(model, ids, SHORT, args.repeats)
                first = seconds(model, ids, 1, args.repeats)
                peaks[side] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
                rates[side], firsts[side] = batch * (LONG - SHORT) / (long - short), first
                print(
                    f"{size} B{batch:<3} {side:13} {rates[side]:9,.0f} tokens/s first {1e3 * first:5.1f} ms  "
                    f"all {LONG} in {1e3 * long:7.1f} ms  peak {peaks[side]:.2f} GiB",
                    flush=True,
                )
            print(
                f"{size} B{batch:<3} tessera / transformers: {rates['tessera'] / rates['transformers']:.2f}x "
                f"tokens/s, {firsts['tessera'] / firsts['transformers']:.2f}x time to first token",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Latent attention: naive against absorbed, and whether `auto` takes the faster one.

    python benchmarks/latent_attention.py [--device cuda]

One attention layer of the `bytegpt` preset, B sequences, `new` queries on `seen` positions through a cache,
medians in milliseconds. fp32 on a CPU, bf16 on a GPU. The peer of each mode is the other, in the same
process.
"""

import argparse
import platform
import statistics
import time

import torch
from transformers import DynamicCache

from tessera import TesseraConfig
from tessera.modeling.attention import TesseraLatentAttention

SHAPES = [  # batch, new, seen
    (1, 1, 128),
    (1, 1, 1024),
    (1, 1, 4096),
    (8, 1, 1024),
    (64, 1, 1024),
    (64, 1, 4096),
    (1, 8, 1024),
    (1, 32, 1024),
    (1, 128, 1024),
    (1, 512, 1024),
    (1, 1024, 1024),
    (4, 256, 256),
]


def measure(layer: TesseraLatentAttention, batch: int, new: int, seen: int, mode: str, repeats: int) -> float:
    """Median milliseconds of one call."""
    config, device = layer.config, layer.o_proj.weight.device
    dtype = layer.o_proj.weight.dtype
    config.latent_attention_mode = mode
    past = seen - new
    x = torch.randn(batch, new, config.hidden_size, device=device, dtype=dtype)
    angles = torch.randn(1, new, config.qk_rope_head_dim // 2, device=device, dtype=dtype)
    latent = torch.randn(batch, 1, past, config.kv_lora_rank, device=device, dtype=dtype)
    k_rope = torch.randn(batch, 1, past, config.qk_rope_head_dim, device=device, dtype=dtype)
    mask = None
    if past and new > 1:
        mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(past)[None, None]
    times = []
    for i in range(repeats + 3):
        cache = None
        if past:
            cache = DynamicCache(config=config)
            cache.update(latent, k_rope, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        layer(x, (angles.cos(), angles.sin()), mask, past_key_values=cache)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    config = TesseraConfig.from_preset("bytegpt")
    config._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    layer = TesseraLatentAttention(config, 0).to(args.device, dtype).eval()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
    print(f"{'B':>3} {'new':>5} {'seen':>5} {'naive ms':>10} {'absorb ms':>10} {'auto':>7}  auto is faster")
    for batch, new, seen in SHAPES:
        naive = measure(layer, batch, new, seen, "naive", args.repeats)
        absorb = measure(layer, batch, new, seen, "absorb", args.repeats)
        config.latent_attention_mode = "auto"
        chosen = "absorb" if layer.absorbs(new, seen, None) else "naive"
        best = "absorb" if absorb < naive else "naive"
        ratio = max(naive, absorb) / min(naive, absorb)
        verdict = "yes" if chosen == best else f"no, by {ratio:.2f}x"
        print(f"{batch:3} {new:5} {seen:5} {naive:10.3f} {absorb:10.3f} {chosen:>7}  {verdict}")


if __name__ == "__main__":
    main()

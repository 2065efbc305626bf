"""One AdamW step: ours in every form of weights and moments against torch's fused one, same tensors.

    python benchmarks/adamw_step.py --device cuda [--layers 16]

Medians in milliseconds on the matrices of layers 2048 wide (16 of them: 1B parameters), in one process, with
the bytes that a step has to move and the rate at which it does.
"""

import argparse
import platform

import torch
from muon_step import ONE_BILLION, median_ms
from torch import nn

from tessera.training.optimizers import MuonAdamW

# What is read and written of each number, in bytes: weight, gradient, moments, remainder.
BYTES = {
    ("fp32", "fp32"): 28,
    ("bf16", "fp32"): 2 + 2 + 2 + 16,
    ("split", "fp32"): 2 + 2 + 2 + 16 + 4,
    ("bf16", "bf16"): 2 + 2 + 2 + 8,
    ("split", "bf16"): 2 + 2 + 2 + 8 + 4,
}


def parameters(layers: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Matrices with gradients."""
    shapes = ONE_BILLION[: 7 * layers]
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def main() -> None:
    """Prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, torch {torch.__version__}, {args.layers} layers")

    def report(what: str, step, size: int) -> None:
        ms = median_ms(step, args.device, args.repeats)
        print(f"{what}: {ms:.2f} ms, {size / ms / 1e9:.2f} TB/s", flush=True)

    params = parameters(args.layers, torch.float32, args.device)
    count = sum(p.numel() for p in params)
    report("torch fused fp32", torch.optim.AdamW(params, lr=1e-4, fused=True).step, 28 * count)
    for (weights, moments), size in BYTES.items():
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        params = parameters(args.layers, dtype, args.device)
        kept = torch.float32 if moments == "fp32" else torch.bfloat16
        ours = MuonAdamW([{"params": params, "lr": 1e-4}], weights, kept)
        report(f"tessera, weights {weights}, moments {moments}", ours.step, size * count)
    params = parameters(args.layers, torch.bfloat16, args.device)
    report("torch fused bf16", torch.optim.AdamW(params, lr=1e-4, fused=True).step, 14 * count)


if __name__ == "__main__":
    with torch.no_grad():
        main()

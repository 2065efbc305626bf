"""One Muon step: ours against torch.optim.Muon, on the matrices of a preset.

    python benchmarks/muon_step.py [--config bytes-demo] [--device cuda]

Both update the same matrices with the same gradients; medians in milliseconds, in one process.
"""

import argparse
import platform
import statistics
import time

import torch

from tessera import TesseraForCausalLM
from tessera.configs.resolve import resolve_config
from tessera.training.optimizers import build_optimizer


def median_step(optimizer: torch.optim.Optimizer, repeats: int) -> float:
    """Median milliseconds of `optimizer.step()`."""
    times = []
    for i in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="bytes-demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    model = TesseraForCausalLM(resolve_config(args.config)).to(args.device)
    ours = build_optimizer(model, "muon")
    ours.param_groups = [group for group in ours.param_groups if group["kind"] == "muon"]
    matrices = [p for group in ours.param_groups for p in group["params"] if p.ndim == 2]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    theirs = torch.optim.Muon(matrices, lr=0.02)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.config}")
    print(f"tessera: {median_step(ours, args.repeats):.2f} ms")
    print(f"torch.optim.Muon: {median_step(theirs, args.repeats):.2f} ms")


if __name__ == "__main__":
    main()

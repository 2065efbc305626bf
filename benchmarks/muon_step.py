"""One Muon step: ours against torch.optim.Muon and nanochat's, on the same matrices with the same gradients.

    python benchmarks/muon_step.py [--config bytes-demo] [--device cuda] [--nanochat optim.py]
    python benchmarks/muon_step.py --device cuda --shapes 12x768x3072 --nanochat nanochat/optim.py
    python benchmarks/muon_step.py --device cuda --shapes 1b

Medians in milliseconds, in one process. `1b` are the matrices of 16 layers 2048 wide. nanochat's file is
measured twice: its compiled update of a stack that lies ready, and its optimizer's whole step.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable

import torch
from torch import nn

from tessera.training.optimizers import MuonAdamW

ONE_BILLION = 16 * [
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (8192, 2048),
    (8192, 2048),
    (2048, 8192),
]


def median_ms(step: Callable[[], None], device: str, repeats: int) -> float:
    """Median milliseconds of a call, after three that warm up."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def matrices_of(args: argparse.Namespace) -> list[nn.Parameter]:
    """The matrices to update, with gradients."""
    if args.shapes is None:
        from tessera import TesseraForCausalLM
        from tessera.configs.resolve import resolve_config
        from tessera.training.optimizers import build_optimizer

        groups = build_optimizer(TesseraForCausalLM(resolve_config(args.config))).param_groups
        shapes = [
            p.shape for group in groups if group["kind"] == "muon" for p in group["params"] if p.ndim == 2
        ]
    elif args.shapes == "1b":
        shapes = ONE_BILLION
    else:
        shapes = []
        for text in args.shapes.split(","):
            count, *shape = map(int, text.split("x"))
            shapes += count * [tuple(shape)]
    params = [nn.Parameter(torch.randn(shape, device=args.device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def read_nanochat(path: str) -> types.ModuleType:
    """nanochat's optim.py without the rest of it."""
    common = types.ModuleType("nanochat.common")
    common.COMPUTE_DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    sys.modules.setdefault("nanochat", types.ModuleType("nanochat"))
    sys.modules["nanochat.common"] = common
    spec = importlib.util.spec_from_file_location("nanochat_optim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="bytes-demo")
    parser.add_argument("--shapes", help="NxROWSxCOLUMNS, several with commas, or 1b; instead of --config")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--nanochat", help="path of its optim.py")
    parser.add_argument("--features", nargs="*", help="Muon's features; default: all")
    args = parser.parse_args()
    params = matrices_of(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    what = args.shapes or args.config
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {what}")
    group = {"params": params, "kind": "muon", "lr": 1e-3, "weight_decay": 0.1}
    if args.features is not None:
        group["features"] = tuple(args.features)
    ours = MuonAdamW([group])
    print(f"tessera: {median_ms(ours.step, args.device, args.repeats):.3f} ms", flush=True)
    if args.nanochat:
        peer = read_nanochat(args.nanochat)
        groups = [
            {
                "params": [p for p in params if p.shape == shape],
                "kind": "muon",
                "lr": 1e-3,
                "weight_decay": 0.1,
            }
            | {"momentum": 0.95, "ns_steps": 5, "beta2": 0.9}
            for shape in sorted({p.shape for p in params})
        ]
        theirs = peer.MuonAdamW(groups)
        print(f"nanochat, whole step: {median_ms(theirs.step, args.device, args.repeats):.3f} ms", flush=True)
        if len(groups) == 1:
            weights, grads = torch.stack(list(params)), torch.stack([p.grad for p in params])
            count, rows, columns = weights.shape
            buffer = torch.zeros_like(weights)
            second = weights.new_zeros((count, rows, 1) if rows >= columns else (count, 1, columns))
            numbers = [torch.tensor(number) for number in (0.95, 1e-3, 0.1, 0.9)]
            along = -1 if rows >= columns else -2

            def fused() -> None:
                peer.muon_step_fused(grads.clone(), weights.data, buffer, second, *numbers, 5, along)

            print(f"nanochat, stacked: {median_ms(fused, args.device, args.repeats):.3f} ms", flush=True)
    theirs = torch.optim.Muon(params, lr=1e-3)
    print(f"torch.optim.Muon: {median_ms(theirs.step, args.device, args.repeats):.3f} ms")


if __name__ == "__main__":
    with torch.no_grad():
        main()

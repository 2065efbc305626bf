"""Head and cross entropy with their gradients: ours against the plain formula, compiled, in one process.

    python benchmarks/linear_cross_entropy.py [--softcap 15] [--z-loss 1e-4] [--tiny]

bf16 hidden states and weight, random; median milliseconds of forward and backward together, peak memory
beyond what was there before, with and without that of the two gradients themselves. The relative errors are
those of the gradients against the plain formula's in fp32, on the first rows where all would not fit.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from step_times import step_times

from tessera.modeling.loss import linear_cross_entropy

# Tokens, width, vocabulary.
SHAPES = [(65536, 768, 32768), (16384, 2048, 32768), (8192, 2048, 131072)]
TINY = [(64, 32, 256)]


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None, z_loss: float
) -> torch.Tensor:
    """The summed loss with all logits in memory."""
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss + z_loss * logits.logsumexp(-1).square().sum() if z_loss else loss


def milliseconds(call: Callable, repeats: int = 10) -> float:
    """Median over calls, after two."""
    call(), call()
    cuda = torch.cuda.is_available()
    return 1e3 * statistics.median(step_times(call, repeats if cuda else 1, cuda))


def extra_bytes(call: Callable) -> int:
    """Peak memory of a call beyond what is there before it."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Prints a row for each side of each shape, and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--z-loss", type=float, default=0.0)
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, soft-cap {args.softcap}, z-loss {args.z_loss}")
    for tokens, width, vocabulary in TINY if args.tiny else SHAPES:
        shape = f"{tokens}x{width}x{vocabulary}"
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        weight = (0.02 * torch.randn(vocabulary, width, device=device)).bfloat16().requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), device=device)
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=False)
        gradients = 2 * (hidden.numel() + weight.numel())
        few = min(tokens, 2**28 // vocabulary)
        exact = [x.detach().float().requires_grad_() for x in (hidden[:few], weight)]
        loss = plain(*exact, targets[:few], args.softcap, args.z_loss)
        wanted = torch.autograd.grad(loss, exact)
        del loss, exact

        def ours(h, w, y):
            return linear_cross_entropy(h, w, y, args.softcap, z_loss=args.z_loss)

        def whole(h, w, y, compiled=compiled):
            return compiled(h, w, y, args.softcap, args.z_loss)

        times = {}
        for side, loss_of in (("compiled plain", whole), ("tessera", ours)):

            def call(loss_of=loss_of, hidden=hidden, weight=weight, targets=targets):
                return torch.autograd.grad(loss_of(hidden, weight, targets), (hidden, weight))

            call()
            extra = extra_bytes(call)
            times[side] = milliseconds(call)
            part = hidden.detach()[:few].clone().requires_grad_()
            found = torch.autograd.grad(loss_of(part, weight, targets[:few]), (part, weight))
            errors = [((f.float() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]
            print(
                f"{shape} {side:15} {times[side]:8.2f} ms  extra {extra / 2**30:.3f} GiB, "
                f"{(extra - gradients) / 2**30:.3f} beyond the gradients  "
                f"errors {errors[0]:.1e} {errors[1]:.1e}",
                flush=True,
            )
            del found, part
        print(f"{shape} time: {times['tessera'] / times['compiled plain']:.3f}x")


if __name__ == "__main__":
    main()

"""What this machine reaches: matrix products, copies and attention, timed for a moment.

A sheet's peak is not reached by any program; utilisation is told, and plans are made, against what the card
does when it is asked. What belongs here: probes of a device that take well under a second each and are made
once in a process.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

# Large enough for the best rate that a card has, small enough for the card: 8192^3 in bf16 is 1.4 ms of an
# H200 and 0.4 GiB.
LARGEST_PRODUCT = 8192
CPU_PRODUCT = 1024
SHARE_OF_FREE_MEMORY = 0.1  # that a probe may take, beside a model that is in memory already


def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a large square matrix product, the ceiling that utilisation is measured against.

    Args:
        device: where; measured once in a process for each device and dtype.
        dtype: of the factors; fp32 products take what `torch.backends` allows them at this moment.

    Returns:
        Operations per second, a multiply-add being two; None where there is no such product or no memory for
        one.
    """
    device = torch.device(device)
    if device.type == "meta":
        return None
    allowed = torch.get_float32_matmul_precision() if dtype == torch.float32 else None
    return _measured_peak(_with_index(device), dtype, allowed)


@functools.lru_cache(maxsize=64)
def _measured_peak(device: torch.device, dtype: torch.dtype, _) -> float | None:
    size = LARGEST_PRODUCT if device.type == "cuda" else CPU_PRODUCT
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE_MEMORY
        while size > 256 and 3 * size * size * dtype.itemsize > free:
            size //= 2
    return product_rate(device, dtype, size, size, size)


@functools.lru_cache(maxsize=256)
def product_rate(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> float | None:
    """FLOP/s of [m, k] @ [k, n]; None where the device cannot do it."""
    try:
        left = torch.randn(m, k, device=device, dtype=dtype)
        right = torch.randn(n, k, device=device, dtype=dtype).t()
        out = torch.empty(m, n, device=device, dtype=dtype)
        with torch.no_grad():
            seconds = _time(lambda: torch.mm(left, right, out=out), device)
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * m * n * k / seconds


@functools.lru_cache(maxsize=64)
def copy_rate(device: torch.device, megabytes: int = 512) -> float | None:
    """Bytes per second that a copy reads and writes together."""
    try:
        source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = _time(lambda: target.copy_(source), device)
    except RuntimeError:
        return None
    return 2 * source.numel() / seconds


@functools.lru_cache(maxsize=64)
def attention_rate(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    value_dim: int | None = None,
) -> float | None:
    """FLOP/s of causal attention, forward and backward; what the mask hides is not counted, the scores that
    the backward pass computes again are not either."""
    value_dim = head_dim if value_dim is None else value_dim
    try:
        shape = (batch, length, heads)  # as a model has them: heads beside one another in a token
        query, key, value = (
            torch.randn(*shape, dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
            for dim in (head_dim, head_dim, value_dim)
        )
        gradient = torch.randn(*shape, value_dim, device=device, dtype=dtype).transpose(1, 2)

        def both():
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(out, (query, key, value), gradient)

        seconds = _time(both, device)
    except RuntimeError:
        return None
    forward = 2 * batch * heads * (head_dim + value_dim) * length * (length + 1) / 2
    return 3 * forward / seconds


def _time(call: Callable[[], object], device: torch.device, budget: float = 0.15) -> float:
    """Seconds of a call: the best of three rounds that take about `budget` seconds together."""
    cuda = device.type == "cuda"

    def rounds(count: int) -> float:
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                for _ in range(count):
                    call()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / count
        began = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "mps":
            torch.mps.synchronize()
        return (time.perf_counter() - began) / count

    rounds(1)  # plans, caches and clocks
    once = max(rounds(1), 1e-7)
    count = max(1, min(200, int(budget / 3 / once)))
    return min(rounds(count) for _ in range(3))


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

"""Times of steps, for the benchmarks beside this file."""

import time
from collections.abc import Callable

import torch


def step_times(step: Callable[[], object], steps: int, cuda: bool) -> list[float]:
    """Seconds of each step; on a GPU between events, so that the CPU runs ahead as it does in training."""
    if not cuda:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events[:-1], events[1:], strict=True)]

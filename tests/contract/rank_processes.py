"""Starts the processes of transformers' distributed tests, on this machine's CPUs and over gloo.

The repository of transformers has a module of these names, which its source distribution lacks;
`test_parallel.py` puts this one in its place. A function is called in every process with the rank first.
"""

import functools
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

PRELOADED = [
    "tessera.modeling.modeling_tessera",
    "transformers_tests.test_fsdp_mixin",
    "transformers_tests.test_tensor_parallel_mixin",
]
# A rank that fails leaves the others waiting: not for long.
PATIENCE = timedelta(seconds=120)


def run_distributed(world_size: int):
    """Turns a function of (rank, ...) into one of (...) that runs in `world_size` joined processes.

    Raises:
        ProcessRaisedException: what the function raised in the first process that failed.
    """

    def decorate(function):
        @functools.wraps(function)
        def start(*args, **kwargs):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_joined, args=(world_size, port, function, args, kwargs), nprocs=world_size)

        return start

    return decorate


def _joined(rank: int, world_size: int, port: int, function, args: tuple, kwargs: dict) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def _start_rank_processes(function, args: tuple = (), nprocs: int = 1) -> None:
    # One server imports everything once, and the ranks are forked off it: a second instead of ten.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing: a CPU needs no choosing."""

"""One of two processes that train a mixture of experts on halves of a batch; started by test_balancing.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling.test_balancing import biases, live_model, tokens, train_on  # noqa: E402


def main(kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    alone, together = live_model(), live_model()
    if kind == "ddp":
        wrapped = DistributedDataParallel(together)
    else:
        for layer in together.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(together)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (alone, wrapped)]
    for step in range(3):
        rows = tokens(8, seed=step)
        mine = rows[4 * rank : 4 * rank + 4]
        train_on(wrapped, optimizers[1], [{"input_ids": mine[:2]}, {"input_ids": mine[2:]}])
        with_process_group_hidden(lambda rows=rows: train_on(alone, optimizers[0], [{"input_ids": rows}]))
        # The weights differ by the accumulation; only the biases are compared.
        with torch.no_grad():
            full = {
                name: p.full_tensor() if hasattr(p, "full_tensor") else p
                for name, p in together.named_parameters()
            }
            for name, p in alone.named_parameters():
                p.copy_(full[name])
        assert torch.equal(biases(together), biases(alone)), (step, biases(together), biases(alone))
    print("equal", flush=True)
    dist.destroy_process_group()


def with_process_group_hidden(run) -> None:
    """Trains as a process that has no others."""
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        run()
    finally:
        dist.is_initialized = initialized


main(sys.argv[1])

"""One of several processes that update a model with given gradients; started by test_shared_updates.py.

    torchrun optimizer_ranks.py LAYOUT KIND WEIGHTS FROM STEPS TO

LAYOUT is `alone`, `ddp` or `fsdp2`, WEIGHTS how they are kept. FROM and TO are safetensors with weights and
the optimizer's state; a run that starts anew gives `-` for FROM. Prints how many numbers of momentum each
process holds.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.models import tiny_model  # noqa: E402
from tessera.training.optimizers import build_optimizer  # noqa: E402
from tessera.training.optimizers.matrix_batches import local  # noqa: E402
from tessera.training.optimizers.state import gather_state, restore_state  # noqa: E402


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """The same on every process, whole."""
    seed = sum(map(ord, name)) + 1000 * step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(layout: str, kind: str, weights: str, source: str, steps: int, target: str) -> str:
    model = tiny_model("moe-qknorm-softcap").train()
    optimizer = build_optimizer(model, kind, weight_decay=0.1, weights=weights, seed=7)
    saved = {} if source == "-" else load_file(source)
    first = int(saved.pop("step", 0))
    if saved:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(saved.pop(f"weight/{name}"))
    if layout == "ddp":
        DistributedDataParallel(model)
    elif layout == "fsdp2":
        names = {p: name for name, p in model.named_parameters()}
        order = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        params = dict(model.named_parameters())
        for group, own in zip(optimizer.param_groups, order, strict=True):
            group["params"] = [params[name] for name in own]
    if saved:
        restore_state(model, optimizer, saved, Path(source))
    for step in range(first, first + steps):
        for name, p in model.named_parameters():
            grad = gradient(name, p.shape, step).to(p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.step()
    result = gather_state(model, optimizer)
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        result[f"weight/{name}"] = whole.detach().clone()
        if layout == "ddp":
            others = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
            dist.all_gather(others, whole.detach())
            assert all(torch.equal(one, whole) for one in others), name
    result["step"] = torch.tensor(first + steps)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(result, target)
    held = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return f"momentum {sum(local(buffer).numel() for buffer in held)}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    layout, kind, weights, source, steps, target = sys.argv[1:]
    dist.init_process_group("gloo")
    print(run(layout, kind, weights, source, int(steps), target), flush=True)
    dist.destroy_process_group()

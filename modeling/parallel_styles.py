"""What tensor parallelism lacks: a style for a weight that all heads share, and packed tensors made whole.

Importing this file registers the style under `HEAD_NORM`, the name that `parallel_plans.py` uses.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .parallel_plans import HEAD_NORM


class HeadNormParallel(TensorParallelLayer):
    """Every rank has the whole weight and sees its own heads, so the ranks' gradients are added up.

    The library's `replicated_with_grad_allreduce` adds up what has accumulated: of two micro-batches, the
    first counts once for each rank. Here each gradient is added up before it joins the others.
    """

    def install_forward(self, module: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
        """Adds up the gradients of the module's own parameters over the mesh."""
        forward, hooked = module.forward, {}

        def forward_with_hooks(*args, **kwargs):
            # The loaded weights replace the parameters after this, so the hooks are set with the first call.
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and hooked.get(name) is not parameter:
                    parameter.register_hook(lambda gradient: _sum_over(mesh, gradient))
                    hooked[name] = parameter
            return forward(*args, **kwargs)

        module.forward = forward_with_hooks
        return module


def gather_whole(tensor: DTensor) -> torch.Tensor:
    """The whole tensor from the ranks' parts; every rank calls it.

    torch 2.11 can split a tensor that packs several along one dimension (gate and up), each shared by the
    ranks, and cannot put it together again; here the parts of each are.

    Raises:
        ValueError: torch's own, for anything else that it cannot put together.
    """
    try:
        return tensor.full_tensor()
    except ValueError:
        placement = tensor.placements[0]
        if len(tensor.placements) > 1 or not hasattr(placement, "split_factor"):
            raise
        local, mesh = tensor.to_local().contiguous(), tensor.device_mesh
        parts = [torch.empty_like(local) for _ in range(mesh.size())]
        dist.all_gather(parts, local, group=mesh.get_group())
        packed = zip(*(part.chunk(placement.split_factor, placement.dim) for part in parts), strict=True)
        return torch.cat([part for each in packed for part in each], placement.dim)


def _sum_over(mesh: dist.DeviceMesh, gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total


ALL_PARALLEL_STYLES.register(HEAD_NORM, HeadNormParallel())

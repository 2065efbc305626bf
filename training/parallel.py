"""How a run is spread over processes: data (DDP), its weights (FSDP2, HSDP), tensors and experts.

DDP and FSDP2 are torch's own, put around the model here, so that one path serves GPUs and CPUs (Accelerate
refuses FSDP2 on a CPU). Tensor and expert parallelism are transformers' engine, which splits a model while it
is loaded; see docs/distributed.md. What belongs here: which process has which rows and which part of the
model, and whole tensors from the parts. What cannot be combined is refused before anything is built.
"""

import contextlib
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tessera.modeling.feed_forward import TesseraRouter
from tessera.modeling.modeling_tessera import TesseraForCausalLM
from tessera.modeling.parallel_plans import is_split
from tessera.modeling.parallel_styles import gather_whole

PARALLEL = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Layout:
    """Who has what.

    Attributes:
        kind: "ddp", "fsdp" or "hsdp".
        processes: all of them.
        shard_size: processes that share the weights of one copy.
        tensor: processes that share a layer's tensors, and see the same rows.
        expert: processes that share the experts.
        rank: of this process.
    """

    kind: str = "ddp"
    processes: int = 1
    shard_size: int = 1
    tensor: int = 1
    expert: int = 1
    rank: int = 0

    @property
    def data_size(self) -> int:
        """Processes, or groups of them, with rows of their own."""
        return self.processes // self.tensor

    @property
    def data_rank(self) -> int:
        """Which of them this process is in; tensors are split over neighbours."""
        return self.rank // self.tensor

    @property
    def groups(self) -> tuple[int, int] | None:
        """For who scores a text: `data_rank` and `data_size` of a model that is split, else None."""
        return (self.data_rank, self.data_size) if self.sharded else None

    @property
    def replicas(self) -> int:
        """Processes that report the same loss."""
        return self.tensor

    @property
    def by_engine(self) -> bool:
        """Whether transformers splits the model while it is loaded."""
        return self.tensor > 1 or self.expert > 1

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.by_engine or self.shard_size > 1

    @property
    def may_fail_alone(self) -> bool:
        """Whether a process whose forward pass failed can still join the others' gradients.

        With split weights the others wait for it inside of the model.
        """
        return self.processes > 1 and not self.sharded

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        parts = [f"{self.processes} processes"]
        if self.tensor > 1:
            parts.append(f"tensors over {self.tensor}")
        if self.expert > 1:
            parts.append(f"experts over {self.expert}")
        if self.shard_size > 1:
            copies = self.data_size // self.shard_size
            parts.append(f"weights over {self.shard_size} (FSDP2)" + (f", {copies} copies" * (copies > 1)))
        elif self.data_size > 1:
            parts.append(f"data over {self.data_size} (DDP)")
        return ", ".join(parts)


def choose_layout(args, processes: int, rank: int) -> Layout:
    """What the arguments of a run come to on so many processes.

    Args:
        args: with `parallel`, `shard_size`, `tensor_parallel`, `expert_parallel`, `context_parallel`.
        processes: of the launch.
        rank: of this process.

    Raises:
        ValueError: for what does not exist, does not divide, or cannot be combined.
    """
    kind, tensor, expert = args.parallel, args.tensor_parallel, args.expert_parallel
    if kind not in PARALLEL:
        raise ValueError(f"parallel must be 'ddp', 'fsdp' or 'hsdp', got '{kind}'")
    for name in ("tensor_parallel", "expert_parallel", "context_parallel"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.context_parallel > 1:
        raise ValueError(
            f"context_parallel={args.context_parallel}: attention over split rows is not there for models "
            "with windows, documents or latent attention; take shorter rows, or gradient_checkpointing"
        )
    if processes % tensor:
        raise ValueError(
            f"tensor_parallel={tensor} does not divide the {processes} process(es) of this launch; start "
            f"{tensor} or a multiple of them with torchrun or accelerate launch"
        )
    data = processes // tensor
    if expert > 1 and (processes % expert or expert % tensor):
        raise ValueError(
            f"expert_parallel={expert} must divide the {processes} process(es) of this launch and be a "
            f"multiple of tensor_parallel={tensor}"
        )
    if args.shard_size is not None and kind != "hsdp":
        raise ValueError(
            f"shard_size={args.shard_size} is for parallel=hsdp, got parallel={kind}; fsdp shards over all "
            "processes"
        )
    if kind == "ddp":
        if (tensor > 1 or expert > 1) and data > 1:
            raise ValueError(
                f"{'tensor' if tensor > 1 else 'expert'}_parallel beside data parallelism is parallel=fsdp, "
                f"got parallel=ddp on {processes} processes"
            )
        shard = 1
    elif kind == "fsdp":
        shard = data
    else:
        shard = args.shard_size
        if shard is None:
            raise ValueError(
                "parallel=hsdp needs shard_size, the processes that share one copy of the weights: those of "
                "a machine"
            )
        if shard < 1 or data % shard:
            raise ValueError(
                f"shard_size={shard} does not divide the {data} processes with rows of their own"
            )
        if tensor > 1 or expert > 1:
            raise ValueError("parallel=hsdp cannot be combined with tensor or expert parallelism; take fsdp")
    return Layout(kind, processes, shard, tensor, expert, rank)


def split_by_engine(
    build: Callable[[], TesseraForCausalLM], load: Callable[..., TesseraForCausalLM], layout: Layout
) -> TesseraForCausalLM:
    """A model that transformers' engine splits over processes while it is loaded.

    It splits what lies on a disk, so the first process writes the model out whole, once.

    Args:
        build: makes the model as one process would have it.
        load: loads it from a directory, given a `distributed_config`.
        layout: of the run.
    """
    from transformers.distributed import DistributedConfig

    sizes = {"tp_size": layout.tensor, "fsdp_size": layout.shard_size, "ep_size": layout.expert}
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        if layout.expert > 1:
            raise ValueError(
                "expert_parallel needs transformers 5.21 or newer (pip install 'transformers>=5.21')"
            )
        del sizes["ep_size"]
    folder = [tempfile.mkdtemp(prefix="tessera-whole-") if layout.rank == 0 else None]
    dist.broadcast_object_list(folder)
    if layout.rank == 0:
        build().save_pretrained(folder[0])
    dist.barrier()
    try:
        return load(Path(folder[0]), distributed_config=DistributedConfig(**sizes))
    finally:
        dist.barrier()
        if layout.rank == 0:
            for file in Path(folder[0]).iterdir():
                file.unlink()
            Path(folder[0]).rmdir()


def shard(model: TesseraForCausalLM, layout: Layout, device: torch.device, bf16: bool) -> None:
    """Splits the weights in place: each layer, the embedding, then the rest with the last norm and the head.

    What is the root's own is whole while the model runs, so the loss can use the head's weight and need not
    write out the logits; see `is_plain_linear`. So it is with a tied embedding.

    Args:
        model: on `device`.
        layout: with `shard_size` > 1.
        device: of the mesh.
        bf16: products are bf16 and weights fp32, so that gathered weights are bf16 already; but routers'.
    """
    if layout.shard_size == layout.data_size:
        mesh = dist.init_device_mesh(device.type, (layout.shard_size,), mesh_dim_names=("shard",))
    else:
        copies = layout.data_size // layout.shard_size
        mesh = dist.init_device_mesh(
            device.type, (copies, layout.shard_size), mesh_dim_names=("replicate", "shard")
        )
    plain = MixedPrecisionPolicy()
    policy = plain
    if bf16:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    base, head = model.base_model, model.get_output_embeddings()
    for layer in base.layers:
        if bf16:
            for router in layer.modules():
                if isinstance(router, TesseraRouter):
                    fully_shard(router, mesh=mesh, mp_policy=plain)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if head.weight is not base.embed_tokens.weight:
        fully_shard(base.embed_tokens, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def wrap(model: nn.Module, layout: Layout, device: torch.device) -> nn.Module:
    """The model as it is trained: averaging gradients over the processes, where they are not split."""
    if layout.sharded or layout.processes == 1:
        return model
    # Buffers follow from the rows of all processes, or are constant; torch 2.13 has another word for that.
    known = inspect.signature(DistributedDataParallel).parameters
    leave = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{leave: False},
    )


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool):
    """The context of a micro-batch: processes exchange gradients with the last one of a step only."""
    inner = model
    while not isinstance(inner, (FSDPModule, DistributedDataParallel)):
        if not hasattr(inner, "_orig_mod"):
            break
        inner = inner._orig_mod
    if isinstance(inner, DistributedDataParallel) and not last:
        with inner.no_sync():
            yield
        return
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(last)
    yield


def whole_state_dict(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """A model's tensors, whole and on the CPU, whatever the processes hold of them; all processes call it.

    Args:
        model: unwrapped.
        keep: whether this process wants them; where not, it takes part and gets nothing.
    """
    state = {}
    for name, value in model.state_dict().items():
        whole = gather_whole(value) if is_split(value) else value
        if keep:
            state[name] = whole.detach().cpu()
    return state


def save_whole(model: nn.Module, folder: Path, writes: bool) -> None:
    """Writes a model as one directory, whatever the processes hold of it; all processes call it.

    Args:
        model: unwrapped.
        folder: to write to.
        writes: whether this process is the one that writes.
    """
    if getattr(model.config, "distributed_config", None) is not None:
        model.save_pretrained(folder)  # the engine gathers, and the first process writes
    elif any(is_split(p) for p in model.parameters()):
        state = whole_state_dict(model, keep=writes)
        if writes:
            # Gathered, two names of one tensor share nothing any more.
            for name in model.all_tied_weights_keys:
                state.pop(name, None)
            model.save_pretrained(folder, state_dict=state)
    elif writes:
        model.save_pretrained(folder)


@torch.no_grad()
def load_whole_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Gives a model the tensors that `whole_state_dict` returned, of which each process takes its part."""
    if not any(is_split(p) for p in model.parameters()):
        model.load_state_dict(state)
        return
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process; waits for all."""
    if accelerator.num_processes == 1:
        return flag
    shared = torch.tensor(float(flag), device=accelerator.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())

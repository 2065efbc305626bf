"""Which matrices are orthogonalised together, and on which process.

What belongs here: where a parameter lies, who its owner is, and how matrices and updates travel. All
processes make the same batches in the same order. A batch lies in one of four ways:

- "here": whole matrices that this process updates by itself; on one process all of them, and under FSDP2
  stacked experts, of which each process has its own.
- "copies" (DDP): every process has the matrices and their gradients. Each orthogonalises its share, the
  momentum of which nobody else has, and the updates are shared.
- "rows" (FSDP2): every process has some rows. Those of a matrix travel to its owner and the rows of the
  update back; momentum stays with the rows.
- "scattered" (tensor parallelism): put together and orthogonalised on every process.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from . import muon

AT_ONCE = 16  # matrices in one program: more cost only time to compile
NUMBERS_AT_ONCE = 2**28  # and workspace: half a GiB in bf16


@dataclass
class Batch:
    """Parameters of one shape, their layout, and for each its owner's rank in `process_group`; `stacks` are
    tensors of which the states of the parameters are views."""

    params: list[nn.Parameter]
    group: dict
    layout: str
    process_group: dist.ProcessGroup | None = None
    owners: list[int] = field(default_factory=list)
    stacks: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This process among those that share the batch."""
        return 0 if self.process_group is None else dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        """Processes that share the batch."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    @property
    def shape(self) -> torch.Size:
        """Of each parameter, on this process where they lie here and whole otherwise."""
        return local(self.params[0]).shape if self.layout == "here" else self.params[0].shape

    @property
    def mine(self) -> list[int]:
        """Places of the parameters that this process orthogonalises."""
        if self.layout in ("here", "scattered"):
            return list(range(len(self.params)))
        return [i for i, owner in enumerate(self.owners) if owner == self.rank]

    def rows_of(self, rank: int) -> slice:
        """The rows that a process has of each matrix, as torch splits them."""
        rows = self.params[0].shape[0]
        chunk = -(-rows // self.size)
        return slice(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def split_like_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Cuts gradients that every process has whole as their weights are cut.

    That of a split embedding is one: autograd leaves it as the lookup's backward made it, and the
    rows of a part would take the gradients of the first rows.
    """
    for p in parameters:
        if isinstance(p, DTensor) and p.grad is not None and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


def first_of(p: torch.Tensor) -> int:
    """Place in the flat whole tensor of the first number that this process has, as a signed 32-bit number; 0
    where a part is not made of whole rows."""
    if not isinstance(p, DTensor) or not (dims := _row_dims(p)):
        return 0
    chunk = -(-p.shape[0] // p.device_mesh.size(dims[0]))
    row = min(p.device_mesh.get_local_rank(dims[0]) * chunk, p.shape[0])
    return (row * p.shape[1:].numel() + 2**31) % 2**32 - 2**31


def _row_dims(p: DTensor) -> list[int] | None:
    """Mesh dimensions along which the first dimension of a tensor is split; None if anything else is."""
    dims = []
    for i, placement in enumerate(p.placements):
        if type(placement) is Shard and placement.dim == 0:
            dims.append(i)
        elif not isinstance(placement, Replicate):
            return None
    return dims if len(dims) <= 1 else None


def make_batches(groups: list[dict]) -> list[Batch]:
    """Batches of all groups of kind "muon". Every process calls it with parameters in the same order."""
    shared = _same_on_all_processes([p for group in groups for p in group["params"]])
    sorted_out = defaultdict(list)
    for number, group in enumerate(groups):
        for p in group["params"]:
            layout, process_group = _layout(p, p in shared)
            sorted_out[number, layout, process_group, p.shape, p.dtype, p.device].append(p)
    loads: dict[dist.ProcessGroup, list[int]] = {}
    batches = []
    for (number, layout, process_group, shape, *_), params in sorted_out.items():
        size = 1 if process_group is None else dist.get_world_size(process_group)
        most = max(1, min(AT_ONCE, NUMBERS_AT_ONCE // max(shape.numel(), 1))) * size
        count = -(-len(params) // most)
        for i in range(count):
            some = params[len(params) * i // count : len(params) * (i + 1) // count]
            batch = Batch(some, groups[number], layout, process_group)
            if process_group is not None:
                load = loads.setdefault(process_group, [0] * size)
                cost = shape[:-2].numel() * muon.flops(*shape[-2:])
                for _ in some:
                    batch.owners.append(min(range(size), key=load.__getitem__))
                    load[batch.owners[-1]] += cost
            batches.append(batch)
    return batches


def _layout(p: nn.Parameter, shared: bool) -> tuple[str, dist.ProcessGroup | None]:
    if not isinstance(p, DTensor):
        return ("copies", dist.group.WORLD) if shared else ("here", None)
    dims = _row_dims(p)
    if dims is not None and (p.ndim > 2 or not dims):
        return "here", None
    if dims and p.device_mesh.size(dims[0]) == 1:
        return "here", None
    return ("rows", p.device_mesh.get_group(dims[0])) if dims else ("scattered", None)


def _same_on_all_processes(params: list[nn.Parameter]) -> set[nn.Parameter]:
    """Plain parameters of which every process has a copy. Where they differ, as experts that are spread over
    processes do, each looks after its own."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return set()
    plain = [p for p in params if not isinstance(p, DTensor)]
    mine = [(tuple(p.shape), float(p.detach().double().sum())) for p in plain]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if any(len(theirs) != len(mine) for theirs in everyone):
        return set()
    return {p for i, p in enumerate(plain) if all(theirs[i] == mine[i] for theirs in everyone)}


class RowsOnTheWay:
    """Rows that travel to the owners of their matrices: started when made."""

    def __init__(self, batch: Batch, parts: list[torch.Tensor]):
        self.batch, size = batch, batch.size
        self.columns, counts = parts[0].shape[1], [batch.owners.count(rank) for rank in range(size)]
        rows = [batch.rows_of(rank) for rank in range(size)]
        self.rows = [part.stop - part.start for part in rows]
        mine = parts[0].shape[0] * self.columns
        order = sorted(range(len(parts)), key=batch.owners.__getitem__)
        sent = torch.cat([parts[i].reshape(-1) for i in order])
        self.given = [count * mine for count in counts]
        self.taken = [counts[batch.rank] * each * self.columns for each in self.rows]
        self.received = sent.new_empty(sum(self.taken))
        self.sent = sent  # alive until it has arrived
        self.work = dist.all_to_all_single(
            self.received, sent, self.taken, self.given, group=batch.process_group, async_op=True
        )

    def matrices(self) -> torch.Tensor:
        """Those that this process owns, whole: [k, m, n]."""
        self.work.wait()
        pieces = self.received.split(self.taken)
        return torch.cat(
            [
                piece.view(-1, rows, self.columns)
                for piece, rows in zip(pieces, self.rows, strict=True)
                if rows
            ],
            1,
        )

    def send_back(self, updates: torch.Tensor) -> None:
        """Starts the rows of updates [k, m, n] on their way to where they belong."""
        self.sent = torch.cat([piece.reshape(-1) for piece in updates.split(self.rows, dim=1)])
        self.received = updates.new_empty(sum(self.given))
        self.work = dist.all_to_all_single(
            self.received, self.sent, self.given, self.taken, group=self.batch.process_group, async_op=True
        )

    def updates(self) -> list[torch.Tensor]:
        """This process's rows of the update of each parameter."""
        self.work.wait()
        owners = self.batch.owners
        order = sorted(range(len(owners)), key=owners.__getitem__)
        pieces = self.received.view(len(owners), -1, self.columns).unbind(0)
        placed = dict(zip(order, pieces, strict=True))
        return [placed[i] for i in range(len(owners))]


class CopiesOnTheWay:
    """Updates that their owners share with all: started when made."""

    def __init__(self, batch: Batch, updates: torch.Tensor | None, like: torch.Tensor):
        self.batch = batch
        most = max(batch.owners.count(rank) for rank in range(batch.size))
        sent = like.new_zeros(most, *batch.shape)
        if updates is not None:
            sent[: len(updates)] = updates
        self.sent, self.received = sent, like.new_empty(batch.size * most, *batch.shape)
        self.most = most
        # Its name from torch 2.13 on.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self.work = gather(self.received, sent, group=batch.process_group, async_op=True)

    def updates(self) -> list[torch.Tensor]:
        """The update of each parameter."""
        self.work.wait()
        taken, result = [0] * self.batch.size, []
        for owner in self.batch.owners:
            result.append(self.received[owner * self.most + taken[owner]])
            taken[owner] += 1
        return result


def part_of(whole: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is split as `p` is; nothing travels."""
    if not isinstance(p, DTensor):
        return whole
    split = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    return split._local_tensor

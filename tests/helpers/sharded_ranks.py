"""Runs in each of several processes: native checkpoints loaded split, beside the models in one piece.

    torchrun sharded_ranks.py REPORT KIND,NATIVE,WHOLE ...

The report has for each what was found, of all ranks: differences of logits, whether generation is equal, and
bytes that were read from the files, held, and in the whole model.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

from tessera.conversion.sharded_loading import load_sharded
from tessera.conversion.slices import StoredSlice
from tessera.modeling.loading import load_model


def distributed_config(kind: str) -> DistributedConfig | None:
    """Tensors over all processes is what `load_sharded` does by itself."""
    if kind == "tensor":
        return None
    if kind == "data":
        return DistributedConfig(fsdp_size=2)
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        return DistributedConfig(tp_size=2, ep_size=2)
    return DistributedConfig(tp_size=2, enable_expert_parallel=True)


@torch.no_grad()
def compare(kind: str, native: str, whole: str, read: list[int]) -> dict:
    """What this process finds."""
    read.clear()
    split = load_sharded(native, distributed_config(kind), dtype=torch.float32)
    bytes_read = sum(read)
    held = sum(local(parameter).nbytes for parameter in split.parameters())
    model = load_model(whole, dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    difference = float((split(ids).logits - model(ids).logits).abs().max())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    same = torch.equal(split.generate(ids[:, :6], **options), model.generate(ids[:, :6], **options))
    return {
        "difference": difference,
        "same_text": same,
        "read": bytes_read,
        "held": held,
        "whole": sum(parameter.nbytes for parameter in model.parameters()),
    }


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def main(report: str, *cases: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    read, original = [], StoredSlice.read

    def counted(self, ranges):
        tensor = original(self, ranges)
        read.append(tensor.nbytes)
        return tensor

    StoredSlice.read = counted
    found = {case: compare(*case.split(","), read) for case in cases}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        together = {case: [rank[case] for rank in gathered] for case in cases}
        Path(report).write_text(json.dumps(together))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

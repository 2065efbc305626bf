"""What each of several processes does to compare a model that is split over them with one that is not.

Started by torchrun: `ranks.py <kind> <report> <folder> <model> ...`. The report (JSON, of rank 0) has for
each model and claim what went wrong, or null. On CPUs the processes talk through gloo, on GPUs through NCCL.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.distributed import DistributedConfig

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.modeling.parallel_styles import gather_whole

SIZES = {
    "tensor": {"tp_size": 2, "tp_plan": "auto"},
    "data": {"fsdp_size": 2},
    "expert": {"tp_size": 2, "ep_size": 2},
    "expert-data": {"fsdp_size": 2, "ep_size": 2},
    "pipeline": {"pp_size": 2},
}
# What each rank keeps whole under tensor parallelism; all else is split.
WHOLE = (
    "norm",
    "kv_a_proj_with_mqa",
    "q_a_proj",
    "mlp.gate.",
    "embed_positions",
    "smear",
    "_scale",
    "eh_proj",
)
WHOLE_BIASES = ("o_proj.bias", "down_proj.bias")


def distributed_config(kind: str) -> DistributedConfig:
    """The library's configuration of a kind; before 5.21 experts were split by a switch."""
    sizes = dict(SIZES[kind])
    if "ep_size" in sizes and "ep_size" not in DistributedConfig.__dataclass_fields__:
        sizes = {"tp_size": 2, "enable_expert_parallel": True}
    return DistributedConfig(**sizes)


class Comparison:
    """One model directory, loaded whole and split; each claim is a method that raises where it is wrong."""

    def __init__(self, kind: str, path: Path, device: torch.device):
        self.kind, self.path, self.device, self.rank = kind, path, device, dist.get_rank()
        # Layers that predict ahead are left behind on loading, unless they are to be trained.
        ahead = TesseraConfig.from_pretrained(path).num_mtp_layers
        # On a GPU flex attention would compile for each model in each process; it has tests of its own.
        attention = "eager" if device.type == "cuda" else None
        load = functools.partial(
            TesseraForCausalLM.from_pretrained, path, train_mtp=bool(ahead), attn_implementation=attention
        )
        self.whole = load().to(device)
        if kind == "accelerate":
            self.split = prepared_by_accelerate(load(), device)
        else:
            self.split = load(distributed_config=distributed_config(kind))
        self.by_batch = "data" in kind or kind == "accelerate"  # ranks see different rows
        # Before any forward pass: FSDP leaves the weights that it gathered for the last one where it ended.
        # One parameter at a time: under tensor parallelism some are DTensors and some are not.
        self.optimizers = [
            torch.optim.SGD(model.parameters(), 0.1, foreach=False) for model in (self.whole, self.split)
        ]
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.whole.config.vocab_size
        self.ids = torch.randint(0, vocabulary, (4, 24), generator=generator).to(device)
        self.padding = torch.ones_like(self.ids)
        self.padding[0, :3] = self.padding[2, :5] = 0

    def claims(self) -> list:
        if self.kind == "pipeline":
            return [self.holds_its_layers, self.logits, self.generation]
        if self.kind == "accelerate":
            return [self.is_wrapped_unit_by_unit, self.holds_its_part, self.logits, self.training]
        return [self.holds_its_part, self.logits, self.generation, self.saved_bytes, self.training]

    def is_wrapped_unit_by_unit(self) -> None:
        """Each layer by itself, and the last norm with what else is used last."""
        own = {name for name, module in self.split.named_modules() if isinstance(module, FSDPModule)}
        layers = {f"model.layers.{i}" for i in range(len(self.whole.model.layers))}
        assert own == {"", "model.embed_tokens", "model.norm", "lm_head", *layers}, own

    def holds_its_layers(self) -> None:
        every, own = dict(self.whole.named_parameters()), dict(self.split.named_parameters())
        middle = self.whole.config.num_hidden_layers // 2
        for name, parameter in every.items():
            if ".layers." in name:
                mine = (int(name.split(".")[2]) >= middle) == bool(self.rank)
                assert (name in own) == mine, name
            if name in own:
                assert torch.equal(own[name], parameter), name

    def holds_its_part(self) -> None:
        for name, parameter in self.split.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if self._is_split(name, parameter):
                dim = max(range(parameter.ndim), key=lambda d: parameter.shape[d] - local.shape[d])
                size = parameter.shape[dim]
                part = (size + 1) // 2 if self.rank == 0 else size - (size + 1) // 2
                expected = (*parameter.shape[:dim], part, *parameter.shape[dim + 1 :])
                assert local.shape == expected, (name, tuple(local.shape), tuple(parameter.shape))
            else:
                assert local.numel() == parameter.numel(), name

    def _is_split(self, name: str, parameter: torch.Tensor) -> bool:
        if self.by_batch:
            return True
        if self.kind == "expert" and "ep_size" not in DistributedConfig.__dataclass_fields__:
            return ".experts." in name
        return not any(part in name for part in WHOLE) and not name.endswith(WHOLE_BIASES)

    @torch.no_grad()
    def logits(self) -> None:
        if self.kind == "tensor" and self.whole.config.latent_attention_mode == "absorb":
            assert self.split.model.layers[0].self_attn.absorbs(1, 9, None)
        for padding in (None, self.padding):
            for ids in (self.ids, self.ids[:, :9]):
                padding = padding if padding is None else padding[:, : ids.shape[1]]
                expected = self.whole(ids, attention_mask=padding).logits
                got = self.split(ids, attention_mask=padding).logits
                seen = slice(None) if padding is None else padding.bool()
                close(got[seen], expected[seen])

    @torch.no_grad()
    def generation(self) -> None:
        prompt, padding = self.ids[:2, :8], self.padding[:2, :8]
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        # Not compiled: that takes minutes for all models, and the split ones never are.
        static = {"cache_implementation": "static", "disable_compile": True}
        for extra in ({}, {"attention_mask": padding}, static):
            expected = self.whole.generate(prompt, **options, **extra)
            got = self.split.generate(prompt, **options, **extra)
            assert torch.equal(got, expected), (extra.keys(), got.tolist(), expected.tolist())
        assert compiles_on_its_own(self.whole) and not compiles_on_its_own(self.split)

    def saved_bytes(self) -> None:
        target = self.path / "saved"
        self.split.save_pretrained(target / "split")
        if self.rank == 0:
            self.whole.save_pretrained(target / "whole")
            whole, split = digests(target / "whole"), digests(target / "split")
            assert whole == split, (whole, split)

    def training(self) -> None:
        """Loss and gradients of two micro-batches together, and the logits of the weights a step later."""
        self.whole.train()
        self.split.train()
        for rows, padding in ((slice(0, 2), None), (slice(2, 4), self.padding[2:4])):
            ids = self.ids[rows]
            labels = ids.clone()
            if padding is not None:
                # What a padding token predicts is nobody's business.
                labels[:, 1:] = labels[:, 1:].masked_fill(padding[:, :-1] == 0, -100)
            arguments = [{"input_ids": ids, "labels": labels, "attention_mask": padding}]
            if self.by_batch:
                arguments = [
                    {k: None if v is None else v[r : r + 1] for k, v in arguments[0].items()}
                    for r in range(dist.get_world_size())
                ]
            loss = self.split(**arguments[self.rank if self.by_batch else 0]).loss
            loss.backward()
            losses = [self.whole(**each).loss for each in arguments]
            close(loss, losses[self.rank if self.by_batch else 0])
            (sum(losses) / len(losses)).backward()
        wrong = []
        whole = dict(self.whole.named_parameters())
        for name, parameter in self.split.named_parameters():
            got, expected = gathered(parameter.grad), whole[name].grad
            try:
                close(got, expected)
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
        assert not wrong, "\n".join(wrong)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            close(self.split(self.ids).logits, self.whole(self.ids).logits)


def compiles_on_its_own(model: torch.nn.Module) -> bool:
    """Whether `generate` with a static cache would compile the model, were it on a GPU."""
    config = GenerationConfig(compile_config=CompileConfig())
    config.compile_config._compile_all_devices = True
    cache = StaticCache(model.config, max_cache_len=8)
    return model._valid_auto_compile_criteria({"past_key_values": cache}, config)


def prepared_by_accelerate(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A model as Accelerate's FSDP2 wraps it; the Accelerator itself refuses FSDP2 on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)),
        torch_device_mesh=mesh,
        device=device,
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
    )
    return fsdp2_prepare_model(accelerator, model.to(device))


def gathered(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return gather_whole(tensor) if isinstance(tensor, DTensor) else tensor


def close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal in fp32 up to 1e-4 of the largest number."""
    assert (got is None) == (expected is None), (got, expected)
    if expected is not None:
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-4 * scale)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def main(kind: str, report: str, folder: str, *models: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # A rank that fails leaves the others waiting: not for long.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    results = {}
    for model in models:
        results[model] = {}
        comparison = None
        with claim(results[model], "loads"):
            comparison = Comparison(kind, Path(folder) / model, device)
        for check in [] if comparison is None else comparison.claims():
            with claim(results[model], check.__name__):
                check()
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(results))
    dist.destroy_process_group()


@contextlib.contextmanager
def claim(results: dict[str, str | None], name: str):
    """Records what goes wrong in any of the processes."""
    error = None
    try:
        yield
    except Exception:
        error = traceback.format_exc()
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    results[name] = "\n".join(failed) or None


if __name__ == "__main__":
    main(*sys.argv[1:])

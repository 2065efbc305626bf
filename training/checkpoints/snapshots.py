"""What a checkpoint holds, as it is at one moment of a run and stays while training goes on.

- tensors are copied to memory that the next snapshot uses again, on a GPU to pinned memory and in the order
of its work, so that neither training waits for the copy nor a later step shows in it;
- tensors that are split over processes are put together one at a time, and only the first process keeps them;
- what an optimizer, a router, a random generator or a scaler of gradients knows beside the weights belongs to
it as well.

What belongs here: from a run to bytes and tensors in memory, by the names of the files that they become.
"""

import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedTokenizerBase

from tessera.modeling.balancing import LoadTally
from tessera.modeling.modeling_tessera import TesseraForCausalLM
from tessera.modeling.parallel_plans import is_split
from tessera.modeling.parallel_styles import gather_whole

from ..optimizers.state import gather_state
from .durable import safetensors_parts, write_file
from .random_state import RANDOM_FILE, gather_random_states

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
ROUTERS_FILE = "routers.safetensors"
STATE_FILE = "state.json"
LARGEST_FILE = 50 * 10**9  # bytes; transformers' own limit


@dataclass
class Snapshot:
    """A checkpoint in memory.

    Attributes:
        step: optimizer steps done.
        files: small files, by name.
        tensors: files of tensors, by name.
        copied: what to wait for before the tensors are read, if they are still on their way from a GPU.
    """

    step: int
    files: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes on a disk, without what a file system adds."""
        of_tensors = (t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())
        return sum(map(len, self.files.values())) + sum(of_tensors)

    def write(self, folder: Path) -> dict[str, dict[str, int | str]]:
        """Writes its files into a folder that is there.

        Returns:
            For each file its `bytes` and `sha256`.

        Raises:
            OSError: if one cannot be written.
        """
        if self.copied is not None:
            self.copied.synchronize()
        written = {name: write_file(folder / name, [data]) for name, data in self.files.items()}
        for name, tensors in self.tensors.items():
            metadata = {"format": "pt"} if name.startswith("model") else None
            written[name] = write_file(folder / name, safetensors_parts(tensors, metadata))
        return written


class Snapshots:
    """Takes snapshots of a run.

    Args:
        accelerator: of the run.
        lasting: whether they are to stay as they are while training goes on; else they are to be written
            before it does, and a CPU copies nothing.
    """

    def __init__(self, accelerator: Accelerator, lasting: bool = True):
        self.accelerator, self.lasting = accelerator, lasting
        self.memory: dict[tuple[str, str], torch.Tensor] = {}
        self.model_files: dict[str, bytes] | None = None

    def take(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Snapshot | None:
        """The run as it is now. All processes call it, none of them while an earlier snapshot is in use.

        Args:
            step: optimizer steps done.
            model: wrapped or not.
            optimizer: the one inside accelerate's wrapper.
            state: what else a resumed run needs, as JSON.
            tokenizer: goes beside the model.

        Returns:
            The snapshot, in the first process.
        """
        accelerator = self.accelerator
        model = accelerator.unwrap_model(model)
        snapshot = Snapshot(step)
        values = {"step": step, **state}
        if accelerator.scaler is not None:
            values["scaler"] = accelerator.scaler.state_dict()
        snapshot.files[STATE_FILE] = (json.dumps(values, indent=2) + "\n").encode("utf-8")
        if isinstance(model, TesseraForCausalLM):
            if self.model_files is None:
                self.model_files = _small_files(model, tokenizer, accelerator.is_main_process)
            snapshot.files |= self.model_files
            self._take_weights(model, snapshot)
        elif accelerator.is_main_process:  # an adapter
            snapshot.files |= _small_files(model, tokenizer)
        # Straight to where it stays: whole, and not by way of another copy.
        keep = functools.partial(self._keep, OPTIMIZER_FILE)
        if of_optimizer := gather_state(model, optimizer, keep=keep):
            snapshot.tensors[OPTIMIZER_FILE] = of_optimizer
        self._keep_all(ROUTERS_FILE, _tallies(model, accelerator), snapshot)
        self._keep_all(RANDOM_FILE, gather_random_states(accelerator), snapshot)
        if accelerator.device.type == "cuda":
            snapshot.copied = torch.cuda.Event()
            snapshot.copied.record()
        return snapshot if accelerator.is_main_process else None

    def _take_weights(self, model: TesseraForCausalLM, snapshot: Snapshot) -> None:
        """Under the names and in the files that `save_pretrained` would choose."""
        known = {name for name, _ in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - known
        left_out = tied | set(model._keys_to_ignore_on_save or ())
        weights = {}
        for name, tensor in model.state_dict().items():
            if name not in left_out:
                whole = gather_whole(tensor) if is_split(tensor) else tensor
                if self.accelerator.is_main_process:
                    weights[name] = self._keep(MODEL_FILE, name, whole)
        if not weights:
            return
        plan = split_torch_state_dict_into_shards(weights, max_shard_size=LARGEST_FILE)
        for file, names in plan.filename_to_tensors.items():
            snapshot.tensors[file] = {name: weights[name] for name in names}
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            snapshot.files[f"{MODEL_FILE}.index.json"] = text.encode("utf-8")

    def _keep_all(self, file: str, tensors: dict[str, torch.Tensor], snapshot: Snapshot) -> None:
        if tensors and self.accelerator.is_main_process:
            snapshot.tensors[file] = {name: self._keep(file, name, t) for name, t in tensors.items()}

    def _keep(self, file: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU that lasts, or the tensor itself where nothing will change it in time."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu" and not self.lasting:
            return tensor.contiguous()
        memory = self.memory.get((file, name))
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.memory[file, name] = memory
        return memory.copy_(tensor, non_blocking=tensor.is_cuda)


def _small_files(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, is_main: bool = True
) -> dict[str, bytes]:
    """Configuration, code and tokenizer as the library saves them; of an adapter everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(model, TesseraForCausalLM):
            model.save_pretrained(folder, is_main_process=is_main, state_dict={})
            (folder / MODEL_FILE).unlink(missing_ok=True)
        else:
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


# ---- routers ----


def _tallies(model: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """What routers have counted, of all processes: nothing right after a step, unless they are frozen or the
    step was skipped."""
    found = {}
    for name, router in model.named_modules():
        if isinstance(router, LoadTally):
            found[f"{name}:tally"] = accelerator.reduce(router.tally.to(accelerator.device), "sum").cpu()
            if router.last_tally is not None:
                found[f"{name}:last_tally"] = router.last_tally.cpu()
    return found


def restore_tallies(model: nn.Module, saved: dict[str, torch.Tensor], process: int) -> None:
    """Gives routers what they had counted; the sum of all processes goes to the first."""
    for name, router in model.named_modules():
        if isinstance(router, LoadTally) and f"{name}:tally" in saved:
            tally = saved[f"{name}:tally"].to(router.tally.device)
            router.tally.copy_(tally if process == 0 else torch.zeros_like(tally))
            last = saved.get(f"{name}:last_tally")
            router.last_tally = None if last is None else last.to(router.tally.device)

"""Tiny training runs, and what they read."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tessera import TesseraConfig
from tessera.training.pretrain import PretrainArguments, PretrainResult, pretrain

REPETITIVE = "the quick brown fox jumps over the lazy dog. " * 80


# A model of a few layers in ByteGPT's own words.
BYTEGPT = {
    "vocab_size": 256,
    "dim": 48,
    "inter_dim": 96,
    "moe_inter_dim": 32,
    "n_layers": 2,
    "n_dense_layers": 1,
    "n_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_seq_len": 64,
    "original_seq_len": 64,
}


def write_text(folder: Path, text: str = REPETITIVE, name: str = "text.txt") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_words(folder: Path, **special: str) -> Path:
    """A tokenizer of whole words, as anybody would save it: `<unk>`, `<eos>`, then those of the text."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *sorted(set(REPETITIVE.split()))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", **special}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def write_prepared(
    folder: Path, train: list[int], val: list[int], val_bytes: int, tokenizer: Path | None = None, **meta
) -> str:
    """A folder of tokens in the documented format, written by hand."""
    folder.mkdir()
    dtype = "uint16" if tokenizer else "uint8"
    known = {"format": 1, "dtype": dtype, "sha256": {}, **meta}
    for split, ids, num_bytes in (("train", train, len(train)), ("val", val, val_bytes)):
        data = np.asarray(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        (folder / f"{split}.idx").write_bytes(np.asarray([0, len(ids)], dtype="<u8").tobytes())
        known[split] = {"documents": 1, "tokens": len(ids), "bytes": num_bytes}
        known["sha256"][f"{split}.bin"] = hashlib.sha256(data).hexdigest()
    if tokenizer:
        shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "data_meta.json").write_text(json.dumps(known))
    return str(folder)


def write_config(folder: Path, preset: str = "llama-tiny", **overrides) -> str:
    """A config file of two thin layers, or what else the overrides say."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": None}
    if preset == "bytegpt-tiny":
        del small["head_dim"]
    config = TesseraConfig.from_preset(preset, **{**small, **overrides})
    target = folder / f"config-{preset}"
    config.save_pretrained(target)
    return str(target / "config.json")


def tiny_arguments(folder: Path, preset: str = "llama-tiny", **given) -> PretrainArguments:
    """A few steps of 4 x 32 tokens; the run is `folder / "run"`."""
    arguments = {
        "save_path": str(folder / "run"),
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 32,
        "evaluations": 0,
        "sample_tokens": 8,
        **given,
    }
    if "data_file" not in arguments:
        arguments["data_file"] = write_text(folder)
    if "config" not in arguments:
        arguments["config"] = write_config(folder, preset)
    return PretrainArguments(**arguments)


def untimed_records(run: Path, key: str = "step") -> list[dict]:
    """The records of a run that have a value, without what depends on the clock."""
    timed = {"seconds", "tokens_per_second", "mfu", "checkpoint_seconds"}
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in one.items() if name not in timed} for one in records if key in one
    ]


def tiny_run(folder: Path, resume: bool = False, **given) -> PretrainResult:
    """Trains as `tiny_arguments` says."""
    return pretrain(tiny_arguments(folder, **given), resume=resume)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Trains a model for a step on bytes of chance."""
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def without_torchao(errors: str) -> str:
    """What a process wrote to its standard error, less what torchao says when transformers imports it.

    On a machine without a GPU it cannot load its extensions, and says so. It is here for tests alone.
    """
    lines = errors.splitlines(keepends=True)
    foreign = ("torchao", "is an Enum subclass")
    return "".join(line for line in lines if not any(word in line for word in foreign))

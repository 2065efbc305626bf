"""nanochat's own model as a peer, from a checkout of it, and its weights under Tessera's names."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

from tessera.conversion.nanochat_original import JULY, RULES, config_from_args
from tessera.conversion.rules import to_ours

# What nanochat imports beside torch, and its model and optimizer do not use.
_UNUSED = ("filelock", "psutil", "wandb", "rustbpe", "tiktoken", "pyarrow", "pyarrow.parquet")


def import_nanochat(checkout: str) -> ModuleType:
    """The module `nanochat.gpt` of a checkout; empty modules stand in for those it does not use."""
    if not (Path(checkout) / "nanochat" / "gpt.py").is_file():
        raise SystemExit(f"--nanochat {checkout}: there is no nanochat/gpt.py")
    sys.path.insert(0, str(Path(checkout).resolve()))
    for name in _UNUSED:
        try:
            importlib.import_module(name)
        except ImportError:
            module = ModuleType(name)
            module.__path__ = []
            module.__getattr__ = _placeholder
            sys.modules[name] = module
    return importlib.import_module("nanochat.gpt")


def _placeholder(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def make_gpt(gpt: ModuleType, pattern: str, length: int, device: str, sizes: dict) -> torch.nn.Module:
    """nanochat's model (d12 but for `sizes`) as it starts, with nothing at zero.

    What it starts at zero would hide the layers from a comparison of losses.
    """
    config = gpt.GPTConfig(sequence_len=length, window_pattern=pattern, **sizes)
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0.0, 0.02)
        model.lm_head.weight.normal_(0.0, 0.02)
    return model


def tessera_weights(state: dict[str, torch.Tensor], config) -> tuple:
    """Tessera's configuration and weights for a state of nanochat's model."""
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    args = {name: getattr(config, name) for name in names}
    ours = config_from_args(args, JULY, padded_vocab_size=state["transformer.wte.weight"].shape[0])
    ours.use_cache = False
    tensors = to_ours({name: tensor.float() for name, tensor in state.items()}, ours, RULES)
    return ours, {name: tensors[name] for name in tensors}

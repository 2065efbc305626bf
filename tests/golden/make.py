"""Writes the golden files of this folder: `python tests/golden/make.py` from the repository's root.

Each holds a tiny model of one dialect with random weights, token ids, and the logits and loss that it gave
when the file was written, after its equality with the original implementation had been seen. A change of code
that changes them changes what users' checkpoints mean. Written on 2026-11-21 with torch 2.13.0 and
transformers 5.23.0.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.models import DIALECTS, tiny_config  # noqa: E402
from helpers.weights import randomize  # noqa: E402

from tessera import TesseraForCausalLM  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48}
HEADS = {
    "bytegpt-tiny": {"kv_lora_rank": 12},
    "nanochat-tiny": {"head_dim": 8},
    "verse-tiny": {"head_dim": 8},
}


def make(name: str, folder: Path) -> None:
    """Writes one file."""
    config = tiny_config(name, **SMALL, **HEADS.get(name, {}))
    model = randomize(TesseraForCausalLM(config), seed=7)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        out = model(ids, labels=ids, use_cache=False)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = {f"weights.{key}": value.contiguous() for key, value in state.items()}
    tensors |= {"ids": ids, "logits": out.logits, "loss": out.loss.reshape(1)}
    fields = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    save_file(
        tensors, folder / f"{name}.safetensors", metadata={"config": json.dumps(fields, sort_keys=True)}
    )


if __name__ == "__main__":
    for dialect in DIALECTS:
        make(dialect, Path(__file__).parent)

"""A tiny model with a tokenizer that has merges and an end-of-text token, on disk and loaded; task files."""

import json
import socket
from pathlib import Path

import pytest
import yaml
from helpers.corpora import train_bpe
from helpers.models import tiny_model
from transformers import PreTrainedTokenizerFast

from tessera import build_byte_tokenizer
from tessera.serving.generate import load

CONTEXT = 48
TEXT = (
    "The quick brown fox jumps over the lazy dog while seven wizards box. "
    "Pack my box with five dozen liquor jugs, said the zebra; how vexingly quick daft animals are! "
)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    backend = train_bpe([TEXT] * 3, 300)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A model directory."""
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    tokenizer = bpe_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(
        "llama-tiny", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, bos_token_id=None, **special
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(folder):
    """The model and its tokenizer."""
    return load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def byte_model():
    """A model of bytes and its tokenizer, which has no special tokens."""
    return tiny_model("llama-tiny", vocab_size=256, max_position_embeddings=CONTEXT), build_byte_tokenizer()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No connection can be made, and datasets are cached nowhere else."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def write_task(tmp_path):
    """Writes a task file over JSON lines; gives the folder of all that were written."""

    def write(name: str, rows: list[dict], **config) -> str:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **config,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
        return str(folder)

    return write

"""Conversations, a tokenizer that can chat, and tiny models for post-training."""

import json
import random
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.data.chat import to_conversation
from tessera.tokenization import train_tokenizer

from .models import MIXTURES

COLOURS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "lemon": "yellow",
}
NAMES = ["Ada", "Ben", "Cora", "Dan", "Elsa", "Finn"]


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of one to three turns; some with a system turn, a tool call, thoughts or parts."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "Answer briefly."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(["colour", "colour", "name", "tool", "thought"])
            thing, name = draw.choice(list(COLOURS)), draw.choice(NAMES)
            if kind == "colour":
                messages += turn(f"Which colour has {thing}?", f"The colour of {thing} is {COLOURS[thing]}.")
            elif kind == "name":
                messages += turn(f"My name is {name}.", f"Hello {name}, how are you — fine?")
            elif kind == "thought":
                messages += turn(f"Colour of {thing}?", COLOURS[thing])
                messages[-1]["reasoning_content"] = f"They ask about {thing}."
            else:
                call = {"name": "find", "arguments": {"what": thing, "n": draw.randrange(9)}}
                messages += [
                    {"role": "user", "content": f"Look up {thing}."},
                    {"role": "assistant", "tool_call": call},
                    {"role": "tool", "content": json.dumps([COLOURS[thing]])},
                    {"role": "assistant", "content": f"I found {COLOURS[thing]}."},
                ]
        rows.append(to_conversation({"messages": messages}))
    return rows


def turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@cache
def chat_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on such conversations, with the chat template."""
    return train_tokenizer((json.dumps(row) for row in conversations(300, seed=9)), vocab_size=vocab_size)


def chat_model(folder: Path, preset: str = "llama-tiny", tokenizer=None, **overrides) -> str:
    """Saves a small model with random weights and a tokenizer beside it, and returns the directory."""
    tokenizer = tokenizer or chat_tokenizer()
    base, fields = MIXTURES.get(preset, (preset, {}))
    small = {"max_position_embeddings": 256, "vocab_size": len(tokenizer), "padded_vocab_size": None}
    if fields.get("rope_parameters"):
        del small["max_position_embeddings"]
    if preset == "llama-tiny":
        small["num_hidden_layers"] = 2
    config = TesseraConfig.from_preset(base, **{**fields, **small, **overrides})
    torch.manual_seed(0)
    TesseraForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def assistant_nats(folder: Path | str, rows: list[dict]) -> float:
    """Nats per token of the assistant, one conversation at a time, by the template's own marks."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = log_probs[range(ids.shape[1] - 1), ids[0, 1:]]
        mask = torch.as_tensor(encoded["assistant_masks"]).bool().reshape(-1)[1:]
        total, count = total - chosen[mask].sum().item(), count + int(mask.sum())
    return total / count

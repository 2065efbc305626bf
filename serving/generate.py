"""Text from a model: many prompts as one batch, and a prompt loop in the terminal.

What belongs here: from strings to strings, over transformers' `generate`.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, TextStreamer

from tessera.configs.resolve import resolve_config
from tessera.modeling.loading import load_model
from tessera.modeling.modeling_tessera import TesseraForCausalLM
from tessera.serving.text_stream import TextStream
from tessera.tokenization import build_byte_tokenizer
from tessera.tokenization.byte_tokenizer import BYTE_VOCAB_SIZE
from tessera.training.checkpoints import find_checkpoint


@dataclass
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: length of a completion.
        temperature: 0 takes the likeliest token.
        top_k, top_p: sample only from the likeliest; None for all.
    """

    max_new_tokens: int = 200
    temperature: float = 0.2
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def arguments(self) -> dict:
        """As `generate` takes them."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            # transformers' own default keeps the best 50; none given means none here.
            "top_k": self.top_k or 0,
            "top_p": self.top_p if self.top_p is not None else 1.0,
        }


def load(ckpt_path: str, config: str | None = None, device: str | None = None):
    """Loads a model and its tokenizer; bytes for a vocabulary of 256 that has no tokenizer beside it.

    Args:
        ckpt_path: model directory, or a run's.
        config: preset or file, instead of the directory's own.
        device: name as torch has it; default: the fastest.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        ValueError: if either cannot be loaded or they do not fit each other.
    """
    folder = find_checkpoint(ckpt_path)
    model = load_model(folder, config=None if config is None else resolve_config(config))
    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            # The library for tokenizers raises just that.
            raise ValueError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
    elif model.config.vocab_size == BYTE_VOCAB_SIZE:
        tokenizer = build_byte_tokenizer()
    else:
        raise ValueError(f"{folder} has no tokenizer, and {model.config.vocab_size} tokens are not bytes")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}"
        )
    try:
        return model.to(device or pick_device()).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from error


def pick_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@torch.inference_mode()
def complete(
    model: TesseraForCausalLM,
    tokenizer,
    prompts: list[str],
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Continues prompts of any lengths in one batch, padded on the left and masked.

    Returns:
        The completions, without their prompts.

    Raises:
        ValueError: for an empty prompt, or one that leaves no room in the model's context.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for row in rows:
        if not row:
            raise ValueError("a prompt is empty: give at least one character to continue")
        if len(row) + sampling.max_new_tokens > model.config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {len(row)} tokens and {sampling.max_new_tokens} new ones are more than the "
                f"model's context of {model.config.max_position_embeddings}"
            )
    longest = max(map(len, rows))
    # Masked positions may hold any id, so no padding token is needed.
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(
        ids, attention_mask=mask, pad_token_id=padding, streamer=streamer, **sampling.arguments()
    )
    completions = []
    for row, new in zip(rows, out[:, longest:].tolist(), strict=True):
        text = TextStream(tokenizer, hidden=frozenset(tokenizer.all_special_ids), after=row)
        completions.append("".join(map(text.push, new)) + text.end())
    return completions


def converse(
    model: TesseraForCausalLM,
    tokenizer,
    sampling: Sampling,
    read: Callable[[str], str] = input,
) -> None:
    """Reads prompts and prints what the model makes of them, until `/exit` or the end of input.

    Everything so far is the prompt of the next turn, as far as it fits; `/clear` forgets it.
    """
    history = ""
    print("Type a text to continue; /clear forgets what came before, /exit leaves.", file=sys.stderr)
    while True:
        try:
            line = read(">>> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            history = ""
            continue
        if not line:
            continue
        history += line
        room = model.config.max_position_embeddings - sampling.max_new_tokens
        ids = tokenizer(history)["input_ids"]
        if len(ids) > room > 0:
            # A quarter less than fits: ids may grow when the text is read again. A character that is cut
            # in two would.
            kept = ids[-max(room * 3 // 4, 1) :]
            history = tokenizer.decode(kept, skip_special_tokens=True).lstrip("\ufffd")
        try:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            history += complete(model, tokenizer, [history], sampling, streamer)[0]
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            history = ""
            print(f"error: {error}", file=sys.stderr)

"""What the model of a run writes on the way and at its end.

What belongs here: generation in the middle of training, which leaves training as it was: its mode, its random
numbers, what was compiled.
"""

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_ON_THE_WAY = 48  # at an evaluation; a sample costs a forward pass for each of them


def encode_prompt(given: str | None, tokenizer: PreTrainedTokenizerBase, context: int) -> torch.Tensor:
    """The ids [1, T] that samples begin with: of the text that is given, else the start of a document.

    Raises:
        ValueError: if the text leaves no room in the model's context.
    """
    start = tokenizer.eos_token_id
    if given is None and start is not None:
        return torch.tensor([[start]])
    prompt = tokenizer("\n" if given is None else given, return_tensors="pt")["input_ids"].long()
    if prompt.shape[1] >= context:
        raise ValueError(
            f"sample_prompt has {prompt.shape[1]} tokens and leaves no room in the model's context of "
            f"{context}"
        )
    return prompt


@torch.no_grad()
def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    tokens: int,
    accelerator: Accelerator,
    seed: int = 0,
) -> str:
    """A continuation, at temperature 0.8. All processes call it.

    Args:
        model: unwrapped; where its weights are sharded all processes generate the same text, else the first.
        tokenizer: that turns it back into text.
        prompt: token ids [1, T].
        tokens: new ones, at most, and as many as the context has room for.
        accelerator: of the run.
        seed: the random numbers of the run are not touched.

    Returns:
        Prompt and continuation on the first process; on others, or without a prompt or tokens, nothing.
    """
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    # Some tokenizers make nothing of a line break.
    if not tokens or not prompt.shape[1] or not (sharded or accelerator.is_main_process):
        return ""
    device = accelerator.device
    prompt = prompt.to(device)
    room = model.config.max_position_embeddings - prompt.shape[1]
    training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type),
            # A compiled model would be compiled anew for each length.
            torch.compiler.set_stance("force_eager"),
            accelerator.autocast(),
        ):
            torch.manual_seed(seed)
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(tokens, room),
                do_sample=True,
                temperature=0.8,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id or 0,
                # Of a model that has diverged; the run's guards decide what becomes of that.
                remove_invalid_values=True,
                synced_gpus=sharded,
            )
    finally:
        model.train(training)
    if not accelerator.is_main_process:
        return ""
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip("\n")


def for_a_terminal(text: str) -> str:
    """A text without what a terminal would obey: a young model of bytes writes control characters too."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def on_one_line(text: str, width: int = 100) -> str:
    """A text as a line of its own: line breaks shown, the rest cut off, and nothing that moves a cursor."""
    line = for_a_terminal(" ".join(text.replace("\n", " ⏎ ").split()))
    return line if len(line) <= width else line[: width - 1] + "…"

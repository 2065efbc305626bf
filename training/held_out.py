"""Held-out data of post-training: choosing it, scoring it, answering it.

What belongs here: plain loops over the model's own forward pass and `generate`, which know nothing of a
trainer, so that what is reported before and after does not depend on how it was trained.
"""

import torch

LOGITS_AT_A_TIME = 2**26  # 256 MiB in fp32


def hold_out(rows: list, seed: int, most: int = 200) -> tuple[list, list]:
    """Splits rows into those to train on and those held out: a twentieth, at least one, at most `most`.

    Raises:
        ValueError: if there are not two.
    """
    if len(rows) < 2:
        raise ValueError(
            f"there are {len(rows)} rows of data, and one must be held out: give more, or --eval-data"
        )
    count = min(max(len(rows) // 20, 1), most)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def batches_by_length(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Numbers of rows in batches of similar lengths whose logits fit `LOGITS_AT_A_TIME`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        fits = LOGITS_AT_A_TIME // (lengths[i] * vocab_size)
        if batches and len(batches[-1]) < min(fits, 16):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def token_log_probs(model, ids: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [B, T - 1] of the labels, zero where they are not counted, in one padded batch."""
    longest = max(map(len, ids))
    device = model.device
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels], device=device)[:, 1:]
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return -nats


def answer(
    model, tokenizer, conversations: list[list[dict]], max_new_tokens: int, temperature: float = 0.0
) -> list[str]:
    """What the model says next in each conversation, in one batch padded on the left.

    Args:
        max_new_tokens: less where the context ends before.
        temperature: 0 takes the likeliest token.
    """
    encoded = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    longest = max(map(len, encoded))
    pad, device = tokenizer.pad_token_id, model.device
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    room = model.config.max_position_embeddings - longest
    if room < 1:
        return [""] * len(conversations)
    chosen = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=pad,
        **chosen,
    )
    ends = set(model.generation_config.eos_token_id or [])
    texts = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        # Thoughts and calls stand between special tokens, which are of use to whoever takes the text apart.
        texts.append(tokenizer.decode(row[:end]))
    return texts

"""Supervised fine-tuning on conversations: `tessera sft`, or `accelerate launch -m tessera.training.sft`.

Notable:
- only what the assistant says is trained, as the chat template's generation marks tell it, end of turn
  included; a preview shows it before anything is trained;
- conversations are packed to full rows, and none sees its neighbours. Rows stay rows: TRL's own collator
  makes one row of a batch, and the cost of attention, where no kernel for such rows is at hand, grows with
  the square of its length;
- the loop and the loss are TRL's. Its dataset preparation is not used: tables have one type for a column,
  while a message may have a text or parts, and each tool call its own arguments.

What belongs here: which conversations are trained on, and what is measured. `data/chat_rows.py` makes rows of
them, `post_training.py` has what is common.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tessera.data.chat import load_conversations
from tessera.data.chat_rows import (
    IGNORED,
    TOO_LONG,
    Packed,
    Row,
    RowEncoder,
    encode_conversation,
    pack_best_fit,
    row_dataset,
    shuffled,
)
from tessera.data.preview import mark_trained

from .held_out import batches_by_length, hold_out, token_log_probs
from .post_training import PostTrainingArguments, PostTrainingResult, Workshop, quietly, rate_by_size
from .records.curves import draw_curve
from .trainer_parts import PlainCheckpoints

RATE_AT_7B, RATE_AT_7B_LORA = 2e-5, 1e-4
HELD_OUT_OF_A_STREAM = 100
MOST_HELD_OUT = 500


@dataclass(kw_only=True)
class SFTArguments(PostTrainingArguments):
    """What a run is told, beside what all three are.

    Attributes:
        packing: several conversations in a row; a row is `max_seq_len` tokens.
        too_long: what becomes of a conversation that is longer: "truncate", "split" or "drop".
        streaming: read and encode the data while training; needs `steps`.
    """

    packing: bool = True
    too_long: str = "truncate"
    streaming: bool = False

    def __post_init__(self):
        if not self.data:
            raise ValueError(
                "--data is missing: a file or folder of conversations, or a Hub dataset (or --preset)"
            )
        if self.too_long not in TOO_LONG:
            raise ValueError(f"--too-long must be one of {', '.join(TOO_LONG)}, got {self.too_long!r}")
        if self.streaming and self.steps is None:
            raise ValueError("--streaming needs --steps, since a stream has no length to count epochs by")
        super().__post_init__()


class _Trainer(PlainCheckpoints, SFTTrainer):
    pass


def sft(args: SFTArguments, resume: bool = False) -> PostTrainingResult:
    """Fine-tunes a model on conversations and writes the run directory.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies.

    Returns:
        With `val_loss` (nats per token of the assistant) and `val_bits_per_byte` of held-out conversations.

    Raises:
        ValueError: for what cannot work: in the arguments, model, tokenizer or data, or a device's memory.
        FloatingPointError: if the loss is no longer a number.
    """
    # Adapters are for the model as others load it, without these layers.
    shop = Workshop(args, resume, ahead=not args.lora)
    train, held_out = _read(args)
    held_out_rows = list(_encoder(args, shop).encode(held_out))
    if not held_out_rows:
        raise ValueError(f"no held-out conversation has an answer within --max-seq-len {shop.length} tokens")
    # The first that gave a row: one that the tokenizer does not take could not be shown, nor asked.
    shown = next(chat for chat in held_out if _encoder(args, shop).encode_one(chat))
    shop.say(_preview(shop.tokenizer, shown, shop.length))
    encoder, packed = _encoder(args, shop), Packed(shop.length)
    if args.streaming:
        if next(encoder.encode(_rest_of_stream(args)), None) is None:
            raise ValueError(
                f"{args.data} has nothing left to train on after {HELD_OUT_OF_A_STREAM} conversations are "
                "held out; leave --streaming out, or give --eval-data"
            )
        make = partial(_stream, args, shop.tokenizer, shop.length)
        dataset = row_dataset(make, packed=args.packing, streaming=True, seed=args.seed)
    else:
        bar = tqdm(train, desc="encoding", unit=" conversations", file=sys.stderr, disable=None)
        encoded = list(encoder.encode(bar))
        if not encoded:
            raise ValueError(f"no conversation has an answer within --max-seq-len {shop.length} tokens")
        shop.say(f"{len(train)} conversations to train on, {len(held_out)} held out; {encoder.summary()}")
        if args.packing:
            encoded = list(pack_best_fit(encoded, shop.length, buffer=None, packed=packed))
            shop.say(packed.summary())
        dataset = row_dataset(lambda: encoded, packed=args.packing, streaming=False)
    rate = rate_by_size(shop.model, RATE_AT_7B_LORA if args.lora else RATE_AT_7B)
    with quietly():
        trainer = _Trainer(
            shop.model,
            SFTConfig(**shop.trainer_arguments(rate), max_length=None),
            data_collator=partial(collate, padding=shop.tokenizer.pad_token_id),
            train_dataset=dataset,
            processing_class=shop.tokenizer,
            peft_config=shop.adapters(),
        )
    question = shown["messages"]
    question = question[: next(i for i, message in enumerate(question) if message["role"] == "assistant")]

    return shop.run(
        trainer,
        evaluate=lambda model: assistant_loss(model, shop.tokenizer, held_out_rows),
        describe=lambda m: f"{m['val_loss']:.4f} nats per token of the assistant, held out",
        question=question,
        draw=lambda records, path: draw_curve(records, path, f"{args.model}: the assistant's tokens"),
    )


def _load(args: SFTArguments) -> Iterator[dict]:
    return load_conversations(
        args.data, split=args.split, name=args.name, limit=args.limit, streaming=args.streaming
    )


def _read(args: SFTArguments) -> tuple[list[dict], list[dict]]:
    """Conversations to train on, none where they are streamed, and those held out."""
    if args.eval_data:
        held_out = list(load_conversations(args.eval_data, held_out=True, limit=MOST_HELD_OUT))
        return [] if args.streaming else list(_load(args)), held_out
    if args.streaming:
        return [], list(islice(_load(args), HELD_OUT_OF_A_STREAM))
    return hold_out(list(_load(args)), args.seed)


def _encoder(args: SFTArguments, shop: Workshop) -> RowEncoder:
    return RowEncoder(shop.tokenizer, shop.length, args.too_long)


def _rest_of_stream(args: SFTArguments) -> Iterator[dict]:
    """Conversations of the data as they come, without what is held out of it."""
    return islice(_load(args), 0 if args.eval_data else HELD_OUT_OF_A_STREAM, None)


def _stream(args: SFTArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Row]:
    rows = RowEncoder(tokenizer, length, args.too_long).encode(_rest_of_stream(args))
    rows = shuffled(rows, args.seed)
    return pack_best_fit(rows, length) if args.packing else rows


def collate(rows: list[dict], padding: int) -> dict[str, torch.Tensor]:
    """Rows as tensors [B, T], padded on the right; positions begin anew with each conversation.

    Args:
        rows: `input_ids`, `labels`, and where several conversations are in a row their `seq_lengths`.
        padding: token id.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, padding),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        lengths = row.get("seq_lengths") or [length]
        batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, :length] = 1
        batch["position_ids"][i, :length] = torch.cat([torch.arange(n) for n in lengths])
        batch["labels"][i, :length] = torch.tensor(row["labels"])
    # Nothing predicts the first token of a conversation.
    batch["labels"][batch["position_ids"] == 0] = IGNORED
    return batch


def _preview(tokenizer: PreTrainedTokenizerBase, conversation: dict, length: int) -> str:
    """The first conversation with what is trained marked.

    Raises:
        ValueError: if nothing of it is, or everything.
    """
    row = encode_conversation(tokenizer, conversation)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    how = "in green" if color else "between ⟦ and ⟧"
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    text = mark_trained(tokenizer, ids, labels, color)
    return f"a conversation; what is trained stands {how}:\n{text}"


def assistant_loss(model, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> dict[str, float]:
    """Nats per token, and bits per byte of text, of what the assistant says; all processes share the work."""
    nats, tokens, size = 0.0, 0, 0
    for row in rows:
        said = [label for label in row["labels"][1:] if label != IGNORED]
        tokens += len(said)
        size += len(tokenizer.decode(said, skip_special_tokens=True).encode())
    batches = batches_by_length([len(row["input_ids"]) for row in rows], model.config.vocab_size)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for batch in batches[rank::world]:
        ids, labels = ([rows[i][key] for i in batch] for key in ("input_ids", "labels"))
        nats -= token_log_probs(model, ids, labels).sum().item()
    nats = reduce(torch.tensor(nats, device=model.device), "sum").item()
    return {"val_loss": nats / tokens, "val_bits_per_byte": nats / math.log(2) / max(size, 1)}


if __name__ == "__main__":
    from tessera.cli import run

    run(["sft", *sys.argv[1:]])

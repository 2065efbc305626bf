"""Supervised fine-tuning on conversations: `tessera sft`, or `accelerate launch -m tessera.training.sft`.

Notable:
- only what the assistant says is trained, as the chat template's generation marks tell it, end of turn
  included; a preview shows it before anything is trained;
- conversations are packed to full rows, and none sees its neighbours. Rows stay rows: TRL's own collator
  makes one row of a batch, and the cost of attention, where no kernel for such rows is at hand, grows with
  the square of its length;
- the loop, the packing and the loss are TRL's. Its dataset preparation is not used: tables have one type for
  a column, while a message may have a text or parts, and each tool call its own arguments.

What belongs here: from conversations to rows, and what is measured. `post_training.py` has what is common.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from accelerate.utils import reduce
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, pack_dataset

from tessera.data.chat import IGNORED, encode_conversation, load_conversations, mark_trained

from .curves import draw_curve
from .held_out import batches_by_length, hold_out, token_log_probs
from .post_training import PostTrainingArguments, PostTrainingResult, Workshop, quietly, rate_by_size
from .trainer_parts import PlainCheckpoints

RATE_AT_7B, RATE_AT_7B_LORA = 2e-5, 1e-4
HELD_OUT_OF_A_STREAM = 100
MOST_HELD_OUT = 500
SHUFFLED_OF_A_STREAM = 1000  # conversations drawn from in random order
FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})


@dataclass(kw_only=True)
class SFTArguments(PostTrainingArguments):
    """What a run is told, beside what all three are.

    Attributes:
        packing: several conversations in a row; a row is `max_seq_len` tokens.
        streaming: read and encode the data while training; needs `steps`.
    """

    packing: bool = True
    streaming: bool = False

    def __post_init__(self):
        if not self.data:
            raise ValueError("--data is missing: a file or folder of conversations, or a Hub dataset")
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
    shop.say(_preview(shop.tokenizer, held_out[0], shop.length))
    rows = Rows(shop.tokenizer, shop.length)
    held_out_rows = list(rows.encode(held_out))
    if not held_out_rows:
        raise ValueError(f"no held-out conversation has an answer within --max-seq-len {shop.length} tokens")
    if args.streaming:
        if next(_stream(args, rows), None) is None:
            raise ValueError(
                f"{args.data} has nothing left to train on after {HELD_OUT_OF_A_STREAM} conversations are "
                "held out; leave --streaming out, or give --eval-data"
            )
        dataset = IterableDataset.from_generator(partial(_stream, args, rows), features=FEATURES)
        dataset = dataset.shuffle(seed=args.seed, buffer_size=SHUFFLED_OF_A_STREAM)
    else:
        rows = Rows(shop.tokenizer, shop.length)
        bar = tqdm(train, desc="encoding", unit=" conversations", file=sys.stderr, disable=None)
        encoded = list(rows.encode(bar))
        if not encoded:
            raise ValueError(f"no conversation has an answer within --max-seq-len {shop.length} tokens")
        dataset = Dataset.from_list(encoded, features=FEATURES)
        shop.say(f"{len(encoded)} conversations to train on, {len(held_out_rows)} held out; {rows.summary()}")
    rate = rate_by_size(shop.model, RATE_AT_7B_LORA if args.lora else RATE_AT_7B)
    with quietly():
        if args.packing:
            dataset = pack_dataset(dataset, shop.length)
        trainer = _Trainer(
            shop.model,
            SFTConfig(**shop.trainer_arguments(rate), max_length=None),
            data_collator=partial(collate, padding=shop.tokenizer.pad_token_id),
            train_dataset=dataset,
            processing_class=shop.tokenizer,
            peft_config=shop.adapters(),
        )
    question = held_out[0]["messages"]
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
        held_out = list(load_conversations(args.eval_data, limit=MOST_HELD_OUT))
        return [] if args.streaming else list(_load(args)), held_out
    if args.streaming:
        return [], list(islice(_load(args), HELD_OUT_OF_A_STREAM))
    return hold_out(list(_load(args)), args.seed)


def _stream(args: SFTArguments, rows: "Rows") -> Iterator[dict[str, list[int]]]:
    """Encodes the data as it comes, without what is held out of it."""
    first = 0 if args.eval_data else HELD_OUT_OF_A_STREAM
    return rows.encode(islice(_load(args), first, None))


class Rows:
    """Encodes conversations as rows, and counts what became of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.cut = self.dropped = self.tokens = self.trained = 0

    def encode(self, conversations: Iterable[dict]) -> Iterator[dict[str, list[int]]]:
        """Rows of at most `length` tokens; those in which nothing is left to train are left out."""
        for conversation in conversations:
            row = encode_conversation(self.tokenizer, conversation)
            self.cut += len(row["input_ids"]) > self.length
            row = {key: values[: self.length] for key, values in row.items()}
            trained = sum(label != IGNORED for label in row["labels"][1:])
            if not trained:
                self.dropped += 1
                continue
            self.tokens += len(row["input_ids"])
            self.trained += trained
            yield row

    def summary(self) -> str:
        """One line on all that was encoded."""
        cut = f"; {self.cut} cut at {self.length} tokens" if self.cut else ""
        dropped = f", {self.dropped} of them left out, without an answer before that" if self.dropped else ""
        return f"{self.tokens:,} tokens, of which {self.trained:,} are the assistant's{cut}{dropped}"


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
        ValueError: if nothing of it is.
    """
    row = encode_conversation(tokenizer, conversation)
    if all(label == IGNORED for label in row["labels"]):
        raise ValueError(
            "the chat template marks nothing of a conversation as the assistant's: check its "
            "{% generation %} marks"
        )
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

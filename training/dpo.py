"""Direct preference optimization: `tessera dpo`, or `accelerate launch -m tessera.training.dpo`.

The answer that was chosen becomes likelier than the one that was rejected, measured against the model that
training started from (Rafailov et al. 2023, equation 7). The loop and the loss are TRL's.

What belongs here: from preferences to rows, and what is measured. `post_training.py` has what is common.
"""

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from tessera.data.chat_rows import IGNORED, encode_conversation
from tessera.data.preferences import Preference, load_preferences

from .held_out import batches_by_length, hold_out, token_log_probs
from .post_training import PostTrainingArguments, PostTrainingResult, Workshop, quietly, rate_by_size
from .records.curves import draw_measures
from .trainer_parts import PlainCheckpoints

# A tenth of what fine-tuning takes: further away from the start, the rewards say little about the answers.
RATE_AT_7B, RATE_AT_7B_LORA = 1e-6, 1e-5
MOST_HELD_OUT = 500


@dataclass(kw_only=True)
class DPOArguments(PostTrainingArguments):
    """What a run is told, beside what all three are.

    Attributes:
        beta: how hard it is to leave the starting model.
    """

    beta: float = 0.1

    def __post_init__(self):
        if not self.data:
            raise ValueError("--data is missing: a file or folder of preferences, or a Hub dataset")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        super().__post_init__()


class _Trainer(PlainCheckpoints, DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        # TRL's own preparation trains on what the template writes after the end of a turn, too.
        return dataset


def dpo(args: DPOArguments, resume: bool = False) -> PostTrainingResult:
    """Trains a model on preferences and writes the run directory.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies.

    Returns:
        With `reward_accuracy` (share of held-out pairs whose chosen answer has the larger reward; a tie is
        half) and `reward_margin` (mean difference), where the reward of an answer is beta times how much
        likelier it has become, in nats; and `preferred`, the share whose chosen answer is the likelier one.

    Raises:
        ValueError: for what cannot work: in the arguments, model, tokenizer or data, or a device's memory.
        FloatingPointError: if the loss is no longer a number.
    """
    shop = Workshop(args, resume, dropout=False)
    pairs = list(load_preferences(args.data, split=args.split, name=args.name, limit=args.limit))
    if args.eval_data:
        held_out = list(load_preferences(args.eval_data, held_out=True, limit=MOST_HELD_OUT))
    else:
        pairs, held_out = hold_out(pairs, args.seed)
    rows, held_out_rows = (encode_pairs(shop.tokenizer, some, shop.length) for some in (pairs, held_out))
    for what, there in (("", rows), ("held-out ", held_out_rows)):
        if not there:
            raise ValueError(
                f"no {what}prompt leaves room for an answer in --max-seq-len {shop.length} tokens"
            )
    shop.say(f"{len(rows)} preferences to train on, {len(held_out_rows)} held out")
    rate = rate_by_size(shop.model, RATE_AT_7B_LORA if args.lora else RATE_AT_7B)
    with quietly():
        trainer = _Trainer(
            shop.model,
            # With adapters the model without them is the reference.
            None if args.lora else copy.deepcopy(shop.model),
            DPOConfig(**shop.trainer_arguments(rate), max_length=shop.length, beta=args.beta),
            train_dataset=Dataset.from_list(rows),
            processing_class=shop.tokenizer,
            peft_config=shop.adapters(),
        )
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        reference = answer_log_probs(trainer.model, held_out_rows)

    def evaluate(model) -> dict[str, float]:
        now = answer_log_probs(model, held_out_rows)
        rewards = args.beta * (now - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            "reward_accuracy": ((margin > 0).double() + (margin == 0).double() / 2).mean().item(),
            "reward_margin": margin.mean().item(),
            "preferred": (now[:, 0] > now[:, 1]).double().mean().item(),
        }

    return shop.run(
        trainer,
        evaluate=evaluate,
        describe=lambda m: (
            f"held out: reward accuracy {m['reward_accuracy']:.3f}, margin {m['reward_margin']:+.3f}, "
            f"chosen answer likelier in {100 * m['preferred']:.0f} %"
        ),
        question=held_out[0].prompt,
        draw=lambda records, path: draw_measures(
            records,
            path,
            f"{args.model}: preferences",
            {"loss": "loss", "reward_accuracy": "reward accuracy"},
        ),
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Preference], length: int
) -> list[dict[str, list[int]]]:
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; an answer ends with its turn.

    Prompts that leave no room for an answer within `length` are left out, longer answers are cut.
    """
    rows = []
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(
            pair.prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        answers = []
        for said in (pair.chosen, pair.rejected):
            row = encode_conversation(tokenizer, {"messages": [*pair.prompt, said]})
            # What the template writes after the end of a turn is not the model's to say.
            end = max((i for i, label in enumerate(row["labels"]) if label != IGNORED), default=-1) + 1
            answers.append(row["input_ids"][:end])
        # Less than the prompt where a template writes it otherwise once it is answered.
        start = min(_alike(prompt, ids) for ids in answers)
        chosen, rejected = (ids[start:length] for ids in answers)
        if chosen and rejected:
            rows.append({"prompt_ids": prompt[:start], "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def answer_log_probs(model, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Log-probabilities [N, 2] of the chosen and the rejected answer of each row, in nats."""
    ids, labels = [], []
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            ids.append(row["prompt_ids"] + row[side])
            labels.append([IGNORED] * len(row["prompt_ids"]) + row[side])
    found = torch.zeros(len(ids), dtype=torch.float64)
    for batch in batches_by_length([len(row) for row in ids], model.config.vocab_size):
        scores = token_log_probs(model, [ids[i] for i in batch], [labels[i] for i in batch])
        found[batch] = scores.sum(1).double().cpu()
    return found.view(-1, 2)


if __name__ == "__main__":
    from tessera.cli import run

    run(["dpo", *sys.argv[1:]])

"""Group relative policy optimization: `tessera grpo`, or `accelerate launch -m tessera.training.grpo`.

The model answers each problem several times, a program rewards the answers, and those that did better than
the others to the same problem become likelier (Shao et al. 2024, DeepSeekMath). The loop is TRL's, and
answers come from transformers' `generate`: there is one copy of the weights and no server.

What belongs here: from problems to prompts, and what is measured. `rewards.py` says what is right,
`post_training.py` has what is common.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from tessera.data.chat import as_messages, to_message
from tessera.data.rows import read_rows

from .held_out import answer, hold_out
from .post_training import PostTrainingArguments, PostTrainingResult, Workshop, quietly, rate_by_size
from .records.curves import draw_measures
from .rewards import arithmetic_problems, format_reward, number_reward
from .trainer_parts import PlainCheckpoints

RATE_AT_7B, RATE_AT_7B_LORA = 1e-6, 1e-5
ARITHMETIC_PROBLEMS = 1000
MOST_HELD_OUT = 64
ANSWERED_AT_A_TIME = 32
# An answer in the right form is worth a little, so that there is something to begin with.
REWARDS = ((number_reward, 1.0), (format_reward, 0.1))

Reward = Callable[..., list[float]]


@dataclass(kw_only=True)
class GRPOArguments(PostTrainingArguments):
    """What a run is told, beside what all three are. Rows of a step are answers.

    Attributes:
        task: `arithmetic` makes its own problems; otherwise they are in `data`, as `question` or `prompt` and
            `answer`.
        difficulty: of arithmetic: digits.
        num_generations: answers to a problem; divides `batch_size`.
        max_completion_len: tokens of an answer at most.
        temperature: of the answers, also of those that are measured.
    """

    task: str | None = None
    difficulty: int = 1
    num_generations: int = 8
    max_completion_len: int = 256
    temperature: float = 1.0

    def __post_init__(self):
        if (self.data is None) == (self.task is None):
            raise ValueError("give --data with problems or --task arithmetic, one of them")
        if self.task not in (None, "arithmetic"):
            raise ValueError(f"there is no task {self.task!r}; there is arithmetic")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, got {self.num_generations}")
        for name in ("max_completion_len", "temperature", "difficulty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.batch_size % self.num_generations:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --num-generations {self.num_generations}"
            )
        super().__post_init__()


class _Trainer(PlainCheckpoints, GRPOTrainer):
    pass


def grpo(
    args: GRPOArguments, resume: bool = False, rewards: list[tuple[Reward, float]] | None = None
) -> PostTrainingResult:
    """Trains a model on what its own answers earn and writes the run directory.

    Args:
        args: the run.
        resume: go on from the newest checkpoint of `save_path` that verifies.
        rewards: reward functions and their weights; default: `REWARDS`.

    Returns:
        With `mean_reward` of answers to held-out problems, and the mean of each reward by its name.

    Raises:
        ValueError: for what cannot work: in the arguments, model, tokenizer or data, or a device's memory.
        FloatingPointError: if the loss is no longer a number.
    """
    rewards = list(REWARDS) if rewards is None else rewards
    shop = Workshop(args, resume, dropout=False)
    problems, held_out = _read(args)
    room = shop.length - args.max_completion_len
    problems, held_out = (_that_fit(shop.tokenizer, some, room) for some in (problems, held_out))
    if not problems or not held_out:
        raise ValueError(
            f"no problem leaves room for --max-completion-len {args.max_completion_len} in --max-seq-len "
            f"{shop.length} tokens"
        )
    shop.say(f"{len(problems)} problems to train on, {len(held_out)} held out")
    rate = rate_by_size(shop.model, RATE_AT_7B_LORA if args.lora else RATE_AT_7B)
    with quietly():
        config = GRPOConfig(
            **shop.trainer_arguments(rate),
            num_generations=args.num_generations,
            max_completion_length=args.max_completion_len,
            temperature=args.temperature,
            reward_weights=[weight for _, weight in rewards],
        )
        trainer = _Trainer(
            shop.model,
            [reward for reward, _ in rewards],
            config,
            train_dataset=Dataset.from_list(problems),
            processing_class=shop.tokenizer,
            peft_config=shop.adapters(),
        )

    def evaluate(model) -> dict[str, float]:
        return measure_rewards(model, shop.tokenizer, held_out, rewards, args)

    return shop.run(
        trainer,
        evaluate=evaluate,
        describe=lambda m: (
            "held out: " + ", ".join(f"{key.replace('_', ' ')} {v:.3f}" for key, v in m.items())
        ),
        question=held_out[0]["prompt"],
        draw=lambda records, path: draw_measures(
            records, path, f"{args.model}: rewards", {"reward": "reward", "mean_reward": "held out"}
        ),
    )


def _read(args: GRPOArguments) -> tuple[list[dict], list[dict]]:
    """Problems to train on, and those held out."""
    if args.task:
        count = args.limit or ARITHMETIC_PROBLEMS
        return hold_out(arithmetic_problems(count, args.seed, args.difficulty), args.seed, MOST_HELD_OUT)
    problems = load_problems(args.data, args.limit, args.split, args.name)
    if args.eval_data:
        return problems, load_problems(args.eval_data, MOST_HELD_OUT, held_out=True)
    return hold_out(problems, args.seed, MOST_HELD_OUT)


def load_problems(
    source: str,
    limit: int | None = None,
    split: str | None = None,
    name: str | None = None,
    held_out: bool = False,
) -> list[dict]:
    """Reads rows with `question` or `prompt`, and `answer`, as `prompt` (messages) and `answer` (text).

    Raises:
        ValueError: if there is nothing there, or rows have other columns.
    """
    problems = []
    for number, row in enumerate(read_rows(source, split=split, held_out=held_out, name=name), start=1):
        question = row.get("question", row.get("prompt"))
        if question is None or row.get("answer") is None:
            raise ValueError(
                f"{source}, row {number}: no problem: its columns are {', '.join(row)}; expected question or "
                "prompt, and answer"
            )
        prompt = [to_message(message) for message in as_messages(question, "user")]
        problems.append({"prompt": prompt, "answer": str(row["answer"])})
        if len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"{source} is empty: there are no problems in it")
    return problems


def _that_fit(tokenizer: PreTrainedTokenizerBase, problems: list[dict], room: int) -> list[dict]:
    """The problems whose prompts take at most `room` tokens."""
    if not problems or room < 1:
        return []
    prompts = tokenizer.apply_chat_template(
        [problem["prompt"] for problem in problems],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    return [problem for problem, ids in zip(problems, prompts, strict=True) if len(ids) <= room]


def measure_rewards(
    model,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict],
    rewards: list[tuple[Reward, float]],
    args: GRPOArguments,
) -> dict[str, float]:
    """Mean rewards of one sampled answer to each problem, the same chance each time."""
    answers = []
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(args.seed)
        for first in range(0, len(problems), ANSWERED_AT_A_TIME):
            prompts = [problem["prompt"] for problem in problems[first : first + ANSWERED_AT_A_TIME]]
            answers += answer(model, tokenizer, prompts, args.max_completion_len, args.temperature)
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    columns = {key: [problem[key] for problem in problems] for key in problems[0]}
    means, total = {}, 0.0
    for reward, weight in rewards:
        given = reward(completions=completions, prompts=columns["prompt"], **columns)
        means[reward.__name__] = sum(given) / len(given)
        total += weight * means[reward.__name__]
    return {"mean_reward": total, **means}


if __name__ == "__main__":
    from tessera.cli import run

    run(["grpo", *sys.argv[1:]])

"""Benchmark tasks, by lm-evaluation-harness.

What belongs here: a Tessera model as the harness sees it, under the name `tessera`, and running its tasks.
What the harness does well stays there; what differs from its own `hf` model is

- loading is ours: run directories, models of bytes without a tokenizer, refusals in one sentence, and nothing
  asks the Hub;
- a tokenizer without bos and eos (bytes) works: the line break that stands between documents begins one;
- log-probabilities are computed in fp32, whatever the weights are;
- a text that the context cuts is counted, and a request that cannot fit is refused in one sentence.

As a program this file is the harness's own command with the model known to it:

    python -m tessera.evaluation.harness run --model tessera --model_args pretrained=runs/demo --tasks piqa
"""

import contextlib
import copy
import difflib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jinja2
import torch
from datasets.utils.logging import disable_progress_bar
from lm_eval.api.registry import register_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from transformers import set_seed

from tessera.serving.generate import load

from .documents import start_token

# The harness's own, of examples and of sampled texts.
SEED = 1234


@register_model("tessera")
class TesseraLM(HFLM):
    """A Tessera model for lm-evaluation-harness.

    Args:
        pretrained: model directory, run directory, or a loaded model.
        tokenizer: of a loaded model; else the directory's own.
        device: name as torch has it; default: the fastest.
        batch_size: requests at a time.
        max_length: tokens that the model is given at most; default: its context.
        add_bos_token: whether texts begin with bos; default: as the tokenizer does it.
        chat_template_args: for the chat template.

    Raises:
        ValueError: if the model cannot be loaded, or `max_length` is longer than its context.
    """

    def __init__(
        self,
        pretrained,
        tokenizer=None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: dict | None = None,
        max_batch_size: int | None = None,
    ):
        if isinstance(pretrained, (str, os.PathLike)):
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # The harness's command asks for cuda:0 where its user named none.
            pretrained, tokenizer = load(str(pretrained), device=device)
        positions = pretrained.config.max_position_embeddings
        if max_length is not None and not 1 <= int(max_length) <= positions:
            raise ValueError(
                f"the context must be between 1 and the model's {positions} tokens, got {max_length}"
            )
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            # Else the harness adds a token whose id is beyond the vocabulary. Padding is masked: any will do.
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        with _only_errors():
            super().__init__(
                pretrained=pretrained,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size or 64,
                max_length=None if max_length is None else int(max_length),
                softmax_dtype="float32",
                add_bos_token=add_bos_token,
                chat_template_args=chat_template_args,
            )
        self.truncated = 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return start_token(self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many: half the context, at most the harness's 256."""
        return min(256, max(self.max_length // 2, 1))

    def tok_decode(self, tokens, skip_special_tokens: bool = True) -> str | None:
        """Text of ids; none of the end-of-text token that a tokenizer lacks."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues texts until a stop string or the end-of-text token.

        Raises:
            ValueError: if a task wants more new tokens than the context holds beside a prompt.
        """
        for request in requests:
            context, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise ValueError(
                    f"task {request.task_name} generates up to {new} tokens, but the model's context is "
                    f"{self.max_length}: set a smaller max_gen_toks in the task's generation_kwargs"
                )
            self.truncated += len(self.tok_encode(context)) > self.max_length - new
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        for _, context, continuation in requests:
            if not continuation:
                raise ValueError("a task has an answer without tokens, which has no likelihood")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a task has an answer of {len(continuation)} tokens, longer than the model's context of "
                    f"{self.max_length}"
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)


def load_tasks(names: list[str], include_path: str | None = None, num_fewshot: int | None = None) -> TaskDict:
    """Loads tasks with their data.

    Args:
        names: tasks, groups or tags of the harness or of `include_path`, or YAML files.
        include_path: folder of task files.
        num_fewshot: examples before each item, save for tasks that say 0; default: the task's own number.

    Raises:
        ValueError: if the folder or a task does not exist, or a task's data cannot be read or lack a column.
    """
    manager = _index(names, include_path)
    disable_progress_bar()
    try:
        with _only_errors():
            loaded = manager.load(list(names))
    except Exception as error:  # of a task's own code, of the Hub, of `datasets`, of a template
        raise ValueError(f"{', '.join(names)} cannot be loaded: {_reason(error)}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            own = num_fewshot
        task.set_config(key="num_fewshot", value=own or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def run_tasks(
    model,
    tokenizer,
    tasks: TaskDict,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    context: int | None = None,
    chat: bool = False,
) -> tuple[dict[str, dict], int]:
    """Runs tasks.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        tasks: of `load_tasks`; they can be run once.
        limit: items of each task.
        batch_size: requests at a time.
        context: tokens that the model is given at most; default: its context.
        chat: give each item as a user's turn through the chat template, examples as turns before it.

    Returns:
        For each task and group `metrics` (name, with the filter if it has one, -> `value`, and `stderr` or
        None where the harness has none), `items`, `fewshot` and `version`; and how many requests of all tasks
        the context cut.

    Raises:
        ValueError: if an item lacks a column, or does not fit the context.
    """
    harness_model = TesseraLM(model, tokenizer, batch_size=batch_size, max_length=context)
    set_seed(SEED)
    try:
        with _only_errors():
            results = evaluate(
                harness_model,
                task_dict=tasks,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
            )
    except (AssertionError, KeyError, TypeError, IndexError, jinja2.TemplateError) as error:
        # The harness takes task files as they come; what is wrong with one shows in the midst of its work.
        raise ValueError(f"{', '.join(tasks['tasks'])} cannot be run: {_reason(error)}") from error
    entries = {name: _entry(name, metrics, results) for name, metrics in results["results"].items()}
    return entries, harness_model.truncated


def _index(names: list[str], include_path: str | None) -> TaskManager:
    """The harness's index, with every name in it."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"there is no folder {include_path} with task files")
        # The harness's own 14,000 names take seconds to read.
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks and not (name.endswith(".yaml") and Path(name).is_file()):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "lm-eval ls tasks lists all there are"
            raise ValueError(f"there is no task {name}; {hint}")
    return manager


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _entry(name: str, metrics: dict, results: dict) -> dict:
    values = {}
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        stderr = metrics.get(f"{metric}_stderr,{chosen}")
        title = metric if chosen == "none" else f"{metric} ({chosen})"
        values[title] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    return {
        "metrics": values,
        "items": results.get("n-samples", {}).get(name, {}).get("effective"),
        "fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
    }


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Without the harness's remarks on how it is used, and a line for each text that is cut."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

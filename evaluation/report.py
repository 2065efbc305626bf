"""An evaluation from what a user asked for to a report: what was measured, of which weights, with what.

What belongs here: which figures are made of which settings, and their form as JSON and as a table. How a
figure is computed is in the other files of this folder.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tessera import __version__
from tessera.data.hashing import file_sha256
from tessera.serving.generate import load
from tessera.training.checkpoints import find_checkpoint

from .bits_per_byte import text_loss
from .bleu import read_pairs, score_bleu
from .documents import read_held_out
from .perplexity import perplexity

# metric -> what it is measured on
METRICS = {"bpb": "data", "perplexity": "data", "bleu": "bleu_data"}
# Tokens by which the perplexity's window moves, where the context allows it.
STRIDE = 512
LIBRARIES = ("torch", "transformers", "sacrebleu", "lm_eval")


@dataclass
class EvaluationArguments:
    """What to measure, and on what.

    Attributes:
        model: model directory, or a run's.
        data: text or a prepared folder, for `bpb` and `perplexity`.
        column, split, name: where the text is in tables and Hub datasets, as for `read_texts`.
        bleu_data: JSON lines of prompts and references, for `bleu`.
        metrics: of `METRICS`; default: all that data were given for.
        tasks: of lm-evaluation-harness.
        include_path: folder of task files.
        limit: items of each task, and pairs of `bleu_data`, at most.
        num_fewshot: examples before each item; default: the task's own number.
        context: tokens that the model is given at most; default: its context.
        stride: tokens by which the window of `perplexity` moves; default: half the context, at most 512.
        max_new_tokens: of a continuation for `bleu`.
        chat: give tasks and prompts through the chat template.
        batch_size: windows, prompts or requests at a time.
        device: name as torch has it; default: the fastest.
    """

    model: str
    data: str | None = None
    column: str = "text"
    split: str = "test"
    name: str | None = None
    bleu_data: str | None = None
    metrics: tuple[str, ...] | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    context: int | None = None
    stride: int | None = None
    max_new_tokens: int = 128
    chat: bool = False
    batch_size: int = 8
    device: str | None = None

    def __post_init__(self):
        for name in self.metrics or ():
            if name not in METRICS:
                raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
            if getattr(self, METRICS[name]) is None:
                raise ValueError(f"the metric {name} needs --{METRICS[name].replace('_', '-')}")
        if self.metrics is None:
            self.metrics = tuple(name for name, needs in METRICS.items() if getattr(self, needs) is not None)
        if not self.metrics and not self.tasks:
            raise ValueError("there is nothing to measure: give --data, --bleu-data or --tasks")
        for name in ("limit", "context", "stride", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must be 0 or more, got {self.num_fewshot}")


def evaluate(args: EvaluationArguments) -> dict:
    """Measures a model.

    Returns:
        A report that JSON can hold: `model`, `device`, `date`, `versions`, `settings`, and under `results` a
        part for each metric and `tasks`.

    Raises:
        ValueError: if the model or the data cannot be read or do not fit each other. What can be told without
            the model is told before it is loaded.
    """
    folder = find_checkpoint(args.model)
    pairs = read_pairs(args.bleu_data, args.limit) if "bleu" in args.metrics else None
    if args.data is not None and not Path(args.data).exists() and "/" not in args.data:
        raise ValueError(f"there is no file or folder {args.data}")
    if args.tasks:
        from .harness import load_tasks, run_tasks

        tasks = load_tasks(list(args.tasks), args.include_path, args.num_fewshot)
    model, tokenizer = load(str(folder), device=args.device)
    context = _fit_context(args, model.config.max_position_embeddings)
    if args.chat and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {folder} has no chat template; evaluate without --chat")

    results = {}
    if {"bpb", "perplexity"} & set(args.metrics):
        held_out = read_held_out(args.data, tokenizer, column=args.column, split=args.split, name=args.name)
        if "bpb" in args.metrics:
            results["bpb"] = _bits_per_byte(model, held_out.stream, context, args.batch_size)
        if "perplexity" in args.metrics:
            results["perplexity"] = _perplexity(model, tokenizer, held_out.documents, context, args)
    if pairs is not None:
        found = score_bleu(model, tokenizer, pairs, args.max_new_tokens, args.batch_size, args.chat)
        results["bleu"] = {**asdict(found), "pairs": len(pairs)}
    if args.tasks:
        results["tasks"], results["truncated_requests"] = run_tasks(
            model,
            tokenizer,
            tasks,
            limit=args.limit,
            batch_size=args.batch_size,
            context=context,
            chat=args.chat,
        )
    return {
        "model": {
            "path": str(folder),
            "sha256": {file.name: file_sha256(file) for file in sorted(folder.glob("model*.safetensors"))},
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "device": str(model.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "settings": {**asdict(args), "context": context},
        "results": results,
    }


def default_output(model: str) -> Path | None:
    """`eval.json` in the run that a path means; None for a model directory, which stays as it is."""
    path = Path(model)
    if path.suffix == ".safetensors":
        path = path.with_suffix("")
    return path / "eval.json" if find_checkpoint(model) != path else None


def write_report(report: dict, path: str | Path) -> None:
    """Writes a report as JSON, aside and renamed; an earlier one is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)


def format_table(report: dict) -> str:
    """The figures of a report as lines of aligned columns: name, value, standard error, how measured."""
    rows = [("metric", "value", "stderr", "measured on")]
    results = report["results"]
    if found := results.get("bpb"):
        how = f"{found['tokens']:,} tokens, windows of {found['window']} without overlap"
        rows.append(("bits per byte", *_numbers(found["value"], found["stderr"]), how))
    if found := results.get("perplexity"):
        how = f"context {found['context']}, stride {found['stride']}"
        for unit in ("token", "word", "byte"):
            count = f"{found[f'{unit}s']:,} {unit}s, {how}"
            rows.append((f"{unit} perplexity", *_numbers(**found[unit]), count))
    if found := results.get("bleu"):
        value, _ = _numbers(found["score"], None)
        rows.append(("BLEU", value, "", f"{found['pairs']} pairs, 95% within ±{found['interval']:.2f}"))
    for task, entry in results.get("tasks", {}).items():
        details = [f"{entry['items']} items" if entry["items"] else "", f"{entry['fewshot']}-shot"]
        how = ", ".join(part for part in details if part and "None" not in part)
        for metric, numbers in entry["metrics"].items():
            rows.append((f"{task} {metric}", *_numbers(**numbers), how))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{name.ljust(widths[0])}  {value.rjust(widths[1])}  {error.rjust(widths[2])}  {how}".rstrip()
        for name, value, error, how in rows
    ]
    if "bleu" in results:
        lines.append(f"BLEU signature: {results['bleu']['signature']}")
    if cut := results.get("truncated_requests"):
        lines.append(f"{cut} requests were longer than the context and lost their beginning")
    return "\n".join(lines)


def _fit_context(args: EvaluationArguments, positions: int) -> int:
    context = args.context or positions
    if context > positions:
        raise ValueError(f"context {context} is longer than the model's {positions} positions")
    if args.stride is not None and args.stride > context:
        raise ValueError(
            f"stride {args.stride} is longer than the context of {context} tokens: the tokens between two "
            "windows would not be scored"
        )
    return context


def _bits_per_byte(model, stream, context: int, batch_size: int) -> dict:
    loss = text_loss(model, stream.ids, stream.num_bytes, context, batch_size)
    return {
        "value": loss.bits_per_byte,
        "stderr": loss.bits_per_byte_stderr,
        "nats_per_token": loss.nats,
        "tokens": loss.tokens,
        "bytes": loss.num_bytes,
        "window": context,
    }


def _perplexity(model, tokenizer, documents: list, context: int, args: EvaluationArguments) -> dict:
    stride = args.stride or min(STRIDE, max(context // 2, 1))
    found = perplexity(model, tokenizer, documents, context, stride, args.batch_size)
    units = {"token": "tokens", "word": "words", "byte": "num_bytes"}
    values = {name: found.per(unit) for name, unit in units.items()} | {"bits_per_byte": found.bits_per_byte}
    return {
        **{name: {"value": value, "stderr": stderr} for name, (value, stderr) in values.items()},
        "documents": len(documents),
        "tokens": found.tokens,
        "words": found.words,
        "bytes": found.num_bytes,
        "windows": found.windows,
        "context": context,
        "stride": stride,
    }


def _numbers(value, stderr=None) -> tuple[str, str]:
    """A figure and its error as they are shown; the harness also has figures that are texts."""
    shown = _short(value) if isinstance(value, (int, float)) else str(value)
    return shown, "" if stderr is None or not math.isfinite(stderr) else f"±{_short(stderr)}"


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _versions() -> dict[str, str]:
    found = {"tessera": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES if find_spec(name)}


def _finite(value):
    """The same with None for infinities and NaN, which JSON cannot spell."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

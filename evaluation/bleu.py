"""BLEU of what a model writes against references, by sacrebleu.

What belongs here: reading prompts with their references, having a model continue them, and the corpus score
with the signature that makes it comparable.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tessera.data.rows import read_rows
from tessera.serving.generate import Sampling, complete

# Resamples for the interval; sacrebleu's own default.
RESAMPLES = 1000


@dataclass(frozen=True)
class Pair:
    """A prompt and one or more references for what follows it."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU (0 to 100), half the width of its bootstrap 95% interval, and sacrebleu's signature."""

    score: float
    interval: float
    signature: str
    hypotheses: list[str]


def read_pairs(source: str | Path, limit: int | None = None) -> list[Pair]:
    """Reads rows with `prompt` or `source`, and `reference`, `references` or `target`.

    Args:
        source: JSON lines or another table, as for `read_rows`; a reference is a text or a list of texts.
        limit: pairs at most.

    Raises:
        ValueError: if there is no such table, nothing in it, or a row lacks a column.
    """
    rows = enumerate(read_rows(str(source), splits=("test", "validation", "train")), start=1)
    pairs = [_to_pair(row, f"{source}, row {number}") for number, row in islice(rows, limit)]
    if not pairs:
        raise ValueError(f"{source} holds no pairs of prompt and reference")
    return pairs


def _to_pair(row: dict, where: str) -> Pair:
    prompt = next((row[key] for key in ("prompt", "source") if key in row), None)
    references = next((row[key] for key in ("references", "reference", "target") if key in row), None)
    if isinstance(references, str):
        references = [references]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: expected a text under prompt or source; there are {', '.join(row)}")
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise ValueError(
            f"{where}: expected a text, or a list of texts, under reference, references or target; there are "
            f"{', '.join(row)}"
        )
    return Pair(prompt, tuple(references))


def score_bleu(
    model, tokenizer, pairs: list[Pair], max_new_tokens: int = 128, batch_size: int = 8, chat: bool = False
) -> Bleu:
    """BLEU of greedy continuations.

    sacrebleu compares lines: where all references are single lines, a continuation ends with its first line.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        pairs: prompts and references.
        max_new_tokens: length of a continuation at most.
        batch_size: prompts at a time.
        chat: give each prompt as a user's turn through the chat template.

    Raises:
        ValueError: if a prompt leaves no room in the model's context.
    """
    prompts = [pair.prompt for pair in pairs]
    if chat:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)
    hypotheses = []
    for i in range(0, len(prompts), batch_size):
        hypotheses += complete(model, tokenizer, prompts[i : i + batch_size], sampling)
    hypotheses = [text.strip() for text in hypotheses]
    if not any("\n" in reference.strip() for pair in pairs for reference in pair.references):
        hypotheses = [text.partition("\n")[0].rstrip() for text in hypotheses]
    return corpus_bleu(hypotheses, [pair.references for pair in pairs])


def corpus_bleu(hypotheses: list[str], references: list[tuple[str, ...]]) -> Bleu:
    """sacrebleu's corpus BLEU with its defaults; texts may have different numbers of references."""
    from sacrebleu import BLEU

    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    metric = BLEU()
    score = metric.corpus_score(hypotheses, streams, n_bootstrap=RESAMPLES)
    signature = str(metric.get_signature())
    interval = json.loads(score.format(width=6, signature=signature, is_json=True)).get("confidence_var", 0.0)
    return Bleu(score.score, interval, signature, hypotheses)

"""What a result has to pass before it is kept.

What belongs here: the list of comparisons and their order, the cheap ones first. Numbers are compared in
`verify.py`, some of the layers chosen in `samples.py`, tokenizers compared in `tokenizer_checks.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .families import architecture
from .outlines import outline
from .report import Check
from .rules import name_some
from .samples import build_sample, choose_layers, free_memory, layers_for_all_kinds, memory_needed
from .sources import open_checkpoint
from .targets import Written
from .tokenizer_checks import compare_tokenizers
from .verify import (
    Difference,
    build_model,
    difference,
    is_tied,
    noise,
    random_ids,
    require_same_weights,
    round_weights,
    run_model,
)

KINDS = ("full", "sample", "weights")
# Ids of the sample text that are run.
_TEXT = 96


@dataclass
class Verdict:
    """What came out of the comparisons.

    Attributes:
        checks: all of which passed.
        notes: what was not compared, and why.
        difference: of logits in fp32, on random ids and on text; None where they were not compared.
    """

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    difference: Difference | None = None

    def add(self, *checks: Check) -> None:
        """Takes checks, and refuses the result for the first that is not passed."""
        for check in checks:
            self.checks.append(check)
            if not check.passed:
                raise ValueError(f"the result is not the same model: {check}; nothing is kept")


def accept(
    written: Written,
    own: Callable[[Written], list[Check]] | None,
    rounding: torch.dtype | None,
    kind: str | None = None,
    memory: int | None = None,
) -> Verdict:
    """Compares a result with its source.

    Args:
        written: the result.
        own: the target's own comparison, in place of these.
        rounding: dtype that the source's weights were rounded to.
        kind: one of `KINDS`; default: as much as memory allows.
        memory: bytes that models may take; default: what is free.

    Raises:
        ValueError: for the first comparison that does not come out.
    """
    verdict = Verdict()
    if own is not None:
        verdict.add(*own(written))
        return verdict
    result = open_checkpoint(written.folder)
    verdict.add(_names_and_shapes(written.tensors, result.tensors))
    require_same_weights(written.tensors, result.tensors)
    verdict.add(Check("weights, read back", True, "equal bit for bit"), _configuration(written, result))
    verdict.add(*_side_files(written.source, result))
    checks, notes, text = compare_tokenizers(written.source, result)
    verdict.add(*checks)
    verdict.notes += notes
    if kind != "weights":
        _compare_logits(verdict, written, result, rounding, text, _choose(verdict, written, kind, memory))
    return verdict


def compare_models(
    source: Checkpoint, result: Checkpoint, written: Written, kind: str | None, memory: int | None
) -> None:
    """Compares the logits of two checkpoints and nothing else.

    Args:
        source, result: to compare.
        written: for its configuration and device.
        kind, memory: as in `accept`.

    Raises:
        ValueError: if they differ.
    """
    if kind != "weights":
        verdict, pair = Verdict(), replace(written, source=source)
        _compare_logits(verdict, pair, result, None, [], _choose(verdict, pair, kind, memory))


def _names_and_shapes(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Check:
    one, other = ({name: _form(tensors, name) for name in tensors} for tensors in (expected, found))
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if wrong:
        return Check("names and shapes", False, f"{len(wrong)} tensors differ ({name_some(wrong)})")
    return Check("names and shapes", True, f"{len(one)} tensors, equal both ways")


def _form(tensors: Mapping[str, torch.Tensor], name: str) -> tuple:
    meta = outline(tensors, name)
    return meta.dtype, meta.shape


def _configuration(written: Written, result: Checkpoint) -> Check:
    expected, found = architecture(written.config), architecture(result.config)
    # A field that one side has no use for says nothing that another does not say.
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    return Check("configuration", not wrong, f"{', '.join(wrong)} differ" if wrong else "read back, equal")


def _side_files(source: Checkpoint, result: Checkpoint) -> list[Check]:
    """Tokenizer, template and generation settings are the source's."""
    files = source.side_files
    if not files:
        return []
    names = [str(file.relative_to(source.folder)) for file in files]
    wrong = [
        name
        for name in names
        if not (result.folder / name).is_file()
        or (result.folder / name).read_bytes() != (source.folder / name).read_bytes()
    ]
    checks = [Check("files beside the weights", not wrong, ", ".join(wrong) or f"{len(files)}, equal bytes")]
    for name in {"generation_config.json"}.intersection(names):
        same = read_json(source.folder / name) == read_json(result.folder / name)
        checks.append(Check("generation settings", same, "equal" if same else "differ"))
    return checks


def _choose(verdict: Verdict, written: Written, kind: str | None, memory: int | None) -> list[int] | None:
    """The layers to run, an empty list for all of them; None, with a note, if not even a few fit.

    Who asked for a sample gets one or an error.
    """
    config = written.config
    memory = free_memory() if memory is None else memory
    if kind == "full" or (kind is None and memory_needed(config) <= memory):
        return []
    wanted = layers_for_all_kinds(config)
    for count in range(wanted, 0, -1):
        if memory_needed(config, count) <= memory and (layers := choose_layers(config, count)):
            of_all = f"layers {', '.join(map(str, layers))} of {config.num_hidden_layers}"
            verdict.notes.append(f"logits are compared on a sample: {of_all}")
            return layers
    figures = (
        f"{memory_needed(config, 1):,} bytes of memory are needed for one layer, {memory:,} may be taken"
    )
    if kind is not None:
        raise ValueError(f"--verify {kind} is not possible: {figures}; nothing is kept")
    verdict.notes.append(f"logits are not compared: {figures}")
    return None


def _compare_logits(
    verdict: Verdict,
    written: Written,
    result: Checkpoint,
    rounding: torch.dtype | None,
    text: list[int],
    layers: list[int] | None,
) -> None:
    if layers is None:
        return
    try:
        _run_and_compare(verdict, written, result, rounding, text, layers)
    except (RuntimeError, IndexError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # The last is how oneDNN says it.
        if isinstance(error, MemoryError) or re.search("memory|create a primitive", str(error)):
            raise ValueError(
                "memory is not enough to compare logits: name less with --verify-memory, or choose "
                f"--verify sample or weights ({reason})"
            ) from error
        # A configuration can fit the weights and still make no model.
        raise ValueError(f"source or result does not run: {reason}; nothing is kept") from error


def _run_and_compare(
    verdict: Verdict,
    written: Written,
    result: Checkpoint,
    rounding: torch.dtype | None,
    text: list[int],
    layers: list[int],
) -> None:
    config, source = written.config, written.source

    def build(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        model = build_sample(checkpoint, layers, dtype) if layers else build_model(checkpoint, dtype)
        if is_tied(model) != config.tie_word_embeddings:
            tied = "untied" if config.tie_word_embeddings else "tied"
            verdict.add(Check("tied head", False, f"{tied} in {type(model).__name__}"))
        return model

    batches = random_ids(config)
    count = len(batches)
    if text:
        batches.append(torch.tensor([text[: min(_TEXT, config.max_position_embeddings)]]))
    run = partial(run_model, batches=batches, device=written.device)

    model = build(source, torch.float32)
    exact = run(model if rounding is None else round_weights(model, rounding))
    del model
    found = run(build(result, torch.float32))
    verdict.difference = difference(exact, found)
    for name, part in (("random ids", slice(count)), ("text", slice(count, None))):
        if exact[part]:
            apart = difference(exact[part], found[part])
            if not apart.is_small:
                raise ValueError(
                    f"the result is not the same model: logits differ by up to {apart.largest:.3g}, allowed "
                    f"are {apart.allowed:.3g} (float32, {name}); nothing is kept"
                )
            verdict.add(
                Check(f"logits in float32, {name}", True, f"{apart.largest:.3g}", f"{apart.allowed:.3g}")
            )
    verdict.add(Check("tied head", True, "tied in both" if config.tie_word_embeddings else "in neither"))
    if config.dtype in (torch.bfloat16, torch.float16):
        _compare_in_dtype(verdict, run, build, source, result, exact, config.dtype)


def _compare_in_dtype(verdict, run, build, source, result, exact, dtype: torch.dtype) -> None:
    word = str(dtype).removeprefix("torch.")
    of_source = run(build(source, dtype))
    if not all(torch.isfinite(batch).all() for batch in of_source):
        verdict.notes.append(f"logits in {word} are not compared: those of the source are not finite")
        return
    apart = noise(exact, of_source, run(build(result, dtype)))
    name = f"logits in {word}, distance from float32"
    figure = f"{apart.result:.3g}, the source's {apart.source:.3g}"
    verdict.add(Check(name, apart.is_alike, figure, f"{apart.allowed:.3g}"))

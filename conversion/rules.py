"""Rules that say which tensors of two layouts are the same, and their application in either direction.

A layout is a list of rules. Each names tensors of Tessera (`ours`), those of the other layout that hold the
same numbers (`theirs`), and what is done on the way. The configuration says which names there are, so a rule
list and a configuration give a complete plan: what is missing from a checkpoint, what has no place, and every
step from one to the other, computed when its tensor is asked for. What belongs here: the language and its
application; the lists are in `families/`, `native.py` and `nanochat_original.py`.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .outlines import outline

Tensors = list[torch.Tensor]

# Placeholders of a name: layer, expert, weight or bias, and whatever is left.
_PLACEHOLDERS = {"i": r"(?P<i>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}

# Numbers of layers, in the words of all configurations.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_mtp_layers", "num_nextn_predict_layers")


@dataclass(frozen=True)
class Operation:
    """What is done to tensors on the way out of Tessera, and what undoes it."""

    out: Callable[[Tensors], Tensors]
    back: Callable[[Tensors], Tensors]


def _interleave(first: torch.Tensor, second: torch.Tensor) -> Tensors:
    return [tensor for pair in zip(first, second, strict=True) for tensor in pair]


SAME = Operation(list, list)
TRANSPOSED = Operation(lambda ours: [t.T for t in ours], lambda theirs: [t.T for t in theirs])
# Queries, keys and values in one.
JOINED = Operation(lambda ours: [torch.cat(ours)], lambda theirs: list(theirs[0].chunk(3)))
JOINED_TRANSPOSED = Operation(lambda ours: [torch.cat(ours).T], lambda theirs: list(theirs[0].T.chunk(3)))
# [E, ...] <-> one tensor an expert.
UNSTACKED = Operation(lambda ours: list(ours[0]), lambda theirs: [torch.stack(theirs)])
# [E, 2I, C] <-> gate and up of each expert.
UNSTACKED_PAIRS = Operation(
    lambda ours: _interleave(*ours[0].chunk(2, dim=1)),
    lambda theirs: [torch.cat([torch.stack(theirs[::2]), torch.stack(theirs[1::2])], dim=1)],
)
# One number a layer <-> a vector over the layers.
VECTOR = Operation(lambda ours: [torch.cat(ours)], lambda theirs: list(theirs[0].split(1)))


def repeated(count: int) -> Operation:
    """One tensor <-> as many copies of it."""
    return Operation(lambda ours: ours * count, lambda theirs: theirs[:1])


@dataclass(frozen=True)
class Rule:
    """Tensors of Tessera and of another layout that hold the same numbers.

    `{i}` in a name stands for a layer, `{e}` for an expert, `{p}` for weight or bias, `{rest}` for anything.
    A placeholder on one side alone means all its values: `{e}` on theirs lists the experts, `{i}` on ours
    gathers the layers.

    Attributes:
        ours, theirs: names, one or several.
        operation: from ours to theirs and back.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    operation: Operation = SAME


@dataclass(frozen=True)
class Step:
    """One application of a rule: the tensors of both sides by their full names."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operation: Operation


def model_shapes(config: TesseraConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint of this configuration; a tied head is not one."""
    return dict(_model_shapes(config.to_json_string(use_diff=False)))


# To build a model, even one without memory, takes longer than to convert a small one, which asks some times.
@functools.lru_cache(maxsize=8)
def _model_shapes(config_json: str) -> dict[str, torch.Size]:
    config = hold_predictions_ahead(TesseraConfig.from_dict(json.loads(config_json)))
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in TesseraForCausalLM(config).state_dict(keep_vars=True).items()
        }
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def hold_predictions_ahead(config: TesseraConfig) -> TesseraConfig:
    """The configuration with which a model has in memory all layers that its checkpoint has."""
    config = copy.deepcopy(config)
    config.train_mtp = config.num_mtp_layers > 0
    return config


def make_plan(config: TesseraConfig, rules: list[Rule]) -> list[Step]:
    """Spells a list of rules out for a configuration. Of several rules for a tensor the first one counts.

    Raises:
        ValueError: if a tensor of the model has no rule, so the other layout has no place for it.
    """
    left = dict.fromkeys(model_shapes(config))
    plan = []
    for rule in rules:
        ours, theirs = _as_tuple(rule.ours), _as_tuple(rule.theirs)
        pattern = _compile(ours[0])
        groups: dict[tuple, list[str]] = {}
        for name in left:
            if found := pattern.fullmatch(name):
                values = found.groupdict()
                key = tuple((k, v) for k, v in values.items() if "{" + k + "}" in theirs[0])
                groups.setdefault(key, []).extend(name.format(**values) for name in ours)
        for key, names in groups.items():
            experts = range(config.n_routed_experts) if "{e}" in theirs[0] else [0]
            others = tuple(name.format(e=e, **dict(key)) for e in experts for name in theirs)
            plan.append(Step(tuple(names), others, rule.operation))
            for name in names:
                del left[name]
    if left:
        raise ValueError(f"the target has no place for {name_some(left)}")
    return plan


class Changed(Mapping):
    """Tensors under the same names, each changed by a function of name and tensor when asked for."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], change: Callable[[str, torch.Tensor], torch.Tensor]
    ):
        self._tensors, self._change = tensors, change

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._change(name, self._tensors[name])

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        return self._change(name, outline(self._tensors, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Renamed(Mapping):
    """Some of the tensors under new names.

    Args:
        tensors: under their old names.
        names: new name -> old name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: dict[str, str]):
        self._tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self.names[name]]

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        return outline(self._tensors, self.names[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Translated(Mapping):
    """Tensors under the names of the other side of a plan, computed when asked for.

    Iterate in the plan's own order: then each step runs once, and no more than its tensors are in memory.

    Args:
        tensors: of the side that there is.
        plan: steps between the two.
        out: whether `tensors` are Tessera's and theirs are wanted, or the other way round.
        shapes: what the results must have, where known.
    """

    tensors: Mapping[str, torch.Tensor]
    plan: list[Step]
    out: bool
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)

    def __post_init__(self):
        self._steps = {name: step for step in self.plan for name in (step.theirs if self.out else step.ours)}
        self._last: tuple[Step | None, dict[str, torch.Tensor]] = (None, {})
        self._last_outlines = self._last

    def __getitem__(self, name: str) -> torch.Tensor:
        step = self._steps[name]
        if self._last[0] is not step:
            # First without the last one's, so that no two are in memory.
            self._last = (None, {})
            self._last = (step, self._run(step, self.tensors.__getitem__))
        return self._last[1][name]

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        step = self._steps[name]
        if self._last_outlines[0] is not step:
            self._last_outlines = (step, self._run(step, lambda other: outline(self.tensors, other)))
        return self._last_outlines[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def _run(self, step: Step, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        sources, targets = (step.ours, step.theirs) if self.out else (step.theirs, step.ours)
        operation = step.operation.out if self.out else step.operation.back
        tensors = [read(name) for name in sources]
        if len(kinds := {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}) > 1:
            # Joined they would all take the widest, and come apart as something else.
            raise ValueError(f"{name_some(sources)} belong together but are {' and '.join(sorted(kinds))}")
        try:
            results = dict(zip(targets, operation(tensors), strict=True))
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = [tuple(tensor.shape) for tensor in tensors[:3]]
            raise ValueError(f"{name_some(sources)} has an unexpected shape {shapes}") from error
        for name, tensor in results.items():
            expected = self.shapes.get(name, tensor.shape)
            if tensor.shape != expected:
                raise ValueError(
                    f"{name_some(sources)} gives a tensor of shape {tuple(tensor.shape)}, but the "
                    f"configuration says {tuple(expected)}"
                )
        return results


def to_ours(theirs: Mapping[str, torch.Tensor], config: TesseraConfig, rules: list[Rule]) -> Translated:
    """A checkpoint of another layout under Tessera's names.

    Raises:
        ValueError: if it lacks tensors, or has some that Tessera has no place for; when a tensor is read, if
            its shape is not what the configuration says.
    """
    one_by_one = any("{e}" in name for rule in rules for name in _as_tuple(rule.theirs))
    if one_by_one and config.mlp_layer_types.count("sparse") * config.n_routed_experts > len(theirs):
        raise ValueError(
            f"the configuration says {config.n_routed_experts} experts in each layer that has some, but the "
            f"checkpoint has only {len(theirs)} tensors"
        )
    plan = make_plan(config, rules)
    expected = {name for step in plan for name in step.theirs}
    missing = [name for name in expected if name not in theirs]
    extra = [name for name in theirs if name not in expected]
    problems = [
        f"{len(names)} {kind} tensors ({name_some(names)})" if len(names) > 1 else f"{kind} {names[0]}"
        for kind, names in (("missing", sorted(missing)), ("unexpected", sorted(extra)))
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit its configuration: {', '.join(problems)}")
    return Translated(theirs, plan, out=False, shapes=model_shapes(config))


def to_theirs(ours: Mapping[str, torch.Tensor], config: TesseraConfig, rules: list[Rule]) -> Translated:
    """Tensors of a Tessera model under the names of another layout.

    Raises:
        ValueError: if the layout has no place for one.
    """
    return Translated(ours, make_plan(config, rules), out=True)


def require_depth(names: Iterable[str], layer: str, depth: int, what: str) -> None:
    """Compares a number of layers with the names in a file, before anything of that size is made.

    Args:
        names: of tensors.
        layer: pattern that finds the number of a layer at the beginning of a name.
        depth: the number of layers that is said.
        what: says it.

    Raises:
        ValueError: if the tensors are of more or fewer layers.
    """
    found = {int(match[1]) for match in (re.match(layer, name) for name in names) if match}
    if max(found, default=-1) + 1 != depth:
        raise ValueError(f"{what} is {depth}, but the tensors are of {max(found, default=-1) + 1} layers")


def require_layers(values: Mapping[str, Any], names: Collection[str], what: str) -> None:
    """Refuses more layers than there are tensors, before anything of that size is made.

    Args:
        values: of a configuration, as its file has them.
        names: of the tensors; each layer has one at least.
        what: the file.

    Raises:
        ValueError: naming the field.
    """
    for key in _DEPTHS:
        depth = values.get(key)
        if isinstance(depth, int | float) and depth > len(names):
            raise ValueError(f"{key} in {what} is {depth}, but there are only {len(names)} tensors")


def name_some(names) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _compile(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", pattern)
    # Every second part is the name of a placeholder.
    return re.compile("".join(_PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts)))

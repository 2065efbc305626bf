"""Which parameter of a model gets which rule, rate and decay, and the optimizer that has them.

What belongs here: groups and their settings. The optimizer itself is in `mixed.py`, its rules in
`muon.py` and `adamw.py`.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from . import low_precision, muon
from .mixed import MuonAdamW
from .muon import orthogonalize

__all__ = ["MuonAdamW", "build_optimizer", "describe", "orthogonalize"]

KINDS = ("muon", "adamw", "adamw-8bit")

MATRIX_RATE = 0.02  # nanochat's, for Muon
ADAMW_RATE = 1e-3
# AdamW beside it: learning rate, betas, eps and decay of each group. With nanochat's start the embedding is
# normed right away and has a large spread, and the head starts near zero: these are nanochat's settings, the
# rates for a width of 768 and a batch of 2^19 tokens. Other starts take the usual ones.
NANOCHAT_GROUPS = {
    "embeddings": (0.3, (0.8, 0.995), 1e-10, 0.001),
    "value embeddings": (0.15, (0.8, 0.995), 1e-10, 0.01),
    "head": (0.008, (0.8, 0.96), 1e-10, 0.01),
    "scalars": (0.02, (0.8, 0.95), 1e-10, 0.0),
}
# Shares of `table_decay`, in nanochat's proportion.
TABLE_DECAYS = {"embeddings": 0.1, "value embeddings": 1.0}
PLAIN_GROUPS = dict.fromkeys(NANOCHAT_GROUPS, (3e-3, (0.8, 0.95), 1e-10, 0.0))


def build_optimizer(
    model: nn.Module,
    kind: str = "muon",
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    *,
    momentum: float = 0.95,
    muon_features: list[str] | None = None,
    table_scale: float = 1.0,
    table_decay: float | None = None,
    weights: str = "fp32",
    moments: str = "fp32",
    seed: int = 0,
    compiled: bool | None = None,
) -> MuonAdamW:
    """The optimizer of a Tessera model, with each parameter in its group.

    Args:
        model: the model, unwrapped.
        kind: "muon", "adamw" or "adamw-8bit" (moments in eight bits, by bitsandbytes).
        learning_rate: of the matrices; for Muon the rates of all other groups keep their ratio to it.
            Default: 0.02 for Muon (nanochat), 1e-3 for AdamW.
        weight_decay: decoupled, on matrices; under AdamW on embeddings too. Muon's groups for nanochat's
            start have small ones of their own beside it.
        momentum: of Muon.
        muon_features: those of `muon.FEATURES` that Muon uses; default: all.
        table_scale: factor on the rates of embeddings and head beside Muon, for another width than they were
            found at; see `scaling.table_scale`.
        table_decay: decay of value embeddings beside Muon, of which other embeddings have a tenth; default:
            0.01 for nanochat's start and 0 for others. Tables learn by heart what a small corpus repeats.
        weights: "fp32" leaves parameters as they are; "bf16" and "split" make them bf16 that learns as fp32
            does, see `low_precision.py`.
        moments: "fp32" or "bf16", of the moments beside such weights; in bf16 they are rounded by chance.
        seed: of the chances.
        compiled: whether updates are compiled; default: on CUDA, where it pays.

    Raises:
        ValueError: for another kind, feature, or form of the weights, or if a library is missing.
    """
    if kind not in KINDS:
        raise ValueError(
            f"optimizer must be {', '.join(map(repr, KINDS[:-1]))} or '{KINDS[-1]}', got '{kind}'"
        )
    features = muon.FEATURES if muon_features is None else tuple(muon_features)
    for feature in features:
        if feature not in muon.FEATURES:
            raise ValueError(f"muon_features are some of {', '.join(muon.FEATURES)}; got '{feature}'")
    if weights not in low_precision.WEIGHTS:
        raise ValueError(f"weights must be {', '.join(map(repr, low_precision.WEIGHTS))}, got '{weights}'")
    if moments not in ("fp32", "bf16"):
        raise ValueError(f"moments must be 'fp32' or 'bf16', got '{moments}'")
    if moments == "bf16" and (weights == "fp32" or kind == "adamw-8bit"):
        raise ValueError(
            f"moments 'bf16' are for weights 'bf16' or 'split' and whole moments, got weights '{weights}' "
            f"and optimizer '{kind}'; leave moments at 'fp32'"
        )
    if table_decay is not None and kind != "muon":
        raise ValueError(
            f"table_decay is of the tables beside muon; optimizer '{kind}' has weight_decay for them"
        )
    if kind == "muon":
        groups = _muon_groups(model, learning_rate, weight_decay, momentum, features, table_scale)
        _decay_tables(groups, table_decay)
    else:
        groups = _adamw_groups(model, kind, learning_rate, weight_decay)
    dtype = torch.bfloat16 if moments == "bf16" else torch.float32
    optimizer = MuonAdamW(groups, weights, dtype, seed, compiled)
    if weights != "fp32":
        low_precision.narrow_parameters(model)
    return optimizer


def _adamw_groups(
    model: nn.Module, kind: str, learning_rate: float | None, weight_decay: float
) -> list[dict]:
    rate = ADAMW_RATE if learning_rate is None else learning_rate
    named = list(model.named_parameters())
    groups = [
        {"name": "matrices", "params": [each for each in named if each[1].ndim >= 2], "kind": kind},
        {"name": "vectors", "params": [each for each in named if each[1].ndim < 2], "kind": kind},
    ]
    for group, decay in zip(groups, (weight_decay, 0.0), strict=True):
        group.update(lr=rate, weight_decay=decay)
    return [group for group in groups if group["params"]]


def _muon_groups(
    model: nn.Module,
    learning_rate: float | None,
    weight_decay: float,
    momentum: float,
    features: tuple[str, ...],
    table_scale: float,
) -> list[dict]:
    scale = 1.0 if learning_rate is None else learning_rate / MATRIX_RATE
    settings = NANOCHAT_GROUPS if model.config.initializer == "nanochat" else PLAIN_GROUPS
    sorted_out = defaultdict(list)
    for name, p in model.named_parameters():
        sorted_out[_group_of(name, p)].append((name, p))
    groups = []
    for name, params in sorted_out.items():
        group = {"name": name, "params": params}
        if name in ("matrices", "fused matrices"):
            group.update(kind="muon", lr=MATRIX_RATE, weight_decay=weight_decay, momentum=momentum)
            group.update(features=features, parts=2 if name == "fused matrices" else 1)
        else:
            rate, betas, eps, decay = settings[name]
            rate *= table_scale if name != "scalars" else 1.0
            group.update(kind="adamw", lr=rate, betas=betas, eps=eps, weight_decay=decay)
        group["lr"] *= scale
        groups.append(group)
    return groups


def _decay_tables(groups: list[dict], decay: float | None) -> None:
    for group in groups if decay is not None else []:
        if group["name"] in TABLE_DECAYS:
            group["weight_decay"] = decay * TABLE_DECAYS[group["name"]]


def _group_of(name: str, p: nn.Parameter) -> str:
    """Muon takes what maps the residual stream to and from; tables, heads, gates and vectors do not."""
    if "value_embed." in name:
        return "value embeddings"
    if "embed_tokens" in name or "embed_positions" in name:
        return "embeddings"
    if "lm_head" in name:
        return "head"
    if p.ndim < 2 or name.endswith((".gate.weight", "value_gate.weight")):
        return "scalars"
    return "fused matrices" if name.endswith("gate_up_proj") else "matrices"


def describe(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A row for each group, to be shown before a run: `group`, `parameters`, `tensors`, `rule`, `lr`,
    `decay`."""
    rows = []
    for i, group in enumerate(optimizer.param_groups):
        kind = group.get("kind", type(optimizer).__name__)
        rule = {"muon": "Muon", "adamw": "AdamW", "adamw-8bit": "AdamW, 8 bits"}.get(kind, kind)
        if kind == "muon":
            rule += f", momentum {group['momentum']:g}"
            off = [feature for feature in muon.FEATURES if feature not in group["features"]]
            rule += f", without {', '.join(off)}" if off else ""
        elif "betas" in group:
            rule += f", betas {group['betas'][0]:g} {group['betas'][1]:g}"
        rows.append(
            {
                "group": group.get("name", str(i)),
                "parameters": sum(p.numel() for p in group["params"]),
                "tensors": len(group["params"]),
                "rule": rule,
                "lr": float(group["lr"]),
                "decay": float(group["weight_decay"]),
            }
        )
    return rows


def describe_as_text(optimizer: torch.optim.Optimizer) -> str:
    """The rows as a table of plain text."""
    shown = [("group", "parameters", "tensors", "rule", "lr", "decay")]
    for row in describe(optimizer):
        numbers = f"{row['parameters']:,}", f"{row['tensors']:,}"
        shown.append((row["group"], *numbers, row["rule"], f"{row['lr']:.3g}", f"{row['decay']:.3g}"))
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    lines = []
    for line in shown:
        cells = [
            cell.rjust(width) if i in (1, 2, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""Optimizers of the trainer: AdamW, and Muon for the matrices with AdamW for the rest, as one optimizer.

What belongs here: update rules, and which parameter gets which. torch has a Muon too (`torch.optim.Muon`); it
takes one matrix at a time and iterates in bf16, which a CPU emulates. This one stacks matrices of one shape
and iterates in fp32 where bf16 is not native, and takes the stacked experts of a mixture as the matrices they
are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

# Coefficients of five Newton-Schulz steps that push all singular values towards 1: Polar Express (Amsel et
# al., 2025, algorithm 1), with the margin that nanochat uses.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

MATRIX_RATE = 0.02  # nanochat's, for Muon
# AdamW's rates beside it. With nanochat's start the embedding is normed right away and has a large spread,
# and the head starts near zero; they learn at nanochat's rates. Other starts take the usual ones.
NANOCHAT_RATES = {"embeddings": 0.3, "value embeddings": 0.15, "head": 0.008, "scalars": 0.02}
PLAIN_RATES = {"embeddings": 3e-3, "value embeddings": 3e-3, "head": 3e-3, "scalars": 3e-3}


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of each matrix's polar decomposition, approximately: U V^T of its SVD.

    Args:
        matrices: [N, ..., m, n]; iterated in bf16 on CUDA and in fp32 elsewhere.

    Returns:
        [N, ..., m, n] in the dtype of the iteration, singular values within 0.15 of one (of those that were
        not vanishing).
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).flatten(0, -3)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for groups with `kind="muon"`, AdamW (Loshchilov and Hutter, 2019) for the
    others.

    Muon: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)), decoupled weight decay. A
    parameter with more than two dimensions is a stack of matrices; a group's `parts` says how many matrices
    share the rows of each (2 for a fused gate and up projection).

    Args:
        groups: parameter groups with `kind`; `lr` for both kinds; `momentum`, `parts` for Muon; `betas`,
            `eps` for AdamW; `weight_decay` for both.
    """

    def __init__(self, groups: Iterable[dict]):
        defaults = {
            "kind": "adamw",
            "lr": 1e-3,
            "momentum": 0.95,
            "parts": 1,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["kind"] == "muon":
                self._muon(group, params)
            else:
                self._adamw(group, params)
        return loss

    def _muon(self, group: dict, params: list[nn.Parameter]) -> None:
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape, p.device].append(p)
        for same in by_shape.values():
            buffers = []
            for p in same:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            grads = [p.grad for p in same]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
            # [parameters, ..., parts, rows, columns]
            updates = updates.unflatten(-2, (group["parts"], -1))
            rows, columns = updates.shape[-2:]
            scale = max(1.0, rows / columns) ** 0.5
            updates = orthogonalize(updates).flatten(-3, -2).to(same[0].dtype)
            if group["weight_decay"]:
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(updates.unbind(0)), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict, params: list[nn.Parameter]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(
    model: nn.Module, kind: str = "muon", learning_rate: float | None = None, weight_decay: float = 0.0
) -> MuonAdamW:
    """The optimizer of a Tessera model, with each parameter in its group.

    Args:
        model: the model, unwrapped.
        kind: "muon" or "adamw".
        learning_rate: of the matrices; for Muon the rates of all other groups keep their ratio to it.
            Default: 0.02 for Muon (nanochat), 1e-3 for AdamW.
        weight_decay: decoupled, on matrices; under AdamW on embeddings too.

    Raises:
        ValueError: for another kind.
    """
    if kind == "adamw":
        rate = 1e-3 if learning_rate is None else learning_rate
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"name": "matrices", "params": decayed, "lr": rate, "weight_decay": weight_decay},
            {"name": "vectors", "params": others, "lr": rate},
        ]
        return MuonAdamW([group for group in groups if group["params"]])
    if kind != "muon":
        raise ValueError(f"optimizer must be 'muon' or 'adamw', got '{kind}'")
    scale = 1.0 if learning_rate is None else learning_rate / MATRIX_RATE
    rates = NANOCHAT_RATES if model.config.initializer == "nanochat" else PLAIN_RATES
    groups = defaultdict(list)
    for name, p in model.named_parameters():
        groups[_group_of(name, p)].append(p)
    built = []
    for name, params in groups.items():
        if name in ("matrices", "fused matrices"):
            group = {"kind": "muon", "lr": MATRIX_RATE, "weight_decay": weight_decay}
            group["parts"] = 2 if name == "fused matrices" else 1
        else:
            group = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "lr": rates[name]}
        built.append({"name": name, "params": params, **group, "lr": group["lr"] * scale})
    return MuonAdamW(built)


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

"""Initial weights: four schemes over the roles that modules declare.

A module says what it is by an attribute `init_role` (a `Linear` without one is a plain input projection),
because transformers initialises leaf by leaf and a leaf cannot see its parent. All draws go through
`transformers.initialization`, which leaves weights that were loaded from a checkpoint alone. What belongs
here: a scheme, a role, or the starting value of a scalar.

| scheme | linear | residual output | head | embedding | source |
|---|---|---|---|---|---|
| normal | N(0, r) | N(0, r) | N(0, r) | N(0, r) | Hugging Face's default; r is `initializer_range` |
| gpt2 | N(0, r) | N(0, r / sqrt(2 L)) | N(0, r) | N(0, r) | Radford et al., 2019, section 2.3 |
| bytegpt | Xavier uniform | Xavier uniform | Xavier uniform | U(-0.666, 0.666) | ByteGPT |
| nanochat | U(+-sqrt(3 / fan in)) | 0 | N(0, 0.001) | N(0, 0.8) | nanochat; feed-forward input x 0.4 |
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_tessera import TesseraConfig
from .feed_forward import TesseraExperts, TesseraRouter, TesseraUngatedExperts
from .layers import TesseraGate, TesseraSmear


def initialize(module: nn.Module, config: TesseraConfig) -> None:
    """Initialises the parameters that `module` itself owns, by the configuration's scheme."""
    if isinstance(module, nn.Linear):
        _matrix(module.weight, getattr(module, "init_role", "input"), config)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        _embedding(module.weight, getattr(module, "init_role", "embedding"), config)
    elif isinstance(module, TesseraRouter):
        _matrix(module.weight, "router", config)
        if module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)
    elif isinstance(module, TesseraExperts):
        _matrix(module.gate_up_proj, "mlp_input", config, stacked=2)
        _matrix(module.down_proj, "residual_output", config)
    elif isinstance(module, TesseraUngatedExperts):
        _matrix(module.up_proj, "mlp_input", config)
        _matrix(module.down_proj, "residual_output", config)
    elif isinstance(module, TesseraGate):
        # Slightly positive, so that gates start a little above neutral (nanochat).
        init.uniform_(module.weight, 0.0, 0.02)
    elif isinstance(module, TesseraSmear):
        init.zeros_(module.strength)


def residual_scalar_start(layer_idx: int, num_layers: int) -> tuple[float, float]:
    """Starting scale of the residual stream and of the embedding mixed into it, for one layer (nanochat)."""
    depth = layer_idx / max(num_layers - 1, 1)
    return 1.15 - 0.10 * depth, 0.20 - 0.15 * depth


BACKOUT_START = 0.2  # nanochat


def _matrix(weight: torch.Tensor, role: str, config: TesseraConfig, stacked: int = 1) -> None:
    """A matrix [..., out, in]; `stacked` matrices may share the output dimension."""
    fan_in, fan_out = weight.shape[-1], weight.shape[-2] // stacked
    if config.initializer == "bytegpt":
        bound = math.sqrt(6 / (fan_in + fan_out))
        init.uniform_(weight, -bound, bound)
    elif config.initializer == "nanochat":
        if role == "residual_output":
            init.zeros_(weight)
        elif role == "head":
            init.normal_(weight, mean=0.0, std=0.001)
        else:
            bound = math.sqrt(3 / fan_in) * (0.4 if role == "mlp_input" else 1.0)
            init.uniform_(weight, -bound, bound)
    else:
        std = config.initializer_range
        if config.initializer == "gpt2" and role == "residual_output":
            std /= math.sqrt(2 * config.num_hidden_layers)
        init.normal_(weight, mean=0.0, std=std)


def _embedding(weight: torch.Tensor, role: str, config: TesseraConfig) -> None:
    if config.initializer == "bytegpt":
        init.uniform_(weight, -0.666, 0.666)
    elif config.initializer == "nanochat" and role == "value_embedding":
        bound = math.sqrt(3 / config.hidden_size)
        init.uniform_(weight, -bound, bound)
    elif config.initializer == "nanochat":
        init.normal_(weight, mean=0.0, std=0.8)
    else:
        init.normal_(weight, mean=0.0, std=config.initializer_range)

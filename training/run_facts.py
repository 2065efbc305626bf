"""What a run tells of itself: its first line, what its report has of model, data and machine, values to log.

What belongs here: reading what others hold, and words for it.
"""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .engine import Engine, describe_groups
from .inputs import Corpus
from .pretrain_arguments import PretrainArguments
from .records.environment import describe_environment
from .records.meter import Meter


def first_line(
    args: PretrainArguments,
    engine: Engine,
    corpora: Sequence[Corpus],
    length: int,
    total_steps: int | None,
) -> str:
    """Model, data, how long and on what, for the start of a run."""
    model, accelerator = engine.model, engine.accelerator
    how_long = f"{total_steps} steps" if total_steps else f"{args.minutes:g} minutes"
    return (
        f"{args.config}: {model.num_parameters():,} parameters, vocabulary {model.config.vocab_size}; "
        f"{sum(len(one.train.ids) for one in corpora):,} tokens to train on, "
        f"{sum(len(one.val.ids) for one in corpora):,} held out; {how_long} of "
        f"{args.batch_size} x {length} tokens on {accelerator.num_processes} x "
        f"{accelerator.device.type} in {engine.precision.compute}, {args.optimizer}"
    )


def facts_of(
    engine: Engine, meter: Meter, corpora: Sequence[Corpus], bits_of_a_nat: float
) -> dict[str, dict[str, str]]:
    """What the report tells of a start: model, data, machine."""
    accelerator: Accelerator = engine.accelerator
    given = engine.args.data_file
    return {
        "model": {
            "parameters": f"{engine.model.num_parameters():,}",
            "operations a token": f"{meter.flops_per_token:.3g}, forward and backward",
            "groups": describe_groups(engine.optimizer),
        },
        "data": {
            "read from": given if isinstance(given, str) else ", ".join(given),
            "tokens to train on": f"{sum(len(one.train.ids) for one in corpora):,}",
            "tokens held out": f"{sum(len(one.val.ids) for one in corpora):,}",
            "bytes a token": f"{1 / (bits_of_a_nat * math.log(2)):.3f}",
        },
        "environment": {
            **describe_environment(accelerator.device, accelerator.num_processes),
            **({"peak for MFU": f"{meter.peak / 1e12:.4g} TFLOP/s"} if meter.peak else {}),
            "precision": str(engine.precision),
            "attention": str(engine.attention),
            "compiled": str(engine.compiles),
            "layout": str(engine.layout),
        },
    }


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates of the last step: that of the first group of matrices, and each group's."""
    groups = optimizer.param_groups
    main = next((group for group in groups if group["name"].endswith("matrices")), groups[0])
    of_each = {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups}
    return {"learning_rate": float(main["lr"]), **of_each}


def balance_of(model: TesseraForCausalLM) -> dict[str, float]:
    """How evenly the experts were used in the last step: the worst layer, and the mean entropy."""
    layers = model.router_statistics()
    if not layers:
        return {}
    entropies = [layer["entropy"] for layer in layers]
    return {
        "router_max_violation": max(layer["max_violation"] for layer in layers),
        "router_entropy": sum(entropies) / len(entropies),
    }

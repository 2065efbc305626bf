"""A smoke run: every stage of a pretraining run, small, to see within a minute or so that all of it works.

What belongs here: what is made small. The run itself is the real one, on the real data, in a directory of its
own beside the real one.
"""

import contextlib
import dataclasses
from typing import Any

from tessera.configs.presets import scale_to_depth
from tessera.modeling.accounting import count_costs
from tessera.modeling.configuration_tessera import TesseraConfig

from .pretrain_arguments import PretrainArguments

STEPS = 5
LENGTH = 64
LAYERS = 2  # where there are two kinds of layers, one of each
MOST_ON_A_CPU = 20_000_000  # parameters: with them two cores are through in half a minute


def small_arguments(args: PretrainArguments, processes: int, resumes: bool) -> PretrainArguments:
    """Five steps of two accumulated micro-batches of one short window on each process, an evaluation and a
    checkpoint among them; resumed, five more.
    """
    folder = args.folder
    return dataclasses.replace(
        args,
        save_path=str(folder.with_name(f"{folder.name}-smoke")),
        epochs=None,
        steps=2 * STEPS if resumes else STEPS,
        minutes=None,
        tokens=None,
        tokens_per_parameter=None,
        flops=None,
        batch_schedule=None,
        length_schedule=None,
        batch_size=2 * processes,
        accumulation=2,
        micro_batch_size=None,
        sequence_length=min(args.sequence_length or LENGTH, LENGTH),
        warmup_steps=None,
        evaluations=1,
        eval_steps=None,
        eval_tokens=4 * LENGTH,
        checkpoint_steps=3,
        sample_tokens=min(args.sample_tokens, 16),
    )


def small_config(config: TesseraConfig, cpu: bool = False) -> TesseraConfig:
    """The first and the last layer of a model, in full width but where a CPU would take minutes for it.

    Args:
        config: of the model.
        cpu: whether a CPU trains it: a larger one then gets the width that the depth rule has for two layers,
            if the rule fits it.
    """
    if config.num_hidden_layers <= LAYERS:
        return config
    small = _first_and_last(config.to_dict(), config)
    if cpu and count_costs(small).parameters > MOST_ON_A_CPU:
        with contextlib.suppress(ValueError):
            return _first_and_last(scale_to_depth(config.to_dict(), LAYERS), config)
    return small


def _first_and_last(values: dict[str, Any], config: TesseraConfig) -> TesseraConfig:
    """Two layers of these sizes and of the kinds of a model's first and last."""
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name)
        values[name] = [kinds[0], kinds[-1]]
    # These layers are then of the kinds of the last one.
    values |= {"mtp_layer_types": None, "mtp_mlp_layer_types": None}
    return TesseraConfig.from_dict({**values, "num_hidden_layers": LAYERS})

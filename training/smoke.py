"""A smoke run: every stage of a pretraining run, small, to see within a minute or so that all of it works.

What belongs here: what is made small. The run itself is the real one, on the real data, in a directory of its
own beside the real one.
"""

import dataclasses

from tessera.modeling.configuration_tessera import TesseraConfig

from .pretrain_arguments import PretrainArguments

STEPS = 5
LENGTH = 64
LAYERS = 2  # where there are two kinds of layers, one of each


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


def small_config(config: TesseraConfig) -> TesseraConfig:
    """The first and the last layer of a model, in full width."""
    if config.num_hidden_layers <= LAYERS:
        return config
    values = config.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        values[name] = [values[name][0], values[name][-1]]
    # These layers are then of the kinds of the last one.
    values |= {"mtp_layer_types": None, "mtp_mlp_layer_types": None}
    return TesseraConfig.from_dict({**values, "num_hidden_layers": LAYERS})

"""A native checkpoint as a model split over the processes of `torchrun`, without joining it first.

transformers' engine asks, tensor by tensor, for the part that its process is to hold; the answer is read from
the files of the ranks that have it. So k files run on n processes, whatever k and n are, and each process
reads about its share. What belongs here: handing the files to the engine. How it splits a model is described
in docs/distributed.md.
"""

import os
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.distributed import DistributedConfig

from tessera.modeling.loading import require_complete
from tessera.modeling.modeling_tessera import TesseraForCausalLM

from .native import open_slices, read_native_config
from .rank_files import RankFiles


def load_sharded(
    folder: str | Path,
    distributed_config: DistributedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    **kwargs,
) -> TesseraForCausalLM:
    """Loads a native checkpoint, each process its part.

    Args:
        folder: directory in the native layout, of any number of ranks; FP8 comes out of it while it is read.
        distributed_config: how the model is split; default: its tensors over all processes that `torchrun`
            started, or not at all in one process. `DistributedConfig(tp_size=2, ep_size=2)` splits experts.
        dtype: of the weights; "auto" keeps the checkpoint's.
        kwargs: for `from_pretrained`.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: if the checkpoint is incomplete or does not fit its configuration, or its sizes cannot be
            split as wanted; before anything large is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no directory {folder}")
    files = RankFiles(folder)
    config = read_native_config(folder, files)
    try:
        slices = open_slices(files, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    if dtype == "auto":
        dtype = config.dtype or slices["model.embed_tokens.weight"].dtype
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed_config is None and processes > 1:
        distributed_config = DistributedConfig(tp_size=processes)
    if distributed_config is not None:
        kwargs["distributed_config"] = distributed_config
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    model, info = TesseraForCausalLM.from_pretrained(
        None, config=config, state_dict=slices, dtype=dtype, output_loading_info=True, **kwargs
    )
    require_complete(model, info, folder)
    model.generation_config = generation
    return model

"""Continuous batching: what transformers' paged cache lacks for a Tessera model.

`generate_batch` packs the new tokens of many requests into one row and keeps keys and values in pages. The
stock path leaves three things open: smear must know the token before the first new one of each request,
soft-capped scores need keys and values read from the pages by hand, and a failed request must not pass for a
short answer. Shapes: T packed new tokens of all requests, S their keys in sight, R requests, H_kv key/value
heads, D head size.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.generation import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from .configuration_tessera import TesseraConfig

logger = logging.get_logger(__name__)

# On a CPU. Each step attends over the keys of all requests in it, seen or masked.
REQUESTS_AT_A_TIME = 16
TOKENS_A_STEP = 1024


class BatchGenerationError(RuntimeError):
    """Some requests of `generate_batch` did not finish.

    Attributes:
        outputs: what transformers returned, by request; those without an `error` are complete.
    """

    def __init__(self, message: str, outputs: dict[str, Any]):
        super().__init__(message)
        self.outputs = outputs


class TesseraContinuousBatching:
    """Continuous batching for every tile; laid before `GenerationMixin` in the bases of the causal model."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs,
    ) -> Any:
        """Makes the manager of the library; see there. With smear, its pages hold one more layer.

        CUDA graphs are left out where the experts cannot be captured (`experts_can_be_captured`).
        """
        if self.device.type == "cuda" and not experts_can_be_captured(self):
            continuous_batching_config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
            if continuous_batching_config.use_cuda_graph:
                logger.warning_once("no CUDA graphs: grouped products of experts are captured in bf16 alone")
            continuous_batching_config.use_cuda_graph = False
        if self.config.smear:
            # With a block table the flash kernels read the pages themselves; smear must be able to.
            continuous_batching_config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
            continuous_batching_config.max_blocks_per_request = 0
        manager = super().init_continuous_batching(
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            **kwargs,
        )
        if self.config.smear:
            _give_one_more_layer(manager)
        return manager

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Generates for many prompts with continuous batching; see `transformers.ContinuousMixin`.

        Args:
            inputs: token ids of each prompt.
            generation_config: default: the model's own.
            continuous_batching_config: pages and batches. Default: the library's on a GPU, which takes what
                memory there is; on a CPU with `max_new_tokens`, pages for a few of the prompts at a time.
            kwargs: `max_new_tokens`, ... as in the library.

        Returns:
            Outputs by request, in the order of the prompts.

        Raises:
            ValueError: if a prompt is empty, has ids outside the vocabulary, or runs past learned positions
                with its `max_new_tokens`.
            BatchGenerationError: if a request failed or is missing; its `outputs` has those that finished.
        """
        settings = self.generation_config if generation_config is None else generation_config
        new = kwargs.get("max_new_tokens") or settings.max_new_tokens
        self._refuse_prompts(inputs, new or 1)
        if continuous_batching_config is None and self.device.type == "cpu" and inputs and new:
            longest = max(map(len, inputs)) + new
            together = min(len(inputs) * (settings.num_return_sequences or 1), REQUESTS_AT_A_TIME)
            continuous_batching_config = _pages_for(self.config, longest, together)
        outputs = super().generate_batch(
            inputs,
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            **kwargs,
        )
        failed = {name: str(output.error) for name, output in outputs.items() if output.error is not None}
        # transformers 5.17 returns one sequence of each prompt.
        several = any("__child#" in name for name in outputs)
        asked = len(inputs) * (settings.num_return_sequences or 1 if several else 1)
        lost = max(asked - len(outputs), 0)
        if failed or lost:
            names = [*failed, *([f"{lost} without an answer"] if lost else [])]
            reasons = "; ".join(sorted(set(failed.values()))) or "the library gave no reason"
            message = f"{len(failed) + lost} of {asked} requests did not finish ({_some(names)}): {reasons}"
            raise BatchGenerationError(message, outputs)
        return outputs

    def _refuse_prompts(self, prompts: list[list[int]], new: int) -> None:
        """Refuses what would fail in the middle and take the other requests with it."""
        empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty:
            raise ValueError(f"every prompt needs at least one token; empty: {_some(empty)}")
        ids = self.config.padded_vocab_size
        strange = [i for i, prompt in enumerate(prompts) if min(prompt) < 0 or max(prompt) >= ids]
        if strange:
            raise ValueError(f"prompts with ids outside the vocabulary of {ids}: {_some(strange)}")
        rows = self.config.max_position_embeddings
        # The last new token is never an input.
        long = [i for i, prompt in enumerate(prompts) if len(prompt) + new - 1 > rows]
        if long and self.config.position_embedding_type == "learned":
            raise ValueError(
                f"with max_new_tokens={new} these prompts run past the {rows} learned positions: "
                f"{_some(long)}; shorten them or ask for fewer tokens"
            )


def experts_can_be_captured(model: nn.Module) -> bool:
    """Whether a CUDA graph can hold the model's experts.

    torch has one kernel for grouped products in bf16. For other dtypes it goes through the experts one by one
    and asks the GPU for their token counts, as the plain loop does; no graph can hold that.
    """
    sparse = "sparse" in model.config.mlp_layer_types
    kind = getattr(model.config, "_experts_implementation", None)
    return not sparse or kind == "batched_mm" or (kind == "grouped_mm" and model.dtype == torch.bfloat16)


def _some(names: list[int | str]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _pages_for(config: TesseraConfig, longest: int, requests: int) -> ContinuousBatchingConfig:
    """Pages that hold so many requests of the longest length."""
    pages = ContinuousBatchingConfig(max_batch_tokens=TOKENS_A_STEP)
    old = not hasattr(pages, "page_size")
    pages.num_blocks = requests * (longest // (pages.block_size if old else pages.page_size) + 1)
    if old:
        # transformers 5.17 counts the blocks of each group of layers, which may be as small as a layer.
        pages.num_blocks *= config.num_hidden_layers + 1
    return pages


def _give_one_more_layer(manager: Any) -> None:
    """Lets the manager make its pages for a configuration with one more layer."""
    create = manager._create_batch_processor

    def create_with_one_more_layer() -> Any:
        model = manager.model
        # Shares everything with the model but the configuration; other threads may use the model meanwhile.
        stand_in = copy.copy(model)
        stand_in.config = copy.deepcopy(model.config)
        stand_in.config.layer_types = [*model.config.layer_types, smear_layer_type(model.config)]
        manager.model = stand_in
        try:
            return create()
        finally:
            manager.model = model

    manager._create_batch_processor = create_with_one_more_layer


def smear_layer_type(config: TesseraConfig) -> str:
    """Type of the layer that smear reads: sliding where there are windows, so that it stays short."""
    return "sliding_attention" if "sliding_attention" in config.layer_types else "full_attention"


def paged_update(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes keys and values [1, H_kv, T, D] to the pages; returns those in sight [1, H_kv, S, D]."""
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "this model reads pages by index; set max_blocks_per_request=0 in its ContinuousBatchingConfig"
        )
    if hasattr(cache, "layer_to_allocator"):
        return cache.update(key, value, layer_idx, dict(kwargs))
    # transformers before 5.20 takes the indices themselves and returns [S, H_kv, D].
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key, value, layer_idx, **indices)
    return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)


def exchange_token_ids(
    config: TesseraConfig, input_ids: torch.Tensor, cache: Any, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Stores the new token ids in one more layer of the pages, and returns the id before each.

    In pages and not in a table beside them, so that ids are shared, copied and moved with the keys of their
    request. An id is written as digits to base 256, which every dtype of a cache holds exactly.

    Args:
        config: of the model; the layer's index is the number of its layers.
        input_ids: [1, T], the requests one after another.
        cache: the paged cache.
        kwargs: what the library passes to a forward with it: lengths and indices.

    Returns:
        [1, T]; without meaning where a request has no token before.
    """
    layer = config.num_hidden_layers
    allocator = cache.layer_to_allocator[layer] if hasattr(cache, "layer_to_allocator") else cache
    heads, width = allocator.num_key_value_heads, config.head_dim
    new = input_ids.shape[1]
    places = [256**i for i in range(4) if 256**i < config.padded_vocab_size]
    states = torch.zeros(new, heads * width, dtype=cache.dtype, device=input_ids.device)
    for i, place in enumerate(places):
        states[:, i] = (input_ids[0] // place % 256).to(cache.dtype)
    states = states.view(new, heads, width).transpose(0, 1).unsqueeze(0)
    seen, _ = paged_update(cache, states, states, layer, kwargs)  # [1, H_kv, S, D]

    ends = kwargs["cu_seq_lens_q"][1:].long()  # [R]
    key_ends = kwargs["cu_seq_lens_k"]
    key_ends = key_ends[smear_layer_type(config)] if isinstance(key_ends, dict) else key_ends
    token = torch.arange(new, device=input_ids.device)
    request = torch.searchsorted(ends, token, right=True).clamp(max=ends.shape[0] - 1)
    # A token stands as far before the end of its request among the keys as among the new tokens.
    own = key_ends[1:].long()[request] - (ends[request] - token)
    before = seen[0].transpose(0, 1).flatten(1)[(own - 1).clamp(min=0, max=seen.shape[2] - 1)]
    return sum(before[:, i].long() * place for i, place in enumerate(places)).unsqueeze(0)

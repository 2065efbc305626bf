"""Decoding on a static cache as one captured step: what `generate(cache_implementation="static")` runs here.

A token of a small model takes the GPU half a millisecond, and the library's loop the CPU a whole one: masks,
copies, a look at the stopping criteria, for each token anew. Here the whole step, from the token before to
the choice of the next, is compiled, captured once as a CUDA graph and replayed; whether all rows have ended
is asked now and then. Where something looks into each step (a streamer, scores to return, a processor that
reads what was written so far), or the cache counts in Python (windows, smear), the library's own loop runs.
What belongs here: that loop, and the conditions for it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .parallel_plans import is_split

# They read the scores alone, and no values on the CPU.
_CAPTURABLE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

# Steps between two looks at whether all rows have ended; as many may be run in vain.
STEPS_BETWEEN_CHECKS = 16

# Compiled calls before the capture: they compile, choose kernels, and allocate what stays.
_WARM_UP_STEPS = 2


def can_capture(
    model: nn.Module,
    cache: Cache | None,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> bool:
    """Whether nothing needs to look into a step, and the step is the same for every token."""
    config = generation_config
    watched = config.return_dict_in_generate or config.output_attentions or config.output_hidden_states
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    return (
        type(cache) is StaticCache
        and not getattr(cache, "offloading", False)
        and all(type(layer) is StaticLayer for layer in cache.layers)
        and not model.config.smear
        # Adapters that put tokens of their own before the text do so there, at every step.
        and "prepare_inputs_for_generation" not in vars(model)
        and model._valid_auto_compile_criteria(model_kwargs, config)
        and not watched
        and not config.is_assistant
        and config.prefill_chunk_size is None
        and all(value is None for key, value in model_kwargs.items() if key not in known)
        and all(type(processor) in _CAPTURABLE for processor in logits_processor)
        and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria)
        and stopping_criteria.max_length is not None
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and len(set(getattr(model, "hf_device_map", {}).values())) < 2
    )


def is_distributed(model: nn.Module) -> bool:
    """Whether each of several processes holds a part of the model: tensor or expert parallel, or FSDP2."""
    meshed = getattr(model, "_device_mesh", None) is not None
    return meshed or any(is_split(parameter) for parameter in model.parameters())


def sample_captured(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict,
) -> torch.LongTensor:
    """Greedy or sampled continuation of a batch [B, T], with the arguments of the library's `_sample`.

    Returns:
        [B, T + new]; a row that has ended goes on with padding, and the last step is that in which the last
        row ends.
    """
    prefill = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    cache: StaticCache = prefill.past_key_values
    batch, prompt = input_ids.shape
    state = _State(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    state.choose(prefill.logits[:, -1].float())
    del prefill

    compile_config = generation_config.compile_config or model._default_compile_config()
    forward = _compiled(compile_config.backend, compile_config.dynamic, compile_config.fullgraph)

    def step() -> None:
        state.choose(forward(model, state.token, state.position, state.mask, cache))

    run = step
    with model._optimize_model_for_decode(), _beside(input_ids.device):
        for done in range(1, state.room):
            if done == 1 + _WARM_UP_STEPS and state.room - done > STEPS_BETWEEN_CHECKS:
                run = _captured(step, input_ids.device)
            run()
            if state.ends is not None and done % STEPS_BETWEEN_CHECKS == 0 and not state.unfinished.any():
                break
    written = int(state.lengths.max())
    return torch.cat([input_ids, state.tokens[:, :written]], dim=1)


class _State:
    """What goes from one step to the next, in tensors of fixed addresses."""

    def __init__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
    ):
        batch, prompt = input_ids.shape
        device = input_ids.device
        self.processor, self.sampled = logits_processor, generation_config.do_sample
        self.room = stopping_criteria.max_length - prompt
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.ends = torch.cat([end.flatten().to(device) for end in ends]) if ends else None
        padding = generation_config._pad_token_tensor
        self.padding = None if padding is None else padding.to(device)
        self.tokens = input_ids.new_zeros(batch, self.room)
        self.token = input_ids.new_zeros(batch, 1)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(batch, 1, dtype=torch.long, device=device)
        positions = model_kwargs.get("position_ids")
        # The first call of `choose` is that after the prompt.
        last = input_ids.new_full((1, 1), prompt - 1) if positions is None else positions[:, -1:]
        self.position = last.expand(batch, 1).clone()
        mask = model_kwargs.get("attention_mask")
        self.mask = None
        if mask is not None and not bool(mask.all()):
            # Of the cache's length, so that its shape stays; what is not written yet is masked by order.
            self.mask = mask.new_ones(batch, model_kwargs["past_key_values"].get_max_length())
            self.mask[:, : mask.shape[1]] = mask

    def choose(self, logits: torch.Tensor) -> None:
        """Takes the next token of each row from logits [B, V] and moves on by one."""
        scores = self.processor(self.token, logits)
        if self.sampled:
            # The largest of p / e with exponential e is a draw from p.
            noise = torch.empty_like(scores).exponential_()
            chosen = (scores.softmax(-1) / noise).argmax(-1, keepdim=True)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        if self.ends is not None:
            if self.padding is not None:
                chosen = torch.where(self.unfinished, chosen, self.padding)
            self.lengths += self.unfinished
            self.unfinished &= ~torch.isin(chosen, self.ends)
        else:
            self.lengths += 1
        self.tokens.index_copy_(1, self.place, chosen)
        self.token.copy_(chosen)
        self.place += 1
        self.position += 1


def _next_logits(model, token, position_ids, attention_mask, cache) -> torch.Tensor:
    out = model(
        input_ids=token,
        position_ids=position_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    return out.logits[:, -1].float()


@functools.lru_cache(maxsize=8)
def _compiled(backend: str | Callable, dynamic: bool | None, fullgraph: bool) -> Callable:
    """The forward step, compiled without the compiler's own CUDA graphs: the capture is around it."""
    return torch.compile(_next_logits, backend=backend, dynamic=dynamic, fullgraph=fullgraph)


@functools.lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    # One for all captures: memory freed on a stream serves that stream alone.
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Work on a stream that can be captured, after all that was begun before and before all that follows."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # cuBLAS keeps 32 MiB for each stream that it has seen: those of one stream are enough.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
    torch._C._cuda_clearCublasWorkspaces()


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph; elsewhere the step itself."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`: it collects garbage first, which takes as long as a hundred tokens.
    graph.capture_begin(capture_error_mode="thread_local")
    step()
    graph.capture_end()
    return graph.replay

"""The forward that TRL puts in the place of ours, with the terms of our loss in it.

TRL's trainers do not call `TesseraForCausalLM.forward` for their loss. `add_fused_lm_head` sets a `forward`
on the instance that runs the decoder and the head by itself and returns log-probabilities of the labels; what
else our forward does would be lost without a word. `TesseraForCausalLM.__setattr__` sees that assignment and
wraps what is assigned:

- `aux_loss` becomes our load-balancing loss, which knows sigmoid scores and groups of experts (TRL takes
Mixtral's for every model);
- rows of the head past the vocabulary take no probability;
- multi-token prediction joins the loss of supervised fine-tuning. `SFTTrainer` makes its loss of
`-log_probs.sum()`, divided by the tokens of the whole batch, so two entries that are no tokens' are put
before them: one that carries the gradient of the term and is zero, one that carries its value. The division
is then the right one whatever the accumulation and the number of processes. Trainers of preferences and
rewards get no such term: what they score is not what the model should predict. SFT is known by what it asks
for, the accuracy of the next token without mean logits; those who slice `log_probs` do it from the end.

Why here and not in a subclass of the trainer: users bring the stock trainer. Why not gradients injected in
the decoder: it knows neither the labels nor what the loss is divided by. What belongs here: nothing but that.
"""

import functools
import types
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from .multi_token import targets_of


def takes_fused_head(forward: Any) -> bool:
    """Whether a forward is TRL's."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def with_own_terms(bound: types.MethodType) -> types.MethodType:
    """TRL's forward with our terms; without `fused_lm_head=True` it stays as it is."""
    fused = bound.__func__

    @functools.wraps(fused)
    def forward(self, *args, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head:
            return fused(self, *args, **kwargs)
        if self.trains_ahead:
            kwargs["keep_mtp_inputs"] = True
        with _heard(self.model) as outputs, _head_without_padding(self):
            out = fused(self, *args, fused_lm_head=True, **kwargs)
        return _add_terms(self, out, outputs[-1], kwargs)

    return types.MethodType(forward, bound.__self__)


def _add_terms(model, out, outputs, given: dict):
    supervised = out.is_top1 is not None and out.mean_logits is None
    ahead, further = outputs.mtp_inputs is not None and supervised, ()
    if ahead:
        targets = targets_of(given.get("labels"), given.get("shift_labels"))
        nats, further = model.nats_ahead(outputs, targets.to(outputs.last_hidden_state.device))
        nats = nats.to(out.log_probs)
    if out.aux_loss is not None:
        aux_loss = model.balance_loss(outputs.router_logits + further, given.get("attention_mask"))
        if out.loss is not None:
            coef = model.config.router_aux_loss_coef
            out.loss = out.loss + coef * (aux_loss - out.aux_loss).to(out.loss.device)
        out.aux_loss = aux_loss
    if ahead:
        # In the first row; the zero keeps its value apart from its gradient, for losses that weigh tokens by
        # their probability.
        terms = out.log_probs.new_zeros(out.log_probs.shape[0], 2)
        terms[0, 0] = nats.detach() - nats
        terms[0, 1] = -nats.detach()
        out.log_probs = torch.cat([terms, out.log_probs], dim=1)
        if out.loss is not None:
            counted = given.get("num_items_in_batch")
            out.loss = out.loss + nats / (out.label_mask.sum().clamp(min=1) if counted is None else counted)
    return out


@contextmanager
def _heard(module: torch.nn.Module):
    """Within it, what a module returns is put into the list that it gives."""
    heard = []
    handle = module.register_forward_hook(lambda module, args, output: heard.append(output))
    try:
        yield heard
    finally:
        handle.remove()


@contextmanager
def _head_without_padding(model):
    """Within it, the head that a model names has no rows past the vocabulary."""
    config = model.config
    if config.padded_vocab_size == config.vocab_size or "get_output_embeddings" in vars(model):
        yield
        return
    model.get_output_embeddings = lambda: SimpleNamespace(
        weight=model.lm_head.weight[: config.vocab_size], bias=None
    )
    try:
        yield
    finally:
        del model.get_output_embeddings

"""Multi-token prediction (DeepSeek-V3, section 2.2): the loss of the layers past the last one, and drafting
with them.

Depth k (from 0) sees at position t the normed hidden state of the depth before it, the model's own for k = 0,
and the embedding of token t + k + 1. It predicts token t + k + 2, through the model's own embedding and head.
transformers drafts with the same conventions when it reads the layers from a checkpoint, so a model works
both ways: `generate(use_mtp=True)` uses the layers that are in memory (`train_mtp=True`), else those of the
checkpoint that the model was loaded from.

While training, positions keep their places: a row stays as long as it was, and what is shifted into its end
has no target. So the attention masks and the rotations of the model serve these layers as they are (rotations
are relative, and all tokens of a depth are shifted alike). What belongs here: all of multi-token prediction
but the layer itself, which is a decoder layer.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import output_capturing

from .masks import everything

IGNORED = -100


def targets_of(labels: torch.Tensor, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """The token after each position [B, T]: `shift_labels`, or `labels` moved up; -100 after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift_labels is None else shift_labels


def targets_ahead(targets: torch.Tensor, positions: torch.Tensor, depth: int) -> torch.Tensor:
    """What depth `depth` predicts at each position.

    Args:
        targets: the token after each position [B, T], -100 where it does not count.
        positions: [B, T] or [1, T]; where they do not count up by one, another document begins.
        depth: from 0.

    Returns:
        [B, T]: the token `depth + 2` places further, or -100 where the row or the document ends before it.
    """
    shift, room = depth + 1, max(targets.shape[1] - depth - 1, 0)
    # The last target lies past the row; whether it goes on is the business of who made the targets.
    extended = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    same_document = extended[:, shift + 1 :] == positions[:, :room] + shift + 1
    ahead = targets[:, shift:].masked_fill(~same_document, IGNORED)
    return F.pad(ahead, (0, targets.shape[1] - room), value=IGNORED)


def hidden_ahead(
    layers: Iterable[nn.Module],
    embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    masks: dict[str, torch.Tensor | None],
    **kwargs,
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Runs the layers over whole rows.

    Args:
        layers: one for each depth.
        embeds: of the tokens [B, T, C], as they come out of the embedding.
        hidden_states: the model's last, normed [B, T, C].
        masks: of each kind of layer, as the model uses them.
        kwargs: what else the model gives its layers.

    Returns:
        Normed hidden states [B, T, C] of each depth, and the router logits [B * T, E] of the sparse ones.
    """
    states, router_logits = [], ()
    for depth, layer in enumerate(layers):
        shifted = F.pad(embeds[:, depth + 1 :], (0, 0, 0, min(depth + 1, embeds.shape[1])))
        mask = masks[layer.attention_kind]
        hidden_states, logits = layer(shifted, hidden_states, attention_mask=mask, **kwargs)
        states.append(hidden_states)
        router_logits += () if logits is None else (logits,)
    return states, router_logits


class TesseraDrafts(MTPCandidateGenerator):
    """Drafts with layers in memory; the library's own generator reads them from a checkpoint each time.

    Args:
        model: a causal language model that holds the layers.
        generation_config, logits_processor: of the call to `generate`.
    """

    def __init__(self, model: nn.Module, generation_config, logits_processor=None):
        # The base class would look for a checkpoint; these are the attributes that its other methods use.
        config = model.config.get_mtp_config()
        # Only the last hidden state; older versions name it by the layer that it comes from.
        by_output = hasattr(output_capturing, "resolve_hidden_states_indices")
        last = -1 if by_output else [model.config.num_hidden_layers - 1]
        self.model_kwargs_overrides = {"output_hidden_states": last}
        self.num_mtp_layers = model.config.num_mtp_layers
        self.device = model.lm_head.weight.device
        self.mtp_model = _Drafter(model, config)
        self.mtp_cache = MtpCache(config=config)
        self.mtp_cache.activate_past_recording()
        self.do_sample = generation_config.do_sample
        self.logits_processor = logits_processor
        self.eos_token_id = getattr(generation_config, "_eos_token_tensor", None)
        self.is_main_model_prefill = True


class _Drafter:
    """One token from each depth, given the tokens that the model has just run over."""

    def __init__(self, model: nn.Module, config):
        self.model, self.config = model, config
        self.layers = model.mtp_layers

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        last_hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        mtp_cache: MtpCache,
        do_sample: bool = False,
        logits_processor=None,
        full_input_ids: torch.Tensor | None = None,
        **_,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Ids [1, T] and positions of the tokens one further than hidden states [1, T, C] -> drafts [1, D]
        and their logits [1, D, V]."""
        tokens, scores = [], []
        hidden = last_hidden_states
        for depth, layer in enumerate(self.layers):
            hidden = self._run(depth, layer, input_ids, hidden, position_ids, mtp_cache)
            logits = self.model.lm_head(hidden[:, -1])[:, : self.config.vocab_size]
            if logits_processor is not None and full_input_ids is not None:
                logits = logits_processor(full_input_ids, logits.float())
            if do_sample:
                token = torch.multinomial(logits.softmax(-1, dtype=torch.float32), 1)
            else:
                token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
            scores.append(logits)
            input_ids = torch.cat([input_ids[:, 1:], token], dim=1)
            position_ids = torch.cat([position_ids[:, 1:], position_ids[:, -1:] + 1], dim=1)
            if full_input_ids is not None:
                full_input_ids = torch.cat([full_input_ids, token], dim=1)
        return torch.cat(tokens, dim=1), torch.stack(scores, dim=1), None

    def _run(self, depth, layer, input_ids, hidden, position_ids, cache) -> torch.Tensor:
        decoder = self.model.model
        embeds = decoder.embed_tokens(input_ids)
        slides = layer.attention_kind == "sliding_attention"
        make_mask = create_sliding_window_causal_mask if slides else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=None,
            past_key_values=cache,
            position_ids=position_ids,
            layer_idx=depth,
            # Under sdpa a soft-cap takes the eager path, which needs its mask.
            and_mask_function=None if self.config.attn_logit_softcapping is None else everything,
        )
        rotary = decoder.rotary_emb
        return layer(
            embeds,
            hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            position_embeddings=None if rotary is None else rotary(embeds, position_ids),
        )[0]

"""The Tessera decoder: layer, base model, and the heads for causal language modelling and classification.

Read `TesseraModel.forward` first: it is the whole computation from token ids to the last norm. The parts are
in `layers.py`, `attention.py` and `feed_forward.py`; starting weights are in `weight_init.py`. What belongs
here: how the parts are joined, and the contract with transformers (masks, caches, recorded outputs, loss).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import TesseraAttention, TesseraLatentAttention
from .configuration_tessera import TesseraConfig
from .decoding import can_capture, sample_captured
from .feed_forward import TesseraMLP, TesseraMoE, TesseraRouter, load_balancing_loss
from .layers import TesseraRotaryEmbedding, TesseraSmear, make_norm
from .loss import linear_cross_entropy
from .masks import make_masks
from .weight_init import BACKOUT_START, initialize, residual_scalar_start


class TesseraDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: TesseraConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.resid_pdrop = config.resid_pdrop
        attention = TesseraLatentAttention if config.attention_type == "latent" else TesseraAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = TesseraMoE(config) if config.mlp_layer_types[layer_idx] == "sparse" else TesseraMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.residual_scale = self.embedding_scale = None
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.ones(1))
            self.embedding_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        embedded: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        output_router_logits: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, T, C] -> [B, T, C]; `embedded` [B, T, C] is what entered the first layer.

        With `output_router_logits` also the logits [B T, E] of its router, None in a dense layer.
        """
        if self.residual_scale is not None:
            hidden_states = self.residual_scale * hidden_states + self.embedding_scale * embedded
        branch, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            input_ids=input_ids,
            **kwargs,
        )
        hidden_states = hidden_states + F.dropout(branch, p=self.resid_pdrop, training=self.training)
        branch, router_logits = self.mlp(self.post_attention_layernorm(hidden_states)), None
        if isinstance(branch, tuple):
            branch, router_logits = branch
        hidden_states = hidden_states + F.dropout(branch, p=self.resid_pdrop, training=self.training)
        return (hidden_states, router_logits) if output_router_logits else hidden_states


class TesseraPreTrainedModel(PreTrainedModel):
    """What all Tessera models share: how they load, initialise, and what can be recorded."""

    config: TesseraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TesseraDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": TesseraDecoderLayer,
        "attentions": [
            OutputRecorder(TesseraAttention, index=1),
            OutputRecorder(TesseraLatentAttention, index=1),
        ],
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library looks for the experts' decorator in this file; ours are in feed_forward.py.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)
        if isinstance(module, TesseraDecoderLayer) and module.residual_scale is not None:
            residual, embedding = residual_scalar_start(module.layer_idx, self.config.num_hidden_layers)
            init.constant_(module.residual_scale, residual)
            init.constant_(module.embedding_scale, embedding)
        elif isinstance(module, TesseraModel) and module.backout_scale is not None:
            init.constant_(module.backout_scale, BACKOUT_START)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes the embedding, the head and the value embeddings; see the base class for the arguments."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        rows = embedding.weight.shape[0]
        self.config.padded_vocab_size = rows
        for module in self.modules():
            if isinstance(module, TesseraAttention) and module.value_embed is not None:
                module.value_embed = self._get_resized_embeddings(module.value_embed, rows)
                module.value_embed.init_role = "value_embedding"
        return embedding


class TesseraModel(TesseraPreTrainedModel):
    """The decoder without a head: token ids to normed hidden states."""

    def __init__(self, config: TesseraConfig):
        super().__init__(config)
        # Fields may have been set one by one since the configuration was built.
        config.validate_architecture()
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned"
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        )
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.smear = TesseraSmear(config) if config.smear else None
        self.layers = nn.ModuleList([TesseraDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.backout_scale = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.rotary_emb = TesseraRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S] with zeros on padding, S counting cached positions too; or masks made by
                transformers for static caches.
            position_ids: [B, T]. Where they restart, a new document begins that does not see those before it.
                Default: count the tokens that are not padding.
            past_key_values: cache, extended in place.
            inputs_embeds: [B, T, C] instead of `input_ids`; not for models with value embeddings, which look
                tokens up in every layer.
            use_cache: whether to return a cache.
            output_router_logits: whether to return the logits [B T, E] of each router, which a compiler can
                trace here, as it cannot the library's recording.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if value embeddings
                lack ids, or if learned positions run past their table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None and self.config.value_embedding_interval is not None:
            raise ValueError(
                "this model has value embeddings, which need input_ids; inputs_embeds alone cannot work"
            )
        if self.smear is not None and kwargs.get("cache") is not None:
            raise ValueError("continuous batching keeps no embeddings for smear; use generate instead")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        positions = position_ids
        if positions is None:
            positions = self._count_positions(inputs_embeds, attention_mask, past_key_values)
        dropout = self.training and self.config.attention_dropout > 0
        masks = make_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids, dropout)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        x = inputs_embeds
        if self.embed_positions is not None:
            x = x + self._learned_positions(positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = F.dropout(x, p=self.config.embd_pdrop, training=self.training)
        if self.smear is not None:
            x = self.smear(x, positions, past_key_values)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(x, positions)

        embedded, middle, router_logits = x, None, ()
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            x = layer(
                x,
                attention_mask=masks[self.config.layer_types[i]],
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                embedded=embedded,
                input_ids=input_ids,
                output_router_logits=output_router_logits,
                **kwargs,
            )
            if output_router_logits:
                x, logits = x
                router_logits += () if logits is None else (logits,)
            if i == self.config.num_hidden_layers // 2:
                middle = x
        if self.backout_scale is not None:
            x = x - self.backout_scale * middle
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x),
            past_key_values=past_key_values,
            router_logits=router_logits if output_router_logits else None,
        )

    def _count_positions(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor | dict | None, cache: Cache | None
    ) -> torch.Tensor:
        """Positions [B, T] or [1, T] of the new tokens; padding on the left is not counted."""
        new = embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        seen = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(new, device=embeds.device) + seen).unsqueeze(0)

    def _learned_positions(self, positions: torch.Tensor) -> torch.Tensor:
        # On a GPU a look at the values would wait for it at every step; there, out of range fails by itself.
        look = positions.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and positions.max() >= self.config.max_position_embeddings:
            rows = self.config.max_position_embeddings
            raise ValueError(f"position {int(positions.max())} is past the {rows} learned positions")
        return self.embed_positions(positions)


class TesseraForCausalLM(TesseraPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TesseraConfig):
        super().__init__(config)
        self.model = TesseraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.lm_head.init_role = "head"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Runs the decoder and the head; see `TesseraModel.forward` for the inputs.

        Args:
            labels: [B, T], ids of the tokens themselves (the shift is done here); -100 is not counted.
            logits_to_keep: logits of the last n positions only, or of the positions in a tensor; 0 keeps all.
            skip_logits: whether to compute the loss without ever holding the logits; `logits` is then None.
                Default: while training with labels.
            kwargs: `num_items_in_batch` divides the summed loss, so that accumulated micro-batches of
                different lengths add up to the loss of the whole; `output_router_logits`,
                `output_hidden_states`, ...

        Returns:
            `logits` [B, T, vocab_size], and `loss` in nats per token. The load-balancing loss (`aux_loss`) is
            part of `loss` while training, or wherever router logits are asked for.

        Raises:
            ValueError: if the logits are to be skipped where nothing else is asked for, or cannot be.
        """
        if labels is not None and self.training:
            if self.config.router_aux_loss_coef > 0:
                kwargs.setdefault("output_router_logits", True)
            # Training keeps no cache, unless one is asked for.
            use_cache = bool(use_cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and labels is not None and self._head_is_plain()
        loss, aux_loss, logits = None, None, None
        if skip_logits:
            loss = self._loss_without_logits(outputs.last_hidden_state, labels, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
            if self.config.padded_vocab_size > self.config.vocab_size:
                logits = logits[..., : self.config.vocab_size].contiguous()
            cap = self.config.final_logit_softcapping
            if cap is not None:
                logits = cap * torch.tanh(logits.float() / cap)
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
        if outputs.router_logits:
            routers = [module for module in self.model.modules() if isinstance(module, TesseraRouter)]
            padding = (
                attention_mask
                if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
                else None
            )
            if padding is not None:
                padding = padding[:, -outputs.last_hidden_state.shape[1] :]
            aux_loss = load_balancing_loss(routers, outputs.router_logits, padding)
            if loss is not None and self.config.router_aux_loss_coef:
                shifted = kwargs.get("shift_labels")
                targets = labels[:, 1:] if shifted is None else shifted
                share = _share_of_batch(targets, kwargs.get("num_items_in_batch"))
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **_
    ) -> dict:
        """The masks of a step on a static cache, which `generate` makes before the model is called."""
        return make_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """The library's decoding loop, or the captured one of `decoding.py` where that can take its place."""
        arguments = (logits_processor, stopping_criteria, generation_config)
        cache = model_kwargs.get("past_key_values")
        if not synced_gpus and streamer is None and can_capture(self, cache, *arguments, model_kwargs):
            return sample_captured(self, input_ids, *arguments, model_kwargs)
        return super()._sample(input_ids, *arguments, synced_gpus, streamer, **model_kwargs)

    def _head_is_plain(self) -> bool:
        """Whether the head is its weight alone, and the loss the usual one.

        An adapter, a quantised layer, a shard, or a hook that gathers or moves the weight has to be called.
        """
        head, weight = self.lm_head, self.lm_head.weight
        hooked = head._forward_pre_hooks or head._forward_hooks or hasattr(head, "_hf_hook")
        plain = type(head) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor) and not hooked
        return plain and head.bias is None and self.loss_function is ForCausalLMLoss

    def _loss_without_logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        **_,
    ) -> torch.Tensor:
        """The loss of transformers' `ForCausalLMLoss`, of hidden states [B, T, C] instead of logits."""
        if labels is None or not self._head_is_plain():
            raise ValueError(
                "skip_logits=True needs labels, the model's own loss and a plain head: without an adapter, "
                "quantisation, shards or hooks on lm_head"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        summed = linear_cross_entropy(
            hidden,
            self.lm_head.weight[: self.config.vocab_size],
            shift_labels,
            self.config.final_logit_softcapping,
            ignore_index,
        )
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(summed.device)
        return summed / num_items_in_batch


class TesseraForSequenceClassification(GenericForSequenceClassification, TesseraPreTrainedModel):
    """The decoder with a classification or regression head on the last token of each sequence."""

    def __init__(self, config: TesseraConfig):
        super().__init__(_known_to_auto_model(config))


class TesseraForTokenClassification(GenericForTokenClassification, TesseraPreTrainedModel):
    """The decoder with a classification head on every token."""

    def __init__(self, config: TesseraConfig):
        super().__init__(_known_to_auto_model(config))


def _known_to_auto_model(config: TesseraConfig) -> TesseraConfig:
    """The configuration, after AutoModel has learnt the decoder that goes with its class.

    The generic heads ask AutoModel for their decoder; of remote code it knows only what it was asked for.
    """
    if type(config) not in AutoModel._model_mapping:
        AutoModel.register(type(config), TesseraModel)
    return config


def _share_of_batch(
    targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor | float:
    """Share of the batch's counted tokens in this micro-batch: the weight of a loss that is a mean."""
    if num_items_in_batch is None:
        return 1.0
    return (targets != -100).sum() / num_items_in_batch

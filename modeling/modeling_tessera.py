"""The Tessera decoder: base model, and the heads for causal language modelling and classification.

Read `TesseraModel.forward` first: it is the whole computation from token ids to the last norm. The parts are
in `decoder_layer.py`, `layers.py`, `attention.py` and `feed_forward.py`; starting weights are in
`weight_init.py`. What belongs here: how the parts are joined, and the contract with transformers (masks,
caches, recorded outputs, loss).
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import TesseraAttention, TesseraLatentAttention
from .configuration_tessera import TesseraConfig
from .continuous_batching import TesseraContinuousBatching, exchange_token_ids
from .decoder_layer import TesseraDecoderLayer, TesseraMTPLayer
from .decoding import can_capture, is_distributed, sample_captured
from .fused_head import takes_fused_head, with_own_terms
from .layers import TesseraRotaryEmbedding, TesseraSmear, find_rows, make_norm
from .loss import z_term
from .masks import make_masks
from .multi_token import TesseraDrafts, targets_of
from .parallel_plans import is_split, require_splittable
from .parallel_styles import gather_whole
from .training_loss import TesseraLosses, share_of_batch
from .weight_init import BACKOUT_START, initialize, residual_scalar_start


@dataclass
class TesseraModelOutput(MoeModelOutputWithPast):
    """The library's output, and what multi-token prediction goes on from (`hidden_ahead`), if asked for."""

    mtp_inputs: dict | None = None


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
    _can_record_outputs = {
        "hidden_states": TesseraDecoderLayer,
        "attentions": [
            OutputRecorder(TesseraAttention, index=1),
            OutputRecorder(TesseraLatentAttention, index=1),
        ],
    }

    def __init__(self, config: TesseraConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Layers that predict further tokens are in the checkpoint, wanted or not; transformers finds them by
        # these patterns.
        ahead = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected = [rf"layers\.{i}\." for i in ahead]
        # Only where it is there: the library asks for a module of each name.
        in_fp32 = {"e_score_correction_bias"} if config.router_correction_bias else set()
        self._keep_in_fp32_modules_strict = in_fp32

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

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *args, **kwargs) -> nn.Module:
        """Splits a model that has no weights yet, as the base class does, after a look at its sizes.

        Raises:
            ValueError: if they cannot be split; see `require_splittable`.
        """
        if distributed_config is not None:
            require_splittable(model.config, distributed_config)
            # FSDP pads a tensor that the ranks do not divide; tied later, the two names get two paddings, of
            # which one goes on with the weights of the first step. Tensor parallelism splits name by name.
            if (distributed_config.fsdp_size or 1) > 1 and distributed_config.tp_size == 1:
                model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def gather_sharded_state_dict_for_save(
        self, model_to_save: PreTrainedModel, state_dict: dict[str, Any], distributed_config: Any, **kwargs
    ) -> dict[str, Any]:
        """Whole tensors from the ranks' parts, as the base class gathers them, and tied ones once.

        The library saves one of two names that share a tensor; gathered, they share nothing any more.

        Raises:
            ValueError: for a stage of a pipeline, which has no others' layers to save.
        """
        if distributed_config is not None and (distributed_config.pp_size or 1) > 1:
            raise ValueError(
                "a stage of a pipeline holds some of the layers; load the model without pp_size to save it"
            )
        if distributed_config is not None and distributed_config.tp_size > 1:
            state_dict = {
                name: gather_whole(tensor).cpu() if is_split(tensor) else tensor
                for name, tensor in state_dict.items()
            }
        gathered = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )
        if gathered is not state_dict:
            for name, source in model_to_save.all_tied_weights_keys.items():
                if name in gathered and source in gathered and torch.equal(gathered[name], gathered[source]):
                    del gathered[name]
        return gathered

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the model; see the base class for the arguments.

        The configuration that is written claims no layers for multi-token prediction that the model does not
        hold, and asks nobody to train them. Weights are written as they are in memory unless
        `save_original_format=True` asks for those that were read.
        """
        config = self.config
        if getattr(config, "quantization_config", None) is None:
            # The library would turn FP8 weights that it decoded while loading into FP8 again, under a
            # configuration that no longer says so.
            kwargs.setdefault("save_original_format", False)
        fields = ("train_mtp", "num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types")
        before = {name: getattr(config, name) for name in fields}
        config.train_mtp = False
        if len(self.base_model.layers) == config.num_hidden_layers:
            config.num_mtp_layers, config.mtp_layer_types, config.mtp_mlp_layer_types = 0, None, None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(config, name, value)

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
        self.dropout = nn.Dropout(config.embd_pdrop)
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
        keep_mtp_inputs: bool = False,
        **kwargs,
    ) -> TesseraModelOutput:
        """Runs the decoder.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S] with zeros on padding, S counting cached positions too; or masks made by
                transformers for static caches.
            position_ids: [B, T]. Where they restart, a new document begins that does not see those before it.
                Default: count the tokens that are not padding.
            past_key_values: cache, extended in place.
            inputs_embeds: [B, T, C] instead of `input_ids`. A model with value embeddings, which looks tokens
                up in every layer, takes only rows of its embedding table.
            use_cache: whether to return a cache.
            output_router_logits: whether to return the logits [B T, E] of each router, which a compiler can
                trace here, as it cannot the library's recording.
            keep_mtp_inputs: return what the layers for multi-token prediction go on from, as `mtp_inputs`.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if value embeddings
                cannot tell the ids, or if learned positions run past their table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None and self.config.value_embedding_interval is not None:
            input_ids = find_rows(inputs_embeds, self.embed_tokens.weight)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        positions = position_ids
        if positions is None:
            positions = self._count_positions(inputs_embeds, attention_mask, past_key_values)
        paged = kwargs.get("cache")
        if paged is not None and not isinstance(attention_mask, dict):
            # Its mask is ready. To look for another would be to look at positions, which no CUDA graph can.
            attention_mask = dict.fromkeys(self.config.layer_types, attention_mask)
        dropout = self.training and self.config.attention_dropout > 0
        masks = make_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids, dropout)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # A later stage of a pipeline has no first layer, and is given the hidden states of the stage before.
        continues = isinstance(self.layers[0], nn.Identity)
        x = inputs_embeds if continues else self._enter(inputs_embeds, positions)
        if self.smear is not None and not continues:
            before = None
            if paged is not None:
                ids = exchange_token_ids(self.config, input_ids, paged, kwargs)
                before = self._enter(self.embed_tokens(ids), (positions - 1).clamp(min=0))
            x = self.smear(x, positions, past_key_values, before)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(x, positions)

        # What training counts of the experts' loads is not to be padding's.
        padded = self.training and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        token_mask = attention_mask[:, -x.shape[1] :] if padded else None
        embedded, middle, router_logits = x, None, ()
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if isinstance(layer, nn.Identity):
                # A layer of another stage. Masks and positions go by the first layers' lengths in the cache.
                if past_key_values is not None:
                    past_key_values.update(x[:, None, :, :1], x[:, None, :, :0], i)
                continue
            # By position: reentrant checkpointing gives no gradient to keyword arguments.
            x = layer(
                x,
                embedded,
                attention_mask=masks[self.config.layer_types[i]],
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                input_ids=input_ids,
                output_router_logits=output_router_logits,
                token_mask=token_mask,
                **kwargs,
            )
            if output_router_logits:
                x, logits = x
                router_logits += () if logits is None else (logits,)
            if i == self.config.num_hidden_layers // 2:
                middle = x
        if self.backout_scale is not None:
            x = x - self.backout_scale.squeeze(0) * middle
        mtp_inputs = None
        if keep_mtp_inputs:
            mtp_inputs = {
                "embeds": inputs_embeds,
                "masks": masks,
                "position_ids": positions,
                "position_embeddings": position_embeddings,
                "token_mask": token_mask,
                **kwargs,
            }
        return TesseraModelOutput(
            last_hidden_state=self.norm(x),
            past_key_values=past_key_values,
            router_logits=router_logits if output_router_logits else None,
            mtp_inputs=mtp_inputs,
        )

    def _enter(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, C] with what is done to them before they meet their neighbours."""
        if self.embed_positions is not None:
            embeds = embeds + self._learned_positions(positions)
        if self.embed_norm is not None:
            embeds = self.embed_norm(embeds)
        return _as_products(self.dropout(embeds))

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


def _as_products(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings of fp32 weights in bf16 where autocast makes the products in it.

    What enters the residual stream decides its dtype; in fp32 it would double the bytes that norms and sums
    move and that backward keeps. fp16 has too little range for it.
    """
    device = embeds.device.type
    if embeds.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return embeds
    return embeds.bfloat16() if torch.get_autocast_dtype(device) == torch.bfloat16 else embeds


class TesseraForCausalLM(TesseraLosses, TesseraContinuousBatching, TesseraPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TesseraConfig):
        super().__init__(config)
        self.model = TesseraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.lm_head.init_role = "head"
        if config.train_mtp:
            self.model.layers.extend(TesseraMTPLayer(config, depth) for depth in range(config.num_mtp_layers))
            # Accelerate refuses to wrap a class that the model does not have.
            self._no_split_modules = [*self._no_split_modules, "TesseraMTPLayer"]
        self.post_init()

    def init_parallel_plans(self) -> None:
        """Joins the plans of the class and of the base model; see `sharded_data_plan` for a tied head."""
        super().init_parallel_plans()
        if self.config.tie_word_embeddings:
            self._fsdp_plan.pop("lm_head")

    @property
    def mtp_layers(self) -> nn.ModuleList:
        """The layers for multi-token prediction that are in memory: all of them or none."""
        return self.model.layers[self.config.num_hidden_layers :]

    def __setattr__(self, name: str, value) -> None:
        # Trainers of TRL put a forward of their own in the place of ours.
        if name == "forward" and takes_fused_head(value):
            value = with_own_terms(value)
        super().__setattr__(name, value)

    def _get_candidate_generator(self, generation_config, logits_processor=None, **kwargs):
        if generation_config.use_mtp and not self.config.num_mtp_layers:
            raise ValueError("use_mtp=True needs layers for multi-token prediction; num_mtp_layers is 0")
        if generation_config.use_mtp and len(self.mtp_layers):
            return TesseraDrafts(self, generation_config, logits_processor)
        return super()._get_candidate_generator(
            generation_config=generation_config, logits_processor=logits_processor, **kwargs
        )

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
        z_loss: float = 0.0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Runs the decoder and the head; see `TesseraModel.forward` for the inputs.

        Args:
            labels: [B, T], ids of the tokens themselves (the shift is done here); -100 is not counted.
            logits_to_keep: logits of the last n positions only, or of the positions in a tensor; 0 keeps all.
            skip_logits: whether to compute the loss without ever holding the logits; `logits` is then None.
                Default: while training with labels.
            z_loss: weight of the mean squared logarithm of the softmax's normalizer in the loss; see
                `linear_cross_entropy`.
            kwargs: `num_items_in_batch` divides the summed loss, so that accumulated micro-batches of
                different lengths add up to the loss of the whole; `output_router_logits`,
                `output_hidden_states`, ...

        Returns:
            `logits` [B, T, vocab_size], and `loss` in nats per token. The load-balancing loss (`aux_loss`) is
            part of `loss` while training, or wherever router logits are asked for; that of multi-token
            prediction while training, if its layers are in memory.

        Raises:
            ValueError: if the logits are to be skipped where nothing else is asked for, or cannot be.
        """
        if labels is not None and self.training:
            if self.config.router_aux_loss_coef > 0:
                kwargs.setdefault("output_router_logits", True)
            # Training keeps no cache, unless one is asked for.
            use_cache = bool(use_cache)
        ahead = labels is not None and self.trains_ahead
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            keep_mtp_inputs=ahead,
            return_dict=True,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and labels is not None and self._head_is_plain()
        loss, aux_loss, logits = None, None, None
        if skip_logits:
            loss = self._loss_without_logits(outputs.last_hidden_state, labels, z_loss=z_loss, **kwargs)
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
        if loss is not None:
            targets = targets_of(labels, kwargs.get("shift_labels"))
            counted = kwargs.get("num_items_in_batch")
            if z_loss and not skip_logits:
                items = (targets != -100).sum() if counted is None else counted
                loss = loss + z_loss * z_term(logits, targets).to(loss.device) / items
        further = ()
        if ahead:
            nats, further = self.nats_ahead(outputs, targets)
            loss = loss + nats.to(loss.device) / ((targets != -100).sum() if counted is None else counted)
        if outputs.router_logits:
            aux_loss = self.balance_loss(outputs.router_logits + further, attention_mask)
            if loss is not None and self.config.router_aux_loss_coef:
                share = share_of_batch(targets, counted)
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

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """The library's own, but for models split over processes: there compiling fails in FSDP's hooks."""
        return not is_distributed(self) and super()._valid_auto_compile_criteria(
            model_kwargs, generation_config
        )

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

"""The terms of the training loss: next token, tokens further ahead, balance of the experts.

`TesseraForCausalLM.forward` adds them up, and `fused_head.py` where TRL brings a head of its own. What
belongs here: what a term is made of and what divides it. Shapes: B rows of T tokens, C hidden, E experts.
"""

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from .balancing import router_statistics
from .feed_forward import TesseraRouter, load_balancing_loss
from .layers import is_plain_linear
from .loss import linear_cross_entropy, z_term
from .multi_token import hidden_ahead, targets_ahead


class TesseraLosses:
    """What a causal model is trained on: a part of a class with `model`, `lm_head` and `config`."""

    def _head_is_plain(self) -> bool:
        """Whether the head is its weight alone, and the loss the usual one."""
        return is_plain_linear(self.lm_head) and self.loss_function is ForCausalLMLoss

    def _loss_without_logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        z_loss: float = 0.0,
        **_,
    ) -> torch.Tensor:
        """The loss of transformers' `ForCausalLMLoss`, of hidden states [B, T, C] instead of logits.

        With the z-loss of `linear_cross_entropy` added.
        """
        if labels is None or not self._head_is_plain():
            raise ValueError(
                "skip_logits=True needs labels, the model's own loss and a plain head: without an adapter, "
                "quantisation, shards or hooks on lm_head"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        summed = self._summed_cross_entropy(hidden, shift_labels, ignore_index, z_loss)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(summed.device)
        return summed / num_items_in_batch

    def _summed_cross_entropy(
        self, hidden: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100, z_loss: float = 0.0
    ) -> torch.Tensor:
        """Nats of targets [B, T] for hidden states [B, T, C], without the logits if the head allows it."""
        vocabulary, cap = self.config.vocab_size, self.config.final_logit_softcapping
        if self._head_is_plain():
            weight = self.lm_head.weight[:vocabulary]
            return linear_cross_entropy(hidden, weight, targets, cap, ignore_index, z_loss)
        logits = self.lm_head(hidden)[..., :vocabulary].float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        targets, logits = targets.flatten().to(logits.device), logits.flatten(0, -2)
        summed = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return summed + z_loss * z_term(logits, targets, ignore_index) if z_loss else summed

    @property
    def trains_ahead(self) -> bool:
        """Whether the loss has a term of multi-token prediction."""
        return self.training and len(self.mtp_layers) > 0 and self.config.mtp_loss_coef > 0

    def nats_ahead(self, outputs, targets: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss of multi-token prediction (DeepSeek-V3, equations 24, 25), weighted, summed over tokens.

        Args:
            outputs: of the decoder, with `mtp_inputs`.
            targets: the token after each position [B, T], -100 where it does not count.

        Returns:
            Nats, to be divided by what divides the loss of the model itself, and the logits of the layers'
            routers.
        """
        inputs = dict(outputs.mtp_inputs)
        states, router_logits = hidden_ahead(
            self.mtp_layers, hidden_states=outputs.last_hidden_state, **inputs
        )
        total = 0.0
        for depth, hidden in enumerate(states):
            ahead = targets_ahead(targets, inputs["position_ids"], depth)
            total = total + self._summed_cross_entropy(hidden, ahead)
        return self.config.mtp_loss_coef / len(states) * total, router_logits

    def balance_loss(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | dict | None
    ) -> torch.Tensor:
        """The load-balancing loss of the routers, without its weight.

        Args:
            router_logits: [B * T, E] of each sparse layer; those for multi-token prediction come last and may
                be left out.
            attention_mask: as the model was given it.
        """
        # By class: an adapter may stand in front of a router.
        found = [module for module in self.model.layers.modules() if isinstance(module, TesseraRouter)]
        routers = found[: len(router_logits)]
        padding = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            new = router_logits[0].shape[0] // attention_mask.shape[0]
            padding = attention_mask[:, -new:]
        return load_balancing_loss(routers, router_logits, padding)

    def router_statistics(self) -> list[dict]:
        """How evenly the routers spread the tokens of the last step; see `balancing.router_statistics`."""
        return router_statistics(self)


def share_of_batch(
    targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor | float:
    """Share of the batch's counted tokens in this micro-batch: the weight of a loss that is a mean."""
    if num_items_in_batch is None:
        return 1.0
    return (targets != -100).sum() / num_items_in_batch

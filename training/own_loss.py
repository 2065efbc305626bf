"""SFT by the model's own loss, for any trainer that learns the next token.

The stock `SFTTrainer` already has every term of a Tessera model's loss (`modeling/fused_head.py`). It runs
the head in a forward of its own, which also measures entropy and accuracy and computes the logits a second
time for the gradients. Our loss computes them once, a chunk at a time (`modeling/loss.py`): less work for the
head, and no such measurements. What belongs here: only that exchange.
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer


class OwnLoss:
    """For an `SFTTrainer`, before it: `class OwnSFTTrainer(OwnLoss, SFTTrainer): pass`.

    Packing, masking, collators and logging stay the trainer's; its logs lack `entropy` and
    `mean_token_accuracy`.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As `Trainer.compute_loss`, which runs the model's own forward."""
        inputs = {**inputs, "use_cache": False}
        if self.model.training:
            mask = inputs.get("attention_mask")
            seen = inputs["input_ids"].numel() if mask is None else mask.sum()
            seen = torch.as_tensor(seen, device=self.accelerator.device)
            self._total_train_tokens += self.accelerator.gather_for_metrics(seen).sum().item()
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

"""A step of the trainer is queued: the host does not wait for the GPU while it launches one."""

import pytest
import torch
from helpers.models import tiny_model

from tessera.training.optimizers import build_optimizer
from tessera.training.step import gradient_norm, take_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_update_waits_for_nothing(name, compiled):
    model = tiny_model("nanochat-tiny").cuda()
    parameters = list(model.parameters())
    optimizer = build_optimizer(model, name)
    optimizer.compiled = compiled
    found_inf = torch.zeros((), device="cuda")

    def step() -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        norm = gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        take_step(optimizer, found_inf)

    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)

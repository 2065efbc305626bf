"""A process that runs the kernel of the loss under Triton's interpreter and prints its distance from float64.

It is one of its own because Triton reads TRITON_INTERPRET once, when it is imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from tessera.modeling.loss_kernel import logits_to_gradient  # noqa: E402

VOCABULARY, BLOCK = 150, 64  # two whole blocks and a part of one


def errors(dtype: torch.dtype, softcap: float | None, z_loss: float) -> dict[str, float]:
    """Largest differences of losses and of gradients; one target counts nothing."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(6, VOCABULARY + 3)).to(dtype)[:, :VOCABULARY]  # rows of a padded head
    targets = torch.tensor([0, 63, 64, -100, 149, 7])
    exact = logits.double().requires_grad_()
    scores = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    nats = F.cross_entropy(scores, targets, reduction="none")
    expected = nats + z_loss * torch.where(targets == -100, 0.0, scores.logsumexp(1) ** 2)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    losses = torch.empty(6)
    logits_to_gradient(logits, targets, losses, softcap, z_loss, -100, block=BLOCK)
    return {
        "loss": float((losses - expected.detach()).abs().max()),
        "gradient": float((logits.double() - wanted).abs().max()),
    }


def loss_beyond_the_vocabulary() -> float:
    """The loss of a target that the vocabulary does not have."""
    losses = torch.empty(1)
    logits_to_gradient(torch.randn(1, 16), torch.tensor([16]), losses, None, 0.0, -100, block=16)
    return float(losses)


if __name__ == "__main__":
    cases = [("float32", *terms) for terms in ((None, 0.0), (15.0, 0.0), (None, 1e-2), (15.0, 1e-2))]
    cases += [("bfloat16", None, 1e-2), ("float16", 15.0, 0.0)]
    found = {
        f"{name} {softcap} {z_loss}": errors(getattr(torch, name), softcap, z_loss)
        for name, softcap, z_loss in cases
    }
    print(json.dumps({"errors": found, "beyond": loss_beyond_the_vocabulary()}))

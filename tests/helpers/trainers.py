"""What the tests over the trainers of transformers and TRL share: models, a step that shows its gradient, a
loss by hand.

The reference runs each document alone, in eval mode and without gradient checkpointing, and takes the
cross-entropy of plain logits: it knows nothing of batches, packing or the model's own loss.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tessera import TesseraConfig, TesseraForCausalLM

from .chats import chat_tokenizer, conversations
from .models import MIXTURES
from .weights import randomize

# One step of plain gradient descent at rate 1: what the weights lose is the gradient.
GRADIENT_STEP = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
}
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}

Document = tuple[list[int], list[int]]  # token ids, and labels with -100 where nothing is trained


def stack_model(folder: Path, preset: str, **overrides) -> str:
    """Saves a two-layer model with random weights and a tokenizer that chats; nanochat's head is padded."""
    tokenizer = chat_tokenizer()
    base, fields = MIXTURES.get(preset, (preset, {}))
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "padded_vocab_size": 448 if "nanochat" in preset else None,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    if base != "bytegpt-tiny":
        small["head_dim"] = None
    config = TesseraConfig.from_preset(base, **{**fields, **small, **overrides})
    if config.sliding_window is not None and "sliding_window" not in overrides:
        config.sliding_window = 17
    randomize(TesseraForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_chats(count: int) -> list[dict]:
    """Conversations of texts alone, so that a table can have one type for the column."""
    keys = {"role", "content"}
    rows = (row["messages"] for row in conversations(10 * count, seed=3))
    plain = [m for m in rows if all(set(turn) == keys and isinstance(turn["content"], str) for turn in m)]
    return [{"messages": messages} for messages in plain[:count]]


def documents(rows: list[dict], assistant_only: bool = False) -> list[Document]:
    """Conversations as token ids and labels."""
    found = []
    for row in rows:
        encoded = chat_tokenizer().apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = encoded["input_ids"], encoded["assistant_masks"]
        found.append(
            (ids, [i if keep or not assistant_only else -100 for i, keep in zip(ids, said, strict=True)])
        )
    return found


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def log_probs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first [T - 1], from logits [T, V]."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def nats(model: nn.Module, rows: list[Document]) -> torch.Tensor:
    """Summed cross-entropy of the labels, each document alone."""
    total = torch.zeros(())
    for ids, labels in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
    return total


def count(rows: list[Document]) -> int:
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def balance(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """The load-balancing loss of Switch Transformer, by hand, over all routers and the tokens of all rows."""
    config, seen = model.config, []
    if not config.router_aux_loss_coef:
        return torch.zeros(())
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda module, args, out: seen.append(out[0])) for gate in gates]
    for ids in rows:
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    probabilities = torch.cat(seen).softmax(-1)  # [N, E]
    chosen = probabilities.topk(config.num_experts_per_tok).indices
    share = torch.stack([(chosen == expert).sum() / len(chosen) for expert in range(config.n_routed_experts)])
    return config.router_aux_loss_coef * config.n_routed_experts * (share * probabilities.mean(0)).sum()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def reference(model: nn.Module) -> nn.Module:
    """A copy that is as the model was before anything trained or patched it."""
    clean = copy.deepcopy(model)
    clean.__dict__.pop("forward", None)
    return clean.eval()


def assert_step_is(
    before: dict[str, torch.Tensor],
    after: nn.Module,
    expected: dict[str, torch.Tensor],
    flat: tuple[str, ...] = (),
    tolerance: float = 1e-4,
) -> None:
    """Checks that the step from `before` went against the gradient, which is zero for `flat` alone."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert [name for name, gradient in expected.items() if not gradient.any()] == list(flat)
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(
            before[name] - parameter.detach(),
            expected[name],
            rtol=0,
            # The second part is what sums of large terms that cancel leave.
            atol=tolerance * expected[name].abs().max().item() + 1e-5 * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_reloads_equal(folder: Path | str, model: nn.Module, auto_class) -> nn.Module:
    """Checks that what was saved is what was trained, bit for bit, tensors and logits."""
    loaded = auto_class.from_pretrained(folder).eval()
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reference(model)(ids).logits)
    return loaded

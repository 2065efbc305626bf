"""The bytes that a formula says a step keeps are those that a traced step keeps.

The compiled step is cut in two by the partitioner that torch.compile uses; what crosses the cut is looked at
as real tensors, each storage once. Without inductor: it decides what is fused, not what is kept.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.training.planner.activations import Arithmetic, kept_around_layers, kept_by_layer
from tessera.training.planner.memory import take_inventory

ROWS, LENGTH = 4, 32
TINY = {"vocab_size": 64, "max_position_embeddings": LENGTH, "num_hidden_layers": 2}
MODELS = {
    "llama": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
    },
    "nanochat": {"preset": "nanochat-tiny", "layer_types": "L"},
    "gpt2": {"preset": "gpt2-tiny", "attention_dropout": 0.0},
    # Heads of one size for keys and values, which the fused kernel for a CPU takes.
    "experts": {
        "preset": "bytegpt-tiny",
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "router_aux_loss_coef": 0.0,
    },
}


def config_of(name: str) -> TesseraConfig:
    fields = {**TINY, **MODELS[name]}
    preset = fields.pop("preset", None)
    return TesseraConfig(**fields) if preset is None else TesseraConfig.from_preset(preset, **fields)


def kept_bytes(config: TesseraConfig, autocast: bool) -> int:
    """What the backward pass of a compiled step is given, beside parameters and buffers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = TesseraForCausalLM(config).to(torch.float32 if autocast else torch.bfloat16).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def backward(graph, _):
        inner = make_boxed_func(graph.forward)

        def run(arguments):
            for tensor in arguments:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in own:
                        found[storage.data_ptr()] = storage.nbytes()
            return inner(arguments)

        run._boxed_call = True
        return run

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    compiled = torch.compile(model, backend=backend, dynamic=False)
    ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = compiled(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=ids.numel()).loss
    loss.backward()
    return sum(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        ("llama", True),
        ("llama", False),
        ("nanochat", True),
        ("nanochat", False),
        ("gpt2", True),
        ("experts", False),
        ("experts", True),
    ],
)
def test_formula_equals_what_a_traced_step_keeps(name, autocast, monkeypatch):
    # Experts as a GPU has them.
    monkeypatch.setattr("tessera.modeling.feed_forward.takes_grouped_products", lambda *_: True)
    config = config_of(name)
    how = Arithmetic(4 if autocast else 2, 2, 2, compiled=True)
    layers = sum(sum(kept_by_layer(config, i, how).values()) for i in range(config.num_hidden_layers))
    tokens = ROWS * LENGTH
    expected = tokens * (layers + kept_around_layers(config, how))
    inventory = take_inventory(config)
    rows, width = inventory.head
    expected += 2 * rows * width if not autocast else 4 * rows * width  # the gradient of the head
    if autocast:
        expected += 2 * inventory.multiplied
    kept = kept_bytes(config, autocast)
    assert kept == pytest.approx(expected, rel=0.02)

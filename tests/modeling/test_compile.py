"""A training step under `torch.compile(fullgraph=True)`: one graph, loss and gradients of eager code."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from packaging.version import Version

from tessera.modeling import masks

OLD = Version(transformers.__version__) < Version("5.23")
SPARSE = [name for name in EVERY_MODEL if tiny_config(name).n_routed_experts]


def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(2))


def step(forward, model, **arguments):
    model.zero_grad()
    loss = forward(input_ids=tokens(), labels=tokens(), **arguments).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model, **arguments):
    if OLD and model.config.n_routed_experts:
        # There, the library's stand-in for grouped products of fp32 cannot be traced backwards.
        model.set_experts_implementation("batched_mm")
    torch._dynamo.reset()
    expected = step(model, model, **arguments)
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model, **arguments)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_training_step_is_one_graph_with_the_gradients_of_eager_code(name):
    agree(tiny_model(name).train())


@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "bytegpt-tiny"])
def test_packed_and_padded_rows_compile_too(name):
    model = tiny_model(name).train()
    agree(model, position_ids=torch.cat([torch.arange(9), torch.arange(15)]).repeat(2, 1))
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    agree(model, attention_mask=mask)


@pytest.mark.parametrize(
    "name",
    [
        "nanochat-tiny",
        pytest.param("latent-sliding-lowrank-sigmoid", marks=pytest.mark.slow),
        pytest.param("moe-qknorm-softcap", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_packed_rows_compile_with_block_masks(name, monkeypatch):
    """As on a GPU, but for kernels and gradients: flex attention is traced, and computed as it is written."""
    model = tiny_model(name, layer_types="SL", sliding_window=7).train()
    positions = torch.cat([torch.arange(9), torch.arange(15)]).repeat(2, 1)
    mask = torch.ones_like(tokens())
    mask[1, :2] = 0
    # What comes out at padded positions is not defined.
    labels = tokens()
    labels[1, :3] = -100
    monkeypatch.setattr(masks, "BLOCK_MASK_DEVICES", {"cpu"})
    monkeypatch.setattr(masks, "WRITTEN_OUT_ENTRIES", 10**9)
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    for arguments in ({}, {"position_ids": positions}, {"position_ids": positions, "attention_mask": mask}):
        arguments |= {"input_ids": tokens(), "labels": labels}
        expected = model(**arguments).loss
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend=look)(**arguments).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        targets = [node.target for node in graphs[-1].graph.nodes]
        flex = targets.count(torch.ops.higher_order.flex_attention)
        # Without documents or padding the full layers of most models need no mask.
        layers = model.config.num_hidden_layers
        assert flex == layers or (len(arguments) == 2 and flex == layers // 2)
        assert all(
            node.kwargs["attn_mask"] is None
            for node in graphs[-1].graph.nodes
            if node.target is torch._C._nn.scaled_dot_product_attention
        )


# Two ways of routing daily.
DAILY = {"bytegpt-tiny", "latent-sliding-lowrank-sigmoid"}


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in SPARSE]
)
def test_router_logits_and_their_loss_compile(name):
    """The library's recording of router logits takes a lock, which no compiler can trace."""
    model = tiny_model(name, router_aux_loss_coef=0.1).train()
    agree(model, output_router_logits=True)


@pytest.mark.parametrize("name", ["llama-tiny", "bytegpt-tiny"])
def test_checkpointed_layers_compile(name):
    model = tiny_model(name).train()
    model.gradient_checkpointing_enable()
    agree(model)


def test_an_exported_program_holds_no_operator_of_this_package():
    model = tiny_model("llama-tiny").eval()
    program = torch.export.export(model, (tokens(),), {"use_cache": False})
    assert not any("tessera." in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(tokens(), use_cache=False).logits, model(tokens()).logits)


def test_code_of_another_version_in_the_same_process_leaves_ours_as_it_is(tmp_path, monkeypatch):
    other = tmp_path / "another_version"
    shutil.copytree(Path(masks.__file__).parent, other)
    source = (
        (other / "loss.py")
        .read_text()
        .replace("return losses.sum(), hidden_grad, ", "return losses.sum() + 100, hidden_grad, ")
    )
    (other / "loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    hidden, weight = torch.randn(8, 4), torch.randn(10, 4)
    targets = torch.arange(8)
    losses = []
    for name in ("tessera.modeling", "another_version", "tessera.modeling"):
        loss = importlib.import_module(f"{name}.loss").linear_cross_entropy
        losses.append(torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight, targets))
        importlib.import_module(f"{name}.layers")
    assert losses[0] == losses[2] and losses[1] == losses[0] + 100

"""Masks: none for plain causal order, traced or not, or padding on the right; block masks give the same."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from torch.nn.attention.flex_attention import BlockMask

from tessera.modeling import masks
from tessera.modeling.masks import make_masks

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Without a soft-cap, which needs a mask whatever the order.
SDPA_MODELS = [name for name in EVERY_MODEL if tiny_config(name).attn_logit_softcapping is None]


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def given_masks(monkeypatch):
    """The masks that the sdpa kernels are called with."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("name", SDPA_MODELS)
def test_plain_causal_rows_reach_the_kernel_without_a_mask(name, given_masks):
    model = tiny_model(name, latent_attention_mode="naive", sliding_window=None, layer_types="L")
    ids = tokens()
    ones, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).unsqueeze(0)
    for extra in ({}, {"attention_mask": ones}, {"position_ids": positions}):
        model.train()(ids, labels=ids, use_cache=True, **extra).loss.backward()
    assert len(given_masks) == 3 * model.config.num_hidden_layers
    assert all(mask is None for mask in given_masks)


def test_only_layers_whose_window_is_shorter_than_the_row_get_a_mask(given_masks):
    model = tiny_model("nanochat-tiny", sliding_window=8)
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    model(tokens(length=8), use_cache=False)
    assert all(mask is None for mask in given_masks)
    given_masks.clear()
    model(tokens(length=9), use_cache=False)
    assert [mask is not None for mask in given_masks] == [kind == "sliding_attention" for kind in kinds]


@pytest.mark.parametrize("name", ["llama-tiny", "bytegpt-tiny"])
def test_a_traced_causal_step_holds_no_mask_in_its_graph(name):
    """The library's own models make one when traced, though it hides nothing more than causal order."""
    model = tiny_model(name, latent_attention_mode="naive").train()
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=look, fullgraph=True)
    ids = tokens()
    compiled(input_ids=ids, labels=ids, use_cache=False)
    calls = [
        node for node in graphs[0].graph.nodes if node.target is torch._C._nn.scaled_dot_product_attention
    ]
    assert len(graphs) == 1 and len(calls) == model.config.num_hidden_layers
    assert all(node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] for node in calls)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_padding_on_the_right_changes_nothing_and_needs_no_mask(name, given_masks):
    model = tiny_model(name)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    wide = model.config.attn_logit_softcapping is None and "sliding_attention" not in model.config.layer_types
    if wide:
        assert all(given is None for given in given_masks)
    torch.testing.assert_close(padded[0], model(ids[:1]).logits[0], **TOLERANCE)
    torch.testing.assert_close(padded[1, :17], model(ids[1:, :17]).logits[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("nanochat-tiny", "windows"),
        ("latent-sliding-lowrank-sigmoid", "documents"),
        ("gpt2-tiny", "padding"),
        ("llama-tiny", "all"),
    ],
)
def test_block_masks_give_the_logits_of_written_out_masks(name, case, monkeypatch):
    model = tiny_model(name, layer_types="SL", sliding_window=5, latent_attention_mode="naive")
    ids = tokens()
    arguments = {"use_cache": False}
    if case in ("documents", "all"):
        arguments["position_ids"] = torch.cat([torch.arange(9), torch.arange(15)]).repeat(2, 1)
    keep = torch.ones_like(ids, dtype=torch.bool)
    if case in ("padding", "all"):
        keep[1, :3] = False
        arguments["attention_mask"] = keep.long()
    with torch.no_grad():
        expected = model(ids, **arguments).logits
    monkeypatch.setattr(masks, "BLOCK_MASK_DEVICES", {"cpu"})
    monkeypatch.setattr(masks, "WRITTEN_OUT_ENTRIES", 0)
    # Compiled kernels are tested on a GPU; here flex attention runs as it is written.
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention",
        lambda training: lambda: torch.nn.attention.flex_attention.flex_attention,
    )
    given = []
    make = masks.make_masks
    monkeypatch.setattr(
        "tessera.modeling.modeling_tessera.make_masks", lambda *args: given.append(make(*args)) or given[-1]
    )
    with torch.no_grad():
        blocks = model(ids, **arguments).logits
    made = [mask for mask in given[0].values() if mask is not None]
    assert made and all(isinstance(mask, BlockMask) for mask in made)
    torch.testing.assert_close(blocks[keep], expected[keep], **TOLERANCE)


def test_attention_dropout_keeps_the_written_out_mask(monkeypatch):
    monkeypatch.setattr(masks, "BLOCK_MASK_DEVICES", {"cpu"})
    config = tiny_config("gpt2-tiny", layer_types="S", sliding_window=4)
    config._attn_implementation = "sdpa"
    made = make_masks(config, torch.zeros(1, 9, 8), None, None, None, dropout=True)
    assert isinstance(made["sliding_attention"], torch.Tensor)


def test_flash_attention_keeps_its_padding_mask():
    """No flash kernel here: the masks are made as for one and looked at."""
    config = tiny_config("llama-tiny")
    config._attn_implementation = "flash_attention_2"
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    made = make_masks(config, torch.zeros(2, 4, 96), mask, None, positions)
    assert torch.equal(made["full_attention"].long(), mask)


def test_flash_attention_refuses_packed_rows_that_it_would_not_keep_apart():
    """The library isolates documents by their positions where the batch is one row, and looks away else."""
    config = tiny_config("llama-tiny")
    config._attn_implementation = "flash_attention_2"
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    with pytest.raises(ValueError, match="keeps packed documents apart in one row only, got 2"):
        make_masks(config, torch.zeros(2, 4, 96), None, None, positions)
    joined = make_masks(config, torch.zeros(1, 8, 96), None, None, positions.view(1, 8))
    assert joined["full_attention"] is None
    plain = torch.arange(4).expand(2, 4)
    assert make_masks(config, torch.zeros(2, 4, 96), None, None, plain)["full_attention"] is None

"""Caches beyond a growing one: compiled static ones, kept between turns, taken back, quantised, offloaded."""

import copy

import pytest
import torch
import transformers
from helpers.models import DIALECTS, EVERY_MODEL, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def prompt(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0, **kwargs}
    return model.generate(ids, do_sample=False, **kwargs)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("latent-sliding-lowrank-sigmoid", {"latent_attention_mode": "naive"}),
        ("latent-learned-layernorm", {"latent_attention_mode": "absorb"}),
        ("moe-qknorm-softcap", {}),
        ("nanochat-tiny", {}),
    ],
)
def test_a_compiled_step_decodes_padded_rows_into_and_past_the_window(name, fields):
    model = tiny_model(name, num_hidden_layers=2, **fields)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    ids, mask = prompt(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch._dynamo.reset()
    counters.clear()
    how = {"cache_implementation": "static", "compile_config": config}
    out = generate(model, ids, attention_mask=mask, **how)
    assert torch.equal(out, generate(model, ids, attention_mask=mask))
    # While a window fills: the first length as a constant, any length; then the full window.
    windows = "sliding_attention" in model.config.layer_types
    assert counters["stats"]["unique_graphs"] == (3 if windows else 1)


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_kept_between_turns_gives_the_text_of_the_whole(name, kind):
    model = tiny_model(name)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(model.config, max_cache_len=40)
    )
    ids = prompt(2, 5)
    for turn in range(3):
        ids = torch.cat([ids, prompt(2, 3, seed=turn)], dim=1)
        expected = generate(model, ids, max_new_tokens=5)
        ids = generate(model, ids, past_key_values=cache, max_new_tokens=5)
        assert torch.equal(ids, expected)
        assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("name", ["bytegpt-tiny", "nanochat-tiny", "verse-tiny"])
def test_one_cached_beginning_serves_many_prompts(name):
    model, beginning = tiny_model(name), prompt(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(beginning, past_key_values=cache)
    ids = torch.cat([beginning.expand(3, -1), prompt(3, 4, seed=2)], dim=1)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(3)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, past_key_values=copied), expected)
    assert torch.equal(generate(model, ids[:1], past_key_values=cache), expected[:1])


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_tokens_taken_back_from_a_cache_leave_no_trace(name):
    model, ids = tiny_model(name), prompt(1, 20)
    cache = DynamicCache(config=model.config)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    model(torch.cat([ids[:, :14], prompt(1, 4, seed=9)], dim=1), past_key_values=cache)
    cache.crop(-4)
    logits = model(ids[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 14:], atol=3e-5, rtol=1e-4)


@pytest.mark.skipif(OLD, reason="transformers 5.17 has no backend without a package")
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tiny", "bytegpt-tiny", "gpt2-tiny", "nanochat-tiny"])
def test_quantized_caches_round_what_they_keep_and_little_else(name):
    model = tiny_model(name, **({"layer_types": "L"} if name == "nanochat-tiny" else {}))
    ids = prompt(2, 16)
    cache = QuantizedCache("fp8", model.config)
    model(ids[:, :12], past_key_values=cache)
    logits = model(ids[:, 12:], past_key_values=cache).logits
    exact = model(ids, use_cache=False).logits[:, 12:]
    error = (logits - exact).norm() / exact.norm()
    # An e4m3 number has three bits after the point, so that one is off by 1/16 at most; four layers add up.
    assert 1e-4 < error < 1 / 4
    assert cache.layers[0]._quantized_keys[0].dtype == torch.float8_e4m3fn


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same_text(name, kind):
    model = tiny_model(name).cuda()
    ids = prompt().cuda()
    out = generate(model, ids, cache_implementation=kind, disable_compile=True)
    assert torch.equal(out, generate(model, ids))

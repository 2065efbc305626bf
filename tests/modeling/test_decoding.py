"""The captured decoding loop against the library's own: the same tokens, ends and shapes.

On a CPU the step is called and not captured; all else is the same. `tests/gpu` has the captured one.
"""

import pytest
import torch
from helpers.models import tiny_model
from transformers import CompileConfig, DynamicCache, TextStreamer

from tessera.modeling import decoding, modeling_tessera

MODELS = ["bytegpt-tiny", "llama-tiny", "gpt2-tiny", "moe-qknorm-softcap", "latent-learned-layernorm"]


@pytest.fixture
def calls(monkeypatch):
    """How often the captured loop ran."""
    seen = []
    sample = decoding.sample_captured

    def count(*args, **kwargs):
        seen.append(1)
        return sample(*args, **kwargs)

    monkeypatch.setattr(modeling_tessera, "sample_captured", count)
    return seen


def prompt(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 250, (batch, length), generator=torch.Generator().manual_seed(5))


def static(model, ids, **arguments):
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    return model.generate(
        ids, **{"cache_implementation": "static", "compile_config": config, "pad_token_id": 0, **arguments}
    )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_a_growing_cache(name, calls):
    model, ids = tiny_model(name), prompt()
    found = static(model, ids, max_new_tokens=21, do_sample=False)
    expected = model.generate(ids, max_new_tokens=21, do_sample=False, pad_token_id=0)
    assert len(calls) == 1 and torch.equal(found, expected)


def test_left_padding_and_ends_of_rows_are_those_of_the_library(calls):
    model, ids = tiny_model("llama-tiny"), prompt(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    free = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    # An end for each row at another step, and one that never comes.
    for ends in ([int(free[0, 13])], [int(free[0, 12]), int(free[1, 15]), int(free[2, 30])], [255]):
        arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": ends}
        expected = model.generate(ids, pad_token_id=0, **arguments)
        assert torch.equal(static(model, ids, **arguments), expected)
    assert len(calls) == 3


def test_a_loop_that_all_rows_have_left_ends_early(monkeypatch):
    model, ids = tiny_model("llama-tiny"), prompt(1)
    end = int(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, -1])
    steps = []
    choose = decoding._State.choose
    monkeypatch.setattr(decoding._State, "choose", lambda *args: steps.append(1) or choose(*args))
    found = static(model, ids, max_new_tokens=120, do_sample=False, eos_token_id=end)
    assert found.shape[1] <= 7 + 3
    assert len(steps) <= 1 + decoding.STEPS_BETWEEN_CHECKS


def test_sampling_follows_the_seed_and_the_distribution(calls):
    model = tiny_model("llama-tiny")
    ids = prompt(1).repeat(4000, 1)
    arguments = {"max_new_tokens": 2, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.95}
    torch.manual_seed(3)
    first = static(model, ids, **arguments)
    torch.manual_seed(3)
    assert torch.equal(static(model, ids, **arguments), first) and len(calls) == 2
    logits = model(ids[:1]).logits[0, -1] / 0.7
    best = logits.topk(5)
    wanted = best.values.softmax(-1)
    kept = wanted.cumsum(-1) - wanted < 0.95
    wanted = torch.where(kept, wanted, 0.0)
    share = (first[:, 7, None] == best.indices).float().mean(0)
    assert set(first[:, 7].tolist()) <= set(best.indices[kept].tolist())
    # Three standard deviations of a share of 4000 draws.
    torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.025, rtol=0)


def test_what_looks_into_each_step_takes_the_loop_of_the_library(calls, capsys):
    from helpers.models import tiny_config

    from tessera import build_byte_tokenizer

    model, ids = tiny_model("llama-tiny"), prompt(1)
    assert tiny_config("llama-tiny").vocab_size == 256
    plain = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, pad_token_id=0, **plain)
    static(model, ids, streamer=TextStreamer(build_byte_tokenizer()), **plain)
    scored = static(model, ids, return_dict_in_generate=True, output_scores=True, **plain)
    assert torch.equal(scored.sequences, expected) and len(scored.scores) == 5
    static(model, ids, repetition_penalty=1.3, **plain)
    static(model, ids, max_time=60.0, **plain)
    model.generate(ids, past_key_values=DynamicCache(config=model.config), pad_token_id=0, **plain)
    sliding = tiny_model("nanochat-tiny")
    assert torch.equal(static(sliding, ids, **plain), sliding.generate(ids, pad_token_id=0, **plain))
    assert not calls


def test_one_token_and_several_rows_of_a_prompt_come_in_the_shapes_of_the_library(calls):
    model, ids = tiny_model("llama-tiny"), prompt(2)
    assert torch.equal(
        static(model, ids, max_new_tokens=1, do_sample=False),
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0),
    )
    rows = static(model, ids, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert rows.shape == (6, 11) and torch.equal(rows[:, :7], ids.repeat_interleave(3, dim=0))
    assert len(calls) == 2

"""Ways to choose tokens: drafts by an assistant or from the prompt, beams, and what steers sampling."""

import pytest
import torch
from helpers.models import DIALECTS, EVERY_MODEL, tiny_model
from transformers import set_seed

from tessera import build_byte_tokenizer

WINDOWED = ["nanochat-tiny", "verse-tiny", "latent-sliding-lowrank-sigmoid"]


def prompt(rows: int = 1, length: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **{"do_sample": False, **kwargs})


def forward_passes(model, run) -> int:
    calls = []
    hook = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    run()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("length", [3, 15])
def test_drafts_change_nothing_but_the_number_of_steps(name, length):
    """Below and past the windows; drafts by a model always right, by one seldom right, and by the prompt."""
    model, ids = tiny_model(name), prompt(1, length)
    expected = generate(model, ids)
    other = "nanochat-tiny" if name == "llama-tiny" else "llama-tiny"
    stranger = tiny_model(other, seed=5, vocab_size=model.config.vocab_size)
    assert torch.equal(generate(model, ids, assistant_model=stranger), expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)
    twin = tiny_model(name)
    steps = forward_passes(
        model, lambda: torch.testing.assert_close(generate(model, ids, assistant_model=twin), expected)
    )
    assert steps < 10


def beams_by_hand(model, ids: torch.Tensor, beams: int, new: int) -> torch.Tensor:
    """The best of `beams` sequences of `new` more tokens, by summed log probability, without cache or end."""
    rows, scores = ids, torch.zeros(1)
    for _ in range(new):
        with torch.no_grad():
            steps = model(rows, use_cache=False).logits[:, -1].log_softmax(-1)
        totals, picks = (scores[:, None] + steps).flatten().topk(beams)
        scores = totals
        vocabulary = steps.shape[-1]
        rows = torch.cat([rows[picks // vocabulary], picks[:, None] % vocabulary], dim=1)
    return rows[:1]


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_beam_search_equals_beams_by_hand(name):
    model, ids = tiny_model(name), prompt()
    assert torch.equal(generate(model, ids, num_beams=4, max_new_tokens=8), beams_by_hand(model, ids, 4, 8))


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("window", [3, 12, 40])
def test_beams_under_windows_of_any_length_equal_beams_by_hand(name, window):
    """Windows shorter than the prompt, filled while decoding, and never filled."""
    model, ids = tiny_model(name, sliding_window=window), prompt()
    for cache in (None, "static"):
        out = generate(model, ids, num_beams=3, max_new_tokens=8, cache_implementation=cache)
        assert torch.equal(out, beams_by_hand(model, ids, 3, 8))


@pytest.mark.parametrize("name", DIALECTS)
def test_sampled_beams_do_not_depend_on_the_cache(name):
    model, ids = tiny_model(name), prompt(2)
    texts = []
    for use_cache in (True, False):
        set_seed(0)
        texts.append(generate(model, ids, num_beams=3, do_sample=True, top_k=20, use_cache=use_cache))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], generate(model, ids, num_beams=3))


@pytest.mark.parametrize("name", ["bytegpt-tiny", "nanochat-tiny"])
class TestSteering:
    def test_text_ends_where_a_stop_string_does(self, name):
        model, tokenizer = tiny_model(name), build_byte_tokenizer()
        whole = generate(model, prompt(), max_new_tokens=40)[0, 9:].tolist()
        # A byte alone need not be a letter; two of ASCII are.
        at = next(i for i in range(39) if all(32 < byte < 127 for byte in whole[i : i + 2]))
        stop = tokenizer.decode(whole[at : at + 2])
        out = generate(model, prompt(), max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer)[0, 9:]
        assert out.tolist() == whole[: at + 2]

    def test_bad_words_do_not_occur(self, name):
        model = tiny_model(name)
        whole = generate(model, prompt())[0, 9:]
        word, pair = whole[:1].tolist(), whole[1:3].tolist()
        out = generate(model, prompt(), bad_words_ids=[word, pair])[0, 9:].tolist()
        assert word[0] not in out
        assert pair not in [out[i : i + 2] for i in range(len(out) - 1)]

    def test_constrained_tokens_are_the_only_ones(self, name):
        allowed = [5, 6, 7, 8]
        out = generate(
            tiny_model(name), prompt(), prefix_allowed_tokens_fn=lambda batch, ids: allowed, num_beams=2
        )
        assert set(out[0, 9:].tolist()) <= set(allowed)

    def test_several_sequences_of_one_prompt_are_sampled_apart(self, name):
        model = tiny_model(name)
        set_seed(0)
        out = generate(model, prompt(2), do_sample=True, num_return_sequences=3)
        assert out.shape[0] == 6
        assert torch.equal(out[:, :9], prompt(2).repeat_interleave(3, dim=0))
        assert len({tuple(row.tolist()) for row in out}) == 6

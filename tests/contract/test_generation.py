"""What `generate` returns beside the text, and how it decodes batches: common generation tests of our own.

transformers' own are not in its source distribution; docs/generation.md has the table of ways to decode.
"""

import pytest
import torch
from helpers.models import DIALECTS, tiny_model

PROMPT, NEW, BEAMS = 6, 5, 3


def prompts(rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 250, (rows, PROMPT), generator=torch.Generator().manual_seed(7))


def generate(model, ids=None, **kwargs):
    ids = prompts() if ids is None else ids
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, max_new_tokens=NEW, **kwargs)


EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", DIALECTS)
def test_scores_and_states_of_each_step_are_those_of_the_whole_text(name, use_cache):
    model = tiny_model(name, attn_implementation="eager")
    out = generate(model, use_cache=use_cache, **EVERYTHING)
    whole = model(out.sequences[:, :-1], output_hidden_states=True, output_attentions=True, use_cache=False)
    steps = range(PROMPT - 1, PROMPT + NEW - 1)
    for given in (out.logits, out.scores):
        expected = whole.logits[:, PROMPT - 1 :].unbind(1)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert len(out.hidden_states) == len(out.attentions) == NEW
    for step, states, probabilities in zip(steps, out.hidden_states, out.attentions, strict=True):
        for given, expected in zip(states, whole.hidden_states, strict=True):
            torch.testing.assert_close(given[:, -1], expected[:, step], atol=1e-4, rtol=1e-4)
        for given, expected in zip(probabilities, whole.attentions, strict=True):
            # A cache may have forgotten what a window no longer shows.
            seen = given.shape[-1]
            expected = expected[:, :, step, step + 1 - seen : step + 1]
            torch.testing.assert_close(given[:, :, -1], expected, atol=1e-4, rtol=1e-4)
    assert (out.past_key_values is not None) == use_cache


@pytest.mark.parametrize("how", [{}, {"num_beams": BEAMS}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", DIALECTS)
def test_the_returned_cache_holds_all_tokens_but_the_last(name, how):
    model = tiny_model(name)
    config = model.config
    out = generate(model, return_dict_in_generate=True, **how)
    rows = 2 * how.get("num_beams", how.get("num_return_sequences", 1))
    assert out.past_key_values.get_seq_length() == PROMPT + NEW - 1
    for kind, layer in zip(config.layer_types, out.past_key_values.layers, strict=False):
        # A sliding layer keeps what the next token will see beside itself.
        length = min(PROMPT + NEW - 1, config.sliding_window - 1) if "sliding" in kind else PROMPT + NEW - 1
        if config.attention_type == "latent":
            assert layer.keys.shape == (rows, 1, length, config.kv_lora_rank)
            assert layer.values.shape == (rows, 1, length, config.qk_rope_head_dim)
        else:
            assert layer.keys.shape == (rows, config.num_key_value_heads, length, config.head_dim)
            assert layer.values.shape == layer.keys.shape


@torch.no_grad()
@pytest.mark.parametrize("name", DIALECTS)
def test_the_score_of_a_beam_is_the_mean_log_probability_of_its_tokens(name):
    model = tiny_model(name)
    # The penalty divides by the length of the new text to this power.
    how = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "length_penalty": 1.0}
    out = generate(model, return_dict_in_generate=True, output_scores=True, **how)
    logits = model(out.sequences[:, :-1]).logits[:, PROMPT - 1 :].float()
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, PROMPT:, None]).squeeze(2)
    torch.testing.assert_close(out.sequences_scores, chosen.mean(1), atol=1e-4, rtol=1e-4)
    transitions = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    torch.testing.assert_close(transitions, chosen, atol=1e-4, rtol=1e-4)
    # Of each prompt the best first.
    assert (out.sequences_scores.view(2, BEAMS).diff(dim=1) <= 1e-6).all()


@pytest.mark.parametrize("name", DIALECTS)
def test_beams_of_padded_prompts_are_those_of_each_prompt_alone(name):
    model = tiny_model(name)
    short = prompts()[:1, 2:]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1)
    ids = torch.cat([padded, prompts()[1:]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    together = generate(model, ids, attention_mask=mask, num_beams=BEAMS)
    assert (
        together[0, PROMPT:].tolist() == generate(model, short, num_beams=BEAMS)[0, short.shape[1] :].tolist()
    )
    assert together[1].tolist() == generate(model, prompts()[1:], num_beams=BEAMS)[0].tolist()


@pytest.mark.parametrize("name", DIALECTS)
def test_a_penalty_and_bad_words_change_what_the_model_would_say(name):
    model = tiny_model(name)
    plain = generate(model)[:, PROMPT:]
    banned = [[token] for token in plain.unique().tolist()]
    steered = generate(model, bad_words_ids=banned)[:, PROMPT:]
    assert not set(steered.unique().tolist()) & set(plain.unique().tolist())
    # So large a penalty lets nothing be said that was said or asked before.
    for row, asked in zip(generate(model, repetition_penalty=1e9), prompts(), strict=True):
        assert len(row.unique()) == len(asked.unique()) + NEW

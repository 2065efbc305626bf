"""`generate`, pipelines and the Auto classes, as a user of transformers calls them."""

import pytest
import torch
from helpers.models import DIALECTS, EVERY_MODEL, tiny_config, tiny_model
from helpers.weights import randomize
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

from tessera import (
    TesseraForCausalLM,
    TesseraForSequenceClassification,
    TesseraForTokenClassification,
    TesseraModel,
    build_byte_tokenizer,
)


def prompt(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_greedy_equals_a_loop_without_cache(name):
    model, ids = tiny_model(name), prompt()
    expected = ids
    for _ in range(14):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids, do_sample=False), expected)


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}])
def test_beam_search_and_chunked_prefill_equal_their_uncached_form(name, how):
    model = tiny_model(name)
    uncached = {key: value for key, value in how.items() if key != "prefill_chunk_size"}
    expected = generate(model, prompt(), do_sample=False, use_cache=False, **uncached)
    assert torch.equal(generate(model, prompt(), do_sample=False, **how), expected)


@pytest.mark.parametrize("name", DIALECTS)
def test_sampling_follows_the_model_and_the_seed(name):
    model = tiny_model(name)
    first, again, other = [], [], []
    for seed, texts in ((0, first), (0, again), (1, other)):
        set_seed(seed)
        texts.append(generate(model, prompt(), do_sample=True, top_k=0, temperature=1.0))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@torch.no_grad()
def test_sampled_frequencies_equal_the_models_probabilities():
    model = tiny_model("llama-tiny")
    ids = prompt(1)
    probabilities = (model(ids).logits[0, -1] / 0.3).softmax(-1)
    set_seed(0)
    rows = generate(model, ids.expand(2000, -1), do_sample=True, top_k=0, temperature=0.3, max_new_tokens=1)
    counts = torch.bincount(rows[:, -1], minlength=256) / 2000
    best = probabilities.topk(3).indices
    torch.testing.assert_close(counts[best], probabilities[best], atol=0.04, rtol=0)


def left_padded(*lengths: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, and all of them as one batch with its mask."""
    rows = [prompt(1, length, seed=length)[0] for length in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return rows, ids, mask


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_left_padded_prompts_give_what_each_gives_alone(name):
    model = tiny_model(name)
    rows, ids, mask = left_padded(11, 4, 7)
    together = generate(model, ids, attention_mask=mask, do_sample=False)
    for row, out in zip(rows, together, strict=True):
        alone = generate(model, row.unsqueeze(0), do_sample=False)
        assert out[11:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_static_cache_gives_the_same_text(name, how):
    model = tiny_model(name)
    _, ids, mask = left_padded(11, 4)
    for inputs in ({"ids": prompt()}, {"ids": ids, "attention_mask": mask}):
        expected = generate(model, **inputs, **how, do_sample=False)
        static = generate(model, **inputs, **how, do_sample=False, cache_implementation="static")
        assert torch.equal(static, expected)


def test_streamed_text_equals_the_returned_text():
    model, tokenizer = tiny_model("bytegpt-tiny"), build_byte_tokenizer()
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = generate(model, ids, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize("name", DIALECTS)
def test_pipeline_from_a_saved_directory(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    tokenizer = build_byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    text = generator("To be", do_sample=False, max_new_tokens=10, return_full_text=False)[0]["generated_text"]
    ids = tokenizer("To be", return_tensors="pt")["input_ids"]
    assert text == tokenizer.decode(generate(model, ids, do_sample=False, max_new_tokens=10)[0, 5:])


@pytest.mark.parametrize("name", DIALECTS)
def test_auto_classes_load_every_head_with_the_same_trunk(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hé")["input_ids"] == list("hé".encode())
    with torch.no_grad():
        expected = model.model(prompt()).last_hidden_state
    for auto, cls, extra in (
        (AutoModel, TesseraModel, {}),
        (AutoModelForCausalLM, TesseraForCausalLM, {}),
        (AutoModelForSequenceClassification, TesseraForSequenceClassification, {"num_labels": 3}),
        (AutoModelForTokenClassification, TesseraForTokenClassification, {"num_labels": 3}),
    ):
        loaded = auto.from_pretrained(tmp_path, **extra)
        assert type(loaded) is cls
        with torch.no_grad():
            assert torch.equal(loaded.base_model(prompt()).last_hidden_state, expected)


@pytest.mark.parametrize("name", DIALECTS)
def test_sequence_classification_reads_the_last_real_token(name):
    config = tiny_config(name, pad_token_id=0, num_labels=3)
    model = randomize(TesseraForSequenceClassification(config))
    ids = prompt(2, 12).clamp(min=1)
    padded = ids.clone()
    padded[1, 8:] = 0
    mask = (padded != 0).long()
    with torch.no_grad():
        both = model(padded, attention_mask=mask).logits
        alone = model(ids[1:, :8]).logits
    assert both.shape == (2, 3)
    torch.testing.assert_close(both[1:], alone, atol=2e-5, rtol=1e-4)
    loss = model(padded, attention_mask=mask, labels=torch.tensor([0, 2])).loss
    expected = torch.nn.functional.cross_entropy(both, torch.tensor([0, 2]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DIALECTS)
def test_token_classification_learns_from_every_token(name):
    model = randomize(TesseraForTokenClassification(tiny_config(name, num_labels=4)))
    labels = prompt() % 4
    out = model(prompt(), labels=labels)
    assert out.logits.shape == (2, 9, 4)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-4)


def test_value_embeddings_refuse_embeddings_of_no_token():
    model = tiny_model("nanochat-tiny")
    with pytest.raises(ValueError, match="value embeddings, which need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIALECTS)
def test_inputs_embeds_equal_ids(name, dtype):
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        expected = model(prompt()).logits
        logits = model(inputs_embeds=model.get_input_embeddings()(prompt())).logits
    assert torch.equal(logits, expected)


def test_learned_positions_refuse_to_run_past_their_table():
    model = tiny_model("gpt2-tiny", max_position_embeddings=10)
    with pytest.raises(ValueError, match="position 10 is past the 10 learned positions"):
        model(prompt(1, 11))


@torch.no_grad()
@pytest.mark.parametrize("name", DIALECTS)
def test_logits_to_keep_are_the_last_ones(name):
    model = tiny_model(name)
    whole = model(prompt()).logits
    for keep, expected in ((2, whole[:, -2:]), (torch.tensor([0, 4]), whole[:, [0, 4]])):
        logits = model(prompt(), logits_to_keep=keep).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tuples_instead_of_outputs_where_asked_for():
    model = tiny_model("llama-tiny")
    expected = model(prompt()).logits
    assert torch.equal(model(prompt(), return_dict=False)[0], expected)
    model.config.return_dict = False
    assert torch.equal(model(prompt())[0], expected)

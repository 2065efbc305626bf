"""From strings to strings: batches of prompts, sampling, and the prompt loop."""

import json

import pytest
import torch
from helpers.models import DIALECTS, tiny_model
from helpers.served import chat_model, chat_tokenizer, space_dropping
from transformers import set_seed

from tessera import build_byte_tokenizer, cli
from tessera.serving.generate import Sampling, complete, converse, load

GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPTS = ["a", "The quick brown fox", "hé 日本", "0123456789 0123456789 0123456789"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


def greedy_by_hand(model, prompt: str, count: int) -> bytes:
    """The likeliest byte after byte, without cache, padding or `generate`."""
    ids = list(prompt.encode())
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return bytes(ids[-count:])


@pytest.mark.parametrize("name", DIALECTS)
def test_prompts_of_different_lengths_in_one_batch_continue_as_each_alone(name, tokenizer):
    model = tiny_model(name, seed=4)
    expected = [greedy_by_hand(model, prompt, 12).decode(errors="replace") for prompt in PROMPTS]
    assert len(set(expected)) > 1, "a model that always says the same proves nothing"
    assert complete(model, tokenizer, PROMPTS, GREEDY) == expected
    assert [complete(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS] == expected


def test_a_prompt_and_its_completion_are_one_text_where_decoders_drop_the_first_space():
    """As those of Llama and Mistral do."""
    dropping = space_dropping(chat_tokenizer())
    model = chat_model()

    def say_space(module, args, output):
        output.logits[..., ord(" ")] = 1e4

    model.register_forward_hook(say_space)
    sampling = Sampling(max_new_tokens=2, temperature=0)
    assert complete(model, dropping, ["ab"], sampling) == ["  "]


def test_a_seed_gives_the_same_sample_again_and_another_gives_another(tokenizer):
    model, sampling = tiny_model("llama-tiny"), Sampling(max_new_tokens=30, temperature=1.0)
    texts = []
    for seed in (1, 1, 2):
        set_seed(seed)
        texts.append(complete(model, tokenizer, ["ab"], sampling)[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("narrow", [{"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(narrow, tokenizer):
    model = tiny_model("llama-tiny")
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 1.0, **narrow})
    assert complete(model, tokenizer, PROMPTS, sampling) == complete(model, tokenizer, PROMPTS, GREEDY)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
    ids=str,
)
def test_sampling_that_cannot_work_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**given)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["fine", ""], "a prompt is empty"),
        (
            ["fine", "x" * 501],
            "a prompt of 501 tokens and 12 new ones are more than the model's context of 512",
        ),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, sentence, tokenizer):
    with pytest.raises(ValueError, match=sentence):
        complete(tiny_model("llama-tiny"), tokenizer, prompts, GREEDY)


def test_a_prompt_may_fill_the_context_to_the_last_token(tokenizer):
    model = tiny_model("gpt2-tiny", max_position_embeddings=20)
    (completion,) = complete(model, tokenizer, ["x" * 8], GREEDY)
    assert completion == greedy_by_hand(model, "x" * 8, 12).decode(errors="replace")


# ---- the prompt loop ----


class Echo:
    """Stands in for `complete`: notes what it is given and answers with a fixed text."""

    def __init__(self, answer: str = "!"):
        self.answer, self.prompts = answer, []

    def __call__(self, model, tokenizer, prompts, sampling, streamer):
        self.prompts += prompts
        return [self.answer]


def typed(*lines):
    """A `read` that gives these lines, raises those that are errors, and then ends."""
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    return read


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (["one", "two"], ["one", "one!two"]),
        (["one", "", "two"], ["one", "one!two"]),
        (["one", "/clear", "two"], ["one", "two"]),
        (["one", "/exit", "two"], ["one"]),
        (["one", " /exit "], ["one"]),
        ([KeyboardInterrupt, "one"], []),
        ([], []),
    ],
)
def test_the_loop_remembers_clears_and_leaves(lines, prompts, tokenizer, monkeypatch):
    monkeypatch.setattr("tessera.serving.generate.complete", echo := Echo())
    converse(tiny_model("llama-tiny"), tokenizer, GREEDY, typed(*lines))
    assert echo.prompts == prompts


def test_the_loop_prints_what_the_model_makes_of_a_prompt(tokenizer, capsys):
    model = tiny_model("llama-tiny", seed=4)
    converse(model, tokenizer, GREEDY, typed("The quick"))
    out, err = capsys.readouterr()
    assert complete(model, tokenizer, ["The quick"], GREEDY)[0] in out
    assert "/clear" in err and "/exit" in err


@pytest.mark.parametrize("text", ["abcdefgh" * 20, "é日" * 50, "\U0001f600" * 40])
def test_a_history_longer_than_the_context_loses_its_beginning_not_its_end(
    text, tokenizer, monkeypatch, capsys
):
    """Cut in the middle of a character of several bytes, it must not grow."""
    model = tiny_model("llama-tiny", max_position_embeddings=64)
    monkeypatch.setattr("tessera.serving.generate.complete", echo := Echo())
    for end in ("", "x", "xy", "xyz"):
        echo.prompts.clear()
        converse(model, tokenizer, GREEDY, typed(text + end))
        (prompt,) = echo.prompts
        assert (text + end).endswith(prompt)
        assert 64 / 2 < len(prompt.encode()) + GREEDY.max_new_tokens <= 64


def test_a_turn_that_cannot_be_answered_says_so_and_the_loop_goes_on(tokenizer, capsys):
    model = tiny_model("llama-tiny", max_position_embeddings=8)
    converse(model, tokenizer, GREEDY, typed("one", "two"))
    assert capsys.readouterr().err.count("error: a prompt of 3 tokens") == 2


def test_ctrl_c_ends_an_answer_and_not_the_loop(tokenizer, monkeypatch):
    prompts = []

    def interrupted(model, tokenizer, given, sampling, streamer):
        prompts.extend(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("tessera.serving.generate.complete", interrupted)
    converse(tiny_model("llama-tiny"), tokenizer, GREEDY, typed("one", "two"))
    assert prompts == ["one", "onetwo"]


# ---- loading ----


def test_a_directory_without_a_tokenizer_is_bytes(tmp_path):
    model = tiny_model("llama-tiny", seed=4)
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load(tmp_path, device="cpu")
    assert not loaded.training
    assert complete(loaded, tokenizer, PROMPTS, GREEDY) == complete(model, tokenizer, PROMPTS, GREEDY)


def test_a_config_is_laid_over_the_one_in_the_directory(tmp_path):
    tiny_model("llama-tiny").save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "long.json").write_text(json.dumps({**values, "max_position_embeddings": 640}))
    model, _ = load(tmp_path / "model", str(tmp_path / "long.json"), device="cpu")
    assert model.config.max_position_embeddings == 640


@pytest.mark.parametrize("content", ['{"a"', '{"a": 1}', '{"added_tokens": []}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(content, tmp_path):
    chat_model().save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"vocab_size": 300}, "has no tokenizer, and 300 tokens are not bytes"),
        ({"vocab_size": 200, "tokenizer": True}, "has 256 tokens, the model's vocabulary only 200"),
    ],
    ids=["none", "too large"],
)
def test_a_tokenizer_that_does_not_fit_is_refused(overrides, sentence, tmp_path, tokenizer):
    if overrides.pop("tokenizer", False):
        tokenizer.save_pretrained(tmp_path)
    tiny_model("llama-tiny", **overrides).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    tiny_model("llama-tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device nonsense: "):
        load(tmp_path, device="nonsense")


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
@pytest.mark.parametrize("name", ["--model", "--ckpt-path"])
def test_every_command_takes_the_model_by_either_name(command, name, capsys, monkeypatch):
    monkeypatch.setattr("tessera.commands.serve.silence_transformers", lambda: None)
    more = {"generate": ["--prompt", "x"], "chat": [], "serve": ["--port", "0"]}[command]
    with pytest.raises(SystemExit) as exit:
        cli.run([command, name, "no/such/model", *more])
    assert exit.value.code == 2
    assert "no/such/model" in capsys.readouterr().err.splitlines()[-1]

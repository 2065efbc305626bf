"""The Gradio example against a server in this process."""

import os

import pytest
from helpers.served import chat_model, chat_tokenizer, engine_of, greedy_reference, scripted, served

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gradio = pytest.importorskip("gradio")
from gradio_chat import build_chat, make_reply  # noqa: E402
from openai import OpenAIError  # noqa: E402


def as_gradio_has_it(turns: list[dict]) -> list[dict]:
    chatbot = gradio.Chatbot()
    return chatbot.preprocess(chatbot.postprocess(turns))


def test_its_answer_grows_to_that_of_the_model():
    model, tokenizer = chat_model(), chat_tokenizer()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    with engine_of(model, tokenizer) as engine, served(engine) as url:
        texts = list(make_reply(url)("And now?", as_gradio_has_it(turns), "Be brief.", 0))
    messages = [
        {"role": "system", "content": "Be brief."},
        *turns,
        {"role": "user", "content": "And now?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert texts[-1] == greedy_reference(model, tokenizer, prompt, 16)
    assert len(set(texts)) > 3 and all(texts[-1].startswith(text) for text in texts)


def test_the_interface_has_it_as_its_function():
    with engine_of(scripted(b"Fine."), chat_tokenizer()) as engine, served(engine) as url:
        chat = build_chat(url)
        *_, last = chat.fn("Hello", [], "", 0.7)
    assert last == "Fine."
    assert [entry.label for entry in chat.additional_inputs] == ["System prompt", "Temperature"]


def test_no_server_is_an_error():
    with pytest.raises(OpenAIError):
        make_reply("http://127.0.0.1:9")

"""The chat in the terminal: what is said, remembered and forgotten."""

import io

import pytest
from helpers.served import chat_model, chat_tokenizer, engine_of, greedy_reference, scripted

from tessera import build_byte_tokenizer, cli
from tessera.serving.conversations import ChatFormat
from tessera.serving.engine import Request
from tessera.serving.terminal_chat import TerminalChat


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def chat(tokenizer):
    """A chat with a model that always says "Fine.", and a note of the prompts it got."""
    with engine_of(scripted(b"Fine."), tokenizer) as engine:
        chat = TerminalChat(engine, ChatFormat(tokenizer), Request((), 16))
        chat.prompts = []
        stream = engine.stream

        def noting(request):
            chat.prompts.append(tokenizer.decode(request.prompt))
            return stream(request)

        engine.stream = noting
        yield chat


def typed(*lines):
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    return read


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ANSWER = turn("assistant", "Fine.")
OPEN = "<|im_start|>assistant\n"


def test_the_conversation_so_far_is_the_prompt(chat, capsys):
    chat.run(typed("Hi", "", "How are you?"))
    assert chat.prompts == [
        turn("user", "Hi") + OPEN,
        turn("user", "Hi") + ANSWER + turn("user", "How are you?") + OPEN,
    ]
    assert capsys.readouterr().out == "Fine.\nFine.\n"


@pytest.mark.parametrize(
    ("lines", "last"),
    [
        (["a", "/clear", "b"], turn("user", "b") + OPEN),
        (["/system Be kind.", "a"], turn("system", "Be kind.") + turn("user", "a") + OPEN),
        (["/system Be kind.", "/system", "a"], turn("user", "a") + OPEN),
        (["/system S", "a", "/clear", "b"], turn("system", "S") + turn("user", "b") + OPEN),
        (["a", "/exit", "b"], turn("user", "a") + OPEN),
        (["a", KeyboardInterrupt, "b"], turn("user", "a") + OPEN),
    ],
)
def test_commands(lines, last, chat, capsys):
    chat.run(typed(*lines))
    assert chat.prompts[-1] == last


def test_an_unknown_command_is_not_a_message(chat, capsys):
    chat.run(typed("/hlep"))
    assert chat.prompts == [] and "/system" in capsys.readouterr().err


def test_the_oldest_turns_make_room_and_the_instructions_stay(chat, tokenizer, capsys):
    chat.system = "Be kind."
    lines = [f"question {i} " + "x" * 100 for i in range(6)]
    chat.run(typed(*lines))
    for prompt in chat.prompts:
        assert len(tokenizer(prompt)["input_ids"]) + 16 <= chat.engine.context
        assert prompt.startswith(turn("system", "Be kind.") + "<|im_start|>user\n")
    assert "question 0" in chat.prompts[1] and "question 0" not in chat.prompts[-1]
    assert "question 4" in chat.prompts[-1] and chat.prompts[-1].endswith(turn("user", lines[-1]) + OPEN)


def test_a_message_that_cannot_fit_is_refused_and_the_chat_goes_on(chat, capsys):
    chat.run(typed("a", "x" * 600, "b"))
    assert "more than the model's context of 512" in capsys.readouterr().err
    assert chat.prompts[-1].endswith(turn("user", "b") + OPEN) and "xx" not in chat.prompts[-1]


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(chat, capsys, monkeypatch):
    def interrupted(request):
        yield "Fi"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.engine, "stream", interrupted)
    chat.run(typed("a"))
    assert chat.turns[-1] == {"role": "assistant", "content": "Fi"}
    assert capsys.readouterr().out == "Fi\n"


def test_thoughts_are_shown_and_not_remembered(tokenizer, capsys):
    ids = tokenizer("<think>hm</think>Yes.")["input_ids"]
    with engine_of(scripted(ids), tokenizer) as engine:
        chat = TerminalChat(engine, ChatFormat(tokenizer), Request((), 40))
        chat.run(typed("a"))
    assert capsys.readouterr().out == "[thinking] hm\n\nYes.\n"
    assert chat.turns[-1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("template", "longest", "sentence"),
    [(False, 16, "has no chat template"), (True, 512, "leave no room for messages")],
)
def test_what_cannot_chat_is_refused(template, longest, sentence, tokenizer):
    tokenizer = tokenizer if template else build_byte_tokenizer()
    with engine_of(chat_model(), tokenizer) as engine, pytest.raises(ValueError, match=sentence):
        TerminalChat(engine, ChatFormat(tokenizer), Request((), longest))


def test_the_command_answers_piped_lines(tokenizer, tmp_path, monkeypatch, capsys):
    model = chat_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("tessera.commands.serve.silence_transformers", lambda: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/exit\nnever\n"))
    flags = ["--temperature", "0", "--max-new-tokens", "9", "--device", "cpu", "--system", "S"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(["chat", "--model", str(tmp_path), *flags])
    assert not exit.value.code
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = greedy_reference(model, tokenizer, prompt, 9)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_tool_call_is_shown_and_stays_in_the_conversation(tokenizer, capsys):
    call = b'<tool_call>\n{"name": "find", "arguments": {"city": "K\xc3\xb6ln"}}\n</tool_call>'
    with engine_of(scripted(tokenizer.encode(call.decode())), tokenizer) as engine:
        chat = TerminalChat(engine, ChatFormat(tokenizer), Request((), 80))
        chat.run(typed("Hi"))
        assert capsys.readouterr().out.strip() == '[calls] {"name": "find", "arguments": {"city": "Köln"}}'
        assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
        assert call.decode() + "<|im_end|>" in tokenizer.decode(chat.format.render(chat.turns))

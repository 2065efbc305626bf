"""The chat template against text written by hand; masks, parsing, and tokens at the edges of a turn."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from tessera.tokenization import SPECIAL_TOKENS, add_chat, train_tokenizer
from tessera.tokenization.chat import chat_template

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Añade.", "parameters": {}}}]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "?"}]},
    {
        "role": "assistant",
        "reasoning_content": "A sum.",
        "content": "I ask.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}},
            {"type": "function", "function": {"name": "add", "arguments": '{"a":2}'}},
        ],
    },
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": {"sum": "é"}},
    {"role": "assistant", "content": " \n It is 2.\n"},
    {"role": "user", "content": "\nOnce more"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "See "},
            {"type": "python", "text": "1+1"},
            {"type": "python_output", "text": "2"},
            {"type": "text", "text": " 東."},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "stop"}}]},
]

# What is inside of [[ ]] is what the assistant says: the rest is not in the mask.
RENDERED = """\
<|im_start|>system
Be brief.

You can call these tools:
{"type": "function", "function": {"name": "add", "description": "Añade.", "parameters": {}}}
To call one, write:
<tool_call>
{"name": <its name>, "arguments": <a JSON object>}
</tool_call><|im_end|>
<|im_start|>user
1+1?<|im_end|>
<|im_start|>assistant
[[<think>
A sum.
</think>
I ask.
<tool_call>
{"name": "add", "arguments": {"a": 1, "b": "é"}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"a":2}}
</tool_call><|im_end|>]]
<|im_start|>user
<tool_response>
2
</tool_response>
<tool_response>
{"sum": "é"}
</tool_response><|im_end|>
<|im_start|>assistant
[[It is 2.
<|im_end|>]]
<|im_start|>user

Once more<|im_end|>
<|im_start|>assistant
[[See <|python_start|>1+1<|python_end|>]]<|output_start|>2<|output_end|>[[ 東.<|im_end|>]]
<|im_start|>assistant
[[<tool_call>
{"name": "stop", "arguments": {}}
</tool_call><|im_end|>]]
"""


def said(rendered: str) -> list[str]:
    return [part.split("]]")[0] for part in rendered.split("[[")[1:]]


def test_a_conversation_with_everything_is_rendered_exactly(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    assert text == RENDERED.replace("[[", "").replace("]]", "")
    prompt = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant\n"


def test_the_mask_holds_what_the_assistant_says_and_the_ends_of_its_turns(tokenizer):
    given = tokenizer.apply_chat_template(
        CHAT, tools=TOOLS, return_assistant_tokens_mask=True, return_dict=True
    )
    masked, current = [], []
    for index, inside in zip([*given["input_ids"], 0], [*given["assistant_masks"], 0], strict=True):
        if inside:
            current.append(index)
        elif current:
            masked.append(tokenizer.decode(current))
            current = []
    assert masked == said(RENDERED)


def test_an_answer_that_ends_in_a_character_of_several_tokens_is_marked_whole(tokenizer):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "well 🦊"}]
    given = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    pairs = zip(given["input_ids"], given["assistant_masks"], strict=True)
    assert tokenizer.decode([index for index, inside in pairs if inside]) == "well 🦊<|im_end|>"


def test_tools_make_a_system_turn_where_there_is_none(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=TOOLS, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou can call these tools:\n{")
    assert text.endswith("</tool_call><|im_end|>\n<|im_start|>user\nx<|im_end|>\n")


def test_nothing_is_added_to_a_conversation_without_a_system_message(tokenizer):
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        == "<|im_start|>user\nx<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "answer", ["x", "\n\n x", "    indented", "\r\n\tx", "/x", "'s", "1", "東", "", "\u3000x"]
)
def test_a_prompt_with_its_answer_has_the_tokens_of_the_conversation(tokenizer, answer):
    """Or else a model would be trained on tokens that it cannot say after the prompt."""
    chat = [{"role": "user", "content": "ka?"}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == answer.lstrip() + "<|im_end|>\n"


def test_a_longer_conversation_begins_with_the_shorter_one(tokenizer):
    for end in (2, 3, 5, 6, 8):
        shorter = tokenizer.apply_chat_template(CHAT[:end], tools=TOOLS)["input_ids"]
        longer = tokenizer.apply_chat_template(CHAT, tools=TOOLS)["input_ids"]
        assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"content": "x"}, "must be system, user, assistant or tool, got none"),
        ({"role": "robot", "content": "x"}, "must be system, user, assistant or tool, got robot"),
        ({"role": "user", "content": 5}, "must be a text or a list of parts, got 5"),
        ({"role": "user", "content": [{"type": "image"}]}, "parts that are not text"),
        (
            {"role": "assistant", "content": [{"type": "image"}]},
            "must have the type text, python or python_output",
        ),
    ],
)
def test_what_is_no_message_is_refused(tokenizer, message, sentence):
    with pytest.raises(TemplateError, match=sentence):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_an_answer_is_parsed_into_what_it_was_rendered_from(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:2], tools=TOOLS, add_generation_prompt=True)["input_ids"]
    answer = tokenizer.apply_chat_template(CHAT[:3], tools=TOOLS)["input_ids"][len(prompt) :]
    assert tokenizer.parse_response(answer, prefix=prompt) == {
        "role": "assistant",
        "thinking": "A sum.",
        "content": "I ask.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}},
            {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
        ],
    }
    assert tokenizer.parse_response("Just text<|im_end|>", prefix=prompt) == {
        "role": "assistant",
        "content": "Just text",
    }
    # with more white space than the template has
    call = '<think>\nA sum.\n</think>\n\nI ask.\n\n<tool_call>{"name": "add"}</tool_call>\n\n<|im_end|>\n'
    parsed = tokenizer.parse_response(call, prefix=prompt)
    assert (parsed["thinking"], parsed["content"], len(parsed["tool_calls"])) == ("A sum.", "I ask.", 1)
    # cut short by a limit of tokens
    assert tokenizer.parse_response("Just te", prefix=prompt)["content"] == "Just te"


def test_what_a_parsed_answer_holds_is_rendered_as_the_answer(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:2], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(CHAT[:3], tools=TOOLS, tokenize=False)
    message = tokenizer.parse_response(text[len(prompt) :], prefix=prompt)
    again = tokenizer.apply_chat_template([*CHAT[:2], message], tools=TOOLS, tokenize=False)
    assert again == text.replace('{"a":2}', '{"a": 2}')


def test_adding_the_format_appends_what_is_missing_and_keeps_roles(corpus):
    tokenizer = train_tokenizer(corpus, kind="bpe", vocab_size=400)
    backend, size = tokenizer.backend_tokenizer, len(tokenizer)
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    add_chat(bare)
    assert len(bare) == size and bare.eos_token == "<|im_end|>" and bare.pad_token == "<|pad|>"

    bare = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(kind="bytes").backend_tokenizer)
    bare.add_tokens(["<own>"])
    own = len(bare)
    assert len(add_chat(bare)) == own and bare.padding_side == "left"


def test_a_template_that_is_there_stays(corpus):
    tokenizer = train_tokenizer(kind="bytes")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert add_chat(tokenizer).chat_template == "{{ messages[0].content }}"


def test_the_saved_template_is_the_one_in_the_package(folder):
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == chat_template()
    assert set(SPECIAL_TOKENS) <= set(AutoTokenizer.from_pretrained(folder).get_vocab())

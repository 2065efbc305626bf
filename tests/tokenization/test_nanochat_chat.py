"""nanochat's conversations: ids and masks against its rules written out over tiktoken's own encoder."""

import pytest
import tiktoken
from jinja2.exceptions import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessera.data.chat_rows import IGNORED, encode_conversation
from tessera.tokenization import add_chat, chat_template, find_end_of_turn, save_tokenizer
from tessera.tokenization.byte_level import BYTE_NAMES
from tessera.tokenization.chat import NANOCHAT_TOKENS

# GPT-4's way to split, with at most two digits together.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+"
)

PARTS = [
    {"type": "text", "text": "Wait… é"},
    {"type": "python", "text": "12*34"},
    {"type": "python_output", "text": "408"},
    {"type": "text", "text": " so 408 🦊"},
    {"type": "python_output", "text": ""},
]
CHATS = {
    "one turn": [("user", "Hello?"), ("assistant", "  Ka lo, 12345!\n")],
    "several turns": [("user", "a"), ("assistant", "b"), ("user", "東京\n"), ("assistant", "ren 🦊")],
    "a system message": [("system", "Be brief.\n"), ("user", " 1+1"), ("assistant", "2")],
    "python": [("user", "12 times 34?"), ("assistant", PARTS)],
    "an empty answer": [("user", ""), ("assistant", "")],
    "no answer": [("user", "alone")],
}


@pytest.fixture(scope="module")
def pair(corpus) -> tuple[PreTrainedTokenizerFast, tiktoken.Encoding]:
    """A tokenizer as nanochat's are, special tokens behind a byte-level BPE, and tiktoken's of its ranks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    byte_of = {name: byte for byte, name in BYTE_NAMES.items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in backend.get_vocab().items()}
    backend.add_special_tokens(list(NANOCHAT_TOKENS))
    special = {token: len(ranks) + i for i, token in enumerate(NANOCHAT_TOKENS)}
    reference = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend), reference


def render(encoding: tiktoken.Encoding, chat: list[tuple]) -> tuple[list[int], list[int]]:
    """Ids, and 1 for each that is trained: each piece of text encoded alone, as nanochat does it."""
    ids, mask = [], []

    def add(trained: int, *pieces: str) -> None:
        for piece in pieces:
            special = piece in NANOCHAT_TOKENS
            new = [encoding.encode_single_token(piece)] if special else encoding.encode_ordinary(piece)
            ids.extend(new)
            mask.extend([trained] * len(new))

    chat = list(chat)
    if chat[0][0] == "system":
        (_, system), (_, first) = chat[:2]
        chat[:2] = [("user", f"{system}\n\n{first}")]
    add(0, "<|bos|>")
    for role, content in chat:
        if role == "user":
            add(0, "<|user_start|>", content, "<|user_end|>")
            continue
        add(0, "<|assistant_start|>")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                add(1, part["text"])
            elif part["type"] == "python":
                add(1, "<|python_start|>", part["text"], "<|python_end|>")
            else:
                add(0, "<|output_start|>", part["text"], "<|output_end|>")
        add(1, "<|assistant_end|>")
    return ids, mask


def messages_of(chat: list[tuple]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def nanochat(pair, tmp_path_factory) -> PreTrainedTokenizerFast:
    """As it is saved, and loaded without this package."""
    folder = tmp_path_factory.mktemp("nanochat") / "tokenizer"
    save_tokenizer(add_chat(pair[0]), folder)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == chat_template("nanochat")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_ids_and_masks_are_those_written_by_hand(nanochat, pair, chat):
    ids, mask = render(pair[1], chat)
    given = nanochat.apply_chat_template(
        messages_of(chat), return_dict=True, return_assistant_tokens_mask=True
    )
    assert given["input_ids"] == ids
    if chat[1:] and "🦊" not in str(chat):
        assert given["assistant_masks"] == mask
    if any(mask):
        labels = encode_conversation(nanochat, {"messages": messages_of(chat)})["labels"]
        assert labels == [i if trained else IGNORED for i, trained in zip(ids, mask, strict=True)]


def test_the_prompt_of_an_answer_ends_with_the_token_that_begins_it(nanochat, pair):
    chat = CHATS["several turns"]
    prompt = nanochat.apply_chat_template(messages_of(chat[:3]), add_generation_prompt=True)["input_ids"]
    whole = render(pair[1], chat)[0]
    assert prompt == whole[: len(prompt)] and prompt[-1] == len(nanochat) - 9 + 4 - 1


def test_a_nanochat_tokenizer_keeps_its_size_and_gets_its_roles(nanochat, pair):
    assert len(nanochat) == pair[1].n_vocab == 509
    assert {nanochat.bos_token, nanochat.eos_token, nanochat.pad_token} == {"<|bos|>"}
    assert set(nanochat.all_special_tokens) == set(NANOCHAT_TOKENS) and nanochat.padding_side == "left"
    assert find_end_of_turn(nanochat) == pair[1].encode_single_token("<|assistant_end|>")
    assert nanochat("ka")["input_ids"] == pair[1].encode_ordinary("ka")


def test_an_answer_is_parsed_into_what_it_was_rendered_from(nanochat):
    chat = messages_of([("user", "ka?"), ("assistant", "lo <|python_start|>1+1<|python_end|>")])
    chat[1]["reasoning_content"] = "Hm."
    text = nanochat.apply_chat_template(chat, tokenize=False)
    assert text.endswith(
        "<|assistant_start|><think>\nHm.\n</think>\nlo <|python_start|>1+1<|python_end|><|assistant_end|>"
    )
    prompt = nanochat.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert nanochat.parse_response(text[len(prompt) :], prefix=prompt) == {
        "role": "assistant",
        "thinking": "Hm.",
        "content": "lo <|python_start|>1+1<|python_end|>",
    }


@pytest.mark.parametrize(
    ("chat", "tools", "sentence"),
    [
        ([("user", "a"), ("user", "b")], None, "expected a message of the assistant, got user"),
        ([("assistant", "a")], None, "expected a message of the user, got assistant"),
        ([("user", "a"), ("system", "b")], None, "expected a message of the assistant, got system"),
        ([("system", "a")], None, "must be followed by a user's"),
        ([("user", "a"), ("assistant", [{"type": "image"}])], None, "text, python or python_output"),
        ([("user", [{"type": "python", "text": "1"}])], None, "parts that are not text"),
        ([("user", 5)], None, "must be a text or a list of parts, got 5"),
        ([("user", "a")], [{"name": "f"}], "no tools but python"),
    ],
)
def test_what_the_format_lacks_is_refused(nanochat, chat, tools, sentence):
    with pytest.raises(TemplateError, match=sentence):
        nanochat.apply_chat_template(messages_of(chat), tools=tools, tokenize=False)


def test_calls_of_other_tools_are_refused(nanochat):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(TemplateError, match="no tool calls but python"):
        nanochat.apply_chat_template([{"role": "user", "content": "a"}, call], tokenize=False)


def test_the_style_can_be_chosen_and_a_template_replaced(corpus):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")
    add_chat(tokenizer, "nanochat")
    assert len(tokenizer) == 1 + len(NANOCHAT_TOKENS) and tokenizer.eos_token == "a"
    assert tokenizer.chat_template == chat_template("nanochat")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert add_chat(tokenizer).chat_template == "{{ messages[0].content }}"
    assert add_chat(tokenizer, replace=True).chat_template == chat_template("nanochat")
    with pytest.raises(ValueError, match="no chat style 'x'; there are chatml, nanochat"):
        add_chat(tokenizer, "x")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(trained, template, end):
    tokenizer = AutoTokenizer.from_pretrained(trained["bpe"])
    tokenizer.chat_template = template
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert find_end_of_turn(tokenizer) == expected

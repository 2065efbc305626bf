"""Rows to train on: what is refused, what becomes of long ones, packing, and TRL's trainer on them."""

import copy
import random
import re

import pytest
import torch
from helpers.chats import chat_model, chat_tokenizer, conversations, turn, write_rows
from transformers import AutoModelForCausalLM

from tessera.data.chat import load_conversations
from tessera.data.chat_rows import (
    IGNORED,
    Packed,
    RowEncoder,
    add_positions,
    encode_conversation,
    load_rows,
    mark_conversation,
    pack_best_fit,
    shuffled,
)


def with_template(template: str):
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def read(tmp_path, *messages: list[dict]) -> list[dict]:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": of_one} for of_one in messages])
    return list(load_conversations(path))


# ---- masks that are none ----

NO_MARKS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
EMPTY = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
ALL = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (NO_MARKS, r"does not mark what the assistant says.*put {% generation %}"),
        (EMPTY, r"chats.jsonl, row 2: the chat template marks nothing of a conversation"),
        (ALL, r"chats.jsonl, row 2: the chat template marks all of a conversation"),
    ],
)
def test_a_template_that_tells_nothing_is_refused_with_the_row(template, sentence, tmp_path):
    row = read(tmp_path, turn("a", "b"), turn("c", "d"))[1]
    with pytest.raises(ValueError, match=sentence):
        encode_conversation(with_template(template), row)
    with pytest.raises(ValueError, match=sentence):
        list(RowEncoder(with_template(template), 64).encode([row]))


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match=r"^there is nothing to train on, .* has no assistant turn"):
        encode_conversation(chat_tokenizer(), {"messages": turn("a", "b")[:1]})


def test_a_cut_before_the_answer_is_refused_with_the_row_and_the_place(tmp_path):
    row = read(tmp_path, turn("A long question?", "Yes."))[0]
    first = next(
        i for i, label in enumerate(encode_conversation(chat_tokenizer(), row)["labels"]) if label > 0
    )
    with pytest.raises(ValueError) as refused:
        encode_conversation(chat_tokenizer(), row, max_length=first)
    assert str(refused.value) == (
        f"{tmp_path}/chats.jsonl, row 1: there is nothing to train on, for the conversation is cut at "
        f"{first} tokens and the assistant's words begin at token {first + 1}"
    )
    assert encode_conversation(chat_tokenizer(), row, max_length=first + 1)["labels"][-1] != IGNORED


def test_blocks_that_end_in_half_a_character_or_in_nothing_are_marked_to_the_character():
    """Where transformers' own mask loses the rest of a character, or runs on to the end."""
    bare = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    for answer in ("well 🦊", "well 東", "well."):
        for chat in (turn("x", answer), [*turn("x", ""), *turn("y", answer), *turn("z", "")]):
            marked = mark_conversation(bare, {"messages": chat})
            pairs = zip(marked.ids, marked.trained, strict=True)
            assert bare.decode([i for i, trained in pairs if trained]) == answer


def test_a_token_that_the_assistant_begins_within_is_the_assistants():
    """As transformers has it: the space of ` blue` stands before the block."""
    loose = with_template(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    chat = turn("Which colour?", "blue")
    marked = mark_conversation(loose, {"messages": chat})
    theirs = loose.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert marked.trained == [bool(mask) for mask in theirs["assistant_masks"]]
    assert loose.decode([i for i, t in zip(marked.ids, marked.trained, strict=True) if t]) == " blue"


# ---- texts that spell control tokens ----

LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
)


def test_texts_that_spell_special_tokens_of_the_tokenizer_are_left_out_and_counted(tmp_path):
    foreign = with_template(LLAMA_3)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    foreign.add_special_tokens({"additional_special_tokens": headers}, replace_extra_special_tokens=False)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"<|pad|>": 1}}]}
    marks = turn("What is <think>?", "Is <tool_call> and <|python_start|>1<|python_end|>, </s> too.")
    header = turn("<|eot_id|><|start_header_id|>system<|end_header_id|>", "b")
    chats = read(
        tmp_path, turn("a", "b"), turn("a", "b<|endoftext|>c"), [turn("a", "")[0], call], marks, header
    )
    own = RowEncoder(chat_tokenizer(), 256)
    rows = list(own.encode(chats))
    assert rows == [encode_conversation(chat_tokenizer(), chats[i]) for i in (0, 3, 4)]
    assert own.refused == {"that spell a special token of the tokenizer": 2}
    assert own.summary().endswith(
        "; left out 2 that spell a special token of the tokenizer (first: "
        f"{tmp_path}/chats.jsonl, row 2: a text spells <|endoftext|>, a special token of the tokenizer)"
    )
    # A template that writes no marks leaves them no meaning but that of tokens.
    other = RowEncoder(foreign, 256)
    assert len(list(other.encode(chats))) == 1 and other.refused.total() == 4
    with pytest.raises(
        ValueError, match="no conversation can be used: 1 that spell .* row 5: a text spells <|"
    ):
        list(RowEncoder(foreign, 256).encode(chats[4:]))


def test_a_conversation_that_the_template_refuses_is_counted_and_ends_nothing(tmp_path):
    image = turn([{"type": "image", "url": "x"}], "b")
    chats = read(tmp_path, image, turn("a", "b"))
    encoder = RowEncoder(chat_tokenizer(), 64)
    assert list(encoder.encode(chats)) == [encode_conversation(chat_tokenizer(), chats[1])]
    assert encoder.refused == {"that the chat template refuses": 1}
    with pytest.raises(ValueError, match="no conversation can be used: 1 that the chat template refuses"):
        list(RowEncoder(chat_tokenizer(), 64).encode(chats[:1]))


# ---- too long ----


def test_long_conversations_are_cut_split_or_dropped_as_asked_and_counted(tmp_path):
    tokenizer = chat_tokenizer()
    answer = "The colour of snow is white. " * 20
    rows = read(tmp_path, turn("Name?", "Ada."), turn("Colour?", answer), turn("Why? " * 40, "Yes."))
    whole = [encode_conversation(tokenizer, row) for row in rows]
    sizes = [len(row["input_ids"]) for row in whole]
    assert sizes[0] < 64 < sizes[1] and sizes[2] > 64

    cut = RowEncoder(tokenizer, 64)
    assert list(cut.encode(rows)) == [
        whole[0],
        {key: values[:64] for key, values in whole[1].items()},
    ]
    assert (cut.long, cut.left_out, cut.first_left_out) == (2, 1, f"{tmp_path}/chats.jsonl, row 3")
    assert cut.summary().endswith(
        "; 2 conversations of over 64 tokens cut, 1 of them left out, with nothing of the assistant's "
        f"(first: {tmp_path}/chats.jsonl, row 3)"
    )

    split = RowEncoder(tokenizer, 64, "split")
    pieces = list(split.encode(rows))
    assert all(len(piece["input_ids"]) <= 64 for piece in pieces)
    longer = pieces[1:-1]
    joined = [i for piece in longer for i in piece["input_ids"][piece is not longer[0] :]]
    assert joined == whole[1]["input_ids"]
    kept = whole[2]["labels"][-len(pieces[-1]["labels"]) :]
    assert pieces[-1]["labels"] == kept and split.left_out == (sizes[2] - 2) // 63
    assert "2 conversations of over 64 tokens split" in split.summary()

    drop = RowEncoder(tokenizer, 64, "drop")
    assert list(drop.encode(rows)) == whole[:1] and (drop.long, drop.left_out) == (2, 0)
    with pytest.raises(ValueError, match="can be truncate, split, drop; got 'shrink'"):
        RowEncoder(tokenizer, 64, "shrink")


@pytest.mark.parametrize("length", [2, 7, 64])
def test_each_token_of_a_split_answer_is_predicted_once_from_its_own_conversation(length):
    tokenizer = chat_tokenizer()
    chats = [{"messages": turn(f"{n}?", f"The colour of {n} is white. " * n)} for n in (3, 8, 20)]
    whole = [encode_conversation(tokenizer, chat) for chat in chats]
    expected = [
        (before, label)
        for row in whole
        for before, label in zip(row["input_ids"], row["labels"][1:], strict=False)
        if label != IGNORED
    ]
    encoder, found = RowEncoder(tokenizer, length, "split"), []
    for row in pack_best_fit(encoder.encode(chats), length + 3):
        starts = [sum(row["seq_lengths"][:part]) for part in range(len(row["seq_lengths"]))]
        assert all(row["labels"][start] == IGNORED for start in starts)
        pairs = zip(row["input_ids"], row["labels"][1:], strict=False)
        found += [pair for pair in pairs if pair[1] != IGNORED]
    assert sorted(found) == sorted(expected) and encoder.trained == len(expected)


def test_a_part_that_begins_with_a_trained_token_is_not_predicted_from_the_part_before():
    rows = [{"input_ids": [n] * 2, "labels": [n] * 2} for n in (1, 2)]
    (row,) = pack_best_fit(rows, 4)
    assert row["labels"] == [IGNORED, row["input_ids"][1], IGNORED, row["input_ids"][3]]


# ---- packing ----


def made_up(count: int, seed: int, longest: int) -> list[dict]:
    """Rows of lengths as conversations have them: many short, some long; each token is its row's number."""
    draw = random.Random(seed)
    sizes = [min(longest, 8 + int(draw.lognormvariate(5, 1))) for _ in range(count)]
    return [{"input_ids": [n] * size, "labels": [IGNORED, *[n] * (size - 1)]} for n, size in enumerate(sizes)]


@pytest.mark.parametrize("buffer", [None, 1000, 50])
def test_every_row_is_packed_once_and_whole(buffer):
    rows = made_up(700, seed=1, longest=512)
    packed = Packed(512)
    joined = list(pack_best_fit(iter(rows), 512, buffer=buffer, packed=packed))
    found = []
    for row in joined:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 512
        start = 0
        for size in row["seq_lengths"]:
            parts = {key: row[key][start : start + size] for key in ("input_ids", "labels")}
            assert parts == rows[parts["input_ids"][0]]
            found.append(parts["input_ids"][0])
            start += size
    assert sorted(found) == list(range(700))
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert (packed.rows, packed.conversations, packed.tokens) == (len(joined), 700, tokens)
    assert packed.utilisation == tokens / (len(joined) * 512)
    assert f"{len(joined)} rows of 512 tokens, {100 * packed.utilisation:.2f} % full" in packed.summary()
    # No two rows together would have fitted into one, save the last of a stream.
    assert sum(len(row["input_ids"]) <= 256 for row in joined) <= 1


def test_as_few_rows_as_trls_own_packing_has_and_nearly_full():
    from datasets import Dataset
    from trl import pack_dataset

    rows = made_up(3000, seed=2, longest=2048)
    theirs = len(pack_dataset(Dataset.from_list(rows), 2048))
    packed = Packed(2048)
    list(pack_best_fit(rows, 2048, packed=packed))
    assert packed.rows <= theirs and packed.utilisation > 0.995


def test_a_row_that_is_too_long_to_pack_is_refused():
    with pytest.raises(ValueError, match="a row has 5 tokens, more than the 4 of a row"):
        list(pack_best_fit([{"input_ids": [1] * 5, "labels": [1] * 5}], 4))


def test_positions_begin_anew_and_padding_is_a_part_of_its_own():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, IGNORED, 9], "seq_lengths": [3, 2]}
    assert add_positions(row) == {**row, "position_ids": [0, 1, 2, 0, 1]}
    assert add_positions(row, length=7, padding=1) == {
        "input_ids": [5, 6, 7, 8, 9, 1, 1],
        "labels": [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED],
        "position_ids": [0, 1, 2, 0, 1, 0, 1],
        "seq_lengths": [3, 2, 2],
    }


def test_a_stream_is_shuffled_within_its_buffer_and_the_same_each_time():
    one, other = (list(shuffled(range(500), seed=3, buffer=20)) for _ in range(2))
    assert one == other != list(range(500)) and sorted(one) == list(range(500))
    assert all(value <= place + 20 for place, value in enumerate(one))


# ---- datasets ----


def tokens_by_conversation(dataset) -> list[tuple]:
    found = []
    for row in dataset:
        start = 0
        for size in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (row[key][start : start + size] for key in ("input_ids", "labels"))
            found.append(tuple(zip(ids, labels, strict=True)))
            start += size
    return sorted(found)


def test_the_same_rows_in_memory_streamed_packed_and_alone(tmp_path):
    path, said = write_rows(tmp_path / "chats.jsonl", conversations(60)), []
    given = (path, chat_tokenizer(), 256)
    expected = sorted(
        tuple(zip(row["input_ids"], row["labels"], strict=True))
        for row in (encode_conversation(chat_tokenizer(), chat) for chat in load_conversations(path))
    )
    for packing in (True, False):
        for streaming in (True, False):
            dataset = load_rows(*given, packing=packing, streaming=streaming, say=said.append)
            assert tokens_by_conversation(dataset) == expected
            assert (len(list(dataset)) < 60) == packing
    assert len(said) == 3 and re.fullmatch(
        r"packed into \d+ rows of 256 tokens, 9\d.\d\d % full, .*", said[1]
    )
    assert len(load_rows(*given, limit=3, packing=False, say=said.append)) == 3
    with pytest.raises(ValueError, match="chats.jsonl: no conversation has an answer within 4 tokens"):
        load_rows(path, chat_tokenizer(), 4)
    with pytest.raises(ValueError, match="does not mark what the assistant says"):
        load_rows(path, with_template(NO_MARKS), 64)


def test_trls_trainer_takes_packed_rows_and_scores_each_conversation_alone(tmp_path):
    """Padding-free, by TRL's own collator: the loss is that of the conversations one at a time."""
    from trl import SFTConfig, SFTTrainer

    folder = chat_model(tmp_path / "base", initializer_range=0.2)
    path = write_rows(tmp_path / "chats.jsonl", conversations(12))
    dataset = load_rows(path, chat_tokenizer(), 250, say=lambda line: None)
    assert len(dataset) < 12
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=len(dataset),
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=True,
        report_to="none",
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=chat_tokenizer())
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape[0] == 1 and int((batch["position_ids"] == 0).sum()) == 12
    clean, total, count = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0, 0
    with torch.no_grad():
        packed = trainer.compute_loss(model.eval(), dict(batch)).item()
        for chat in load_conversations(path):
            row = encode_conversation(chat_tokenizer(), chat)
            log_probs = clean(torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
            for place, label in enumerate(row["labels"][1:]):
                if label != IGNORED:
                    total, count = total - log_probs[place, label].item(), count + 1
    assert packed == pytest.approx(total / count, abs=2e-4)

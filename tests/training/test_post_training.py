"""What the three kinds of post-training share: flags, learning rates, folders, batches of held-out rows."""

import dataclasses
import inspect
from importlib import import_module

import pytest
import torch
from helpers.chats import chat_tokenizer, turn
from helpers.models import tiny_model

from tessera.commands import post_training as commands
from tessera.training.held_out import answer, batches_by_length, hold_out, token_log_probs
from tessera.training.post_training import rate_by_size, written_aside


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_every_argument_is_a_flag_with_the_same_default(stage):
    arguments = getattr(import_module(f"tessera.training.{stage}"), f"{stage.upper()}Arguments")
    fields = {field.name: field.default for field in dataclasses.fields(arguments)}
    flags = {p.name: p.default for p in inspect.signature(getattr(commands, stage)).parameters.values()}
    assert flags.pop("resume") is False
    if stage == "sft":  # another way of naming the data
        assert flags.pop("preset") is None
    fields.pop("sample_tokens")
    assert flags.keys() == fields.keys()
    # where a run is written and how many rows make a step are each command's own
    own = {"save_path", "model", "data"} | ({"batch_size"} if stage == "grpo" else set())
    assert {k: v for k, v in flags.items() if k not in own} == {
        k: v for k, v in fields.items() if k not in own
    }
    assert flags["save_path"] == f"runs/{stage}"


def test_the_learning_rate_falls_with_the_size_of_the_model():
    class Sized(torch.nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.num_parameters = lambda: parameters

    assert rate_by_size(Sized(7_000_000_000), 2e-5) == pytest.approx(2e-5)
    assert rate_by_size(Sized(1_750_000_000), 2e-5) == pytest.approx(4e-5)
    assert rate_by_size(Sized(1000), 2e-5) == pytest.approx(1e-3)


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    (folder := tmp_path / "final").mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), written_aside(folder) as aside:
        aside.mkdir()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old.txt"]
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / "new.txt").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_is_held_out_is_not_trained_on():
    rows = list(range(100))
    train, held_out = hold_out(rows, seed=3)
    assert sorted(train + held_out) == rows and len(held_out) == 5
    assert hold_out(rows, seed=3) == (train, held_out) != hold_out(rows, seed=4)
    assert len(hold_out(rows, seed=3, most=2)[1]) == 2 and len(hold_out([1, 2], seed=0)[1]) == 1
    with pytest.raises(ValueError, match="there are 1 rows of data, and one must be held out"):
        hold_out([1], seed=0)


def test_padded_batches_score_as_rows_alone():
    model = tiny_model("nanochat-tiny")
    rows = [torch.randint(0, 256, (length,)).tolist() for length in (5, 9, 17, 3)]
    labels = [[-100, *row[1:]] for row in rows]
    batches = batches_by_length([len(row) for row in rows], 256)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]
    with torch.no_grad():
        together = token_log_probs(model, rows, labels)
        for row, found in zip(rows, together, strict=True):
            alone = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected = torch.stack([alone[i, row[i + 1]] for i in range(len(row) - 1)])
            torch.testing.assert_close(found[: len(row) - 1], expected, atol=1e-5, rtol=1e-5)
            assert not found[len(row) - 1 :].any()


def test_batches_are_as_large_as_their_logits_allow(monkeypatch):
    monkeypatch.setattr("tessera.training.held_out.LOGITS_AT_A_TIME", 40)
    assert batches_by_length([10, 2, 2, 50, 2], 2) == [[1, 2, 4], [0], [3]]


def test_answers_in_a_batch_are_those_to_each_alone():
    tokenizer = chat_tokenizer()
    model = tiny_model("llama-tiny", vocab_size=400, padded_vocab_size=None)
    model.generation_config.eos_token_id = [7]
    conversations = [turn("Hi", "Ho")[:1], [*turn("Hello?", "Yes."), {"role": "user", "content": "And now?"}]]
    together = answer(model, tokenizer, conversations, max_new_tokens=12)
    assert together == [answer(model, tokenizer, [one], max_new_tokens=12)[0] for one in conversations]
    prompt = tokenizer.apply_chat_template(
        conversations[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    said = model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    model.generation_config.eos_token_id = [said[3]]
    (ended,) = answer(model, tokenizer, conversations[:1], max_new_tokens=12)
    assert ended == tokenizer.decode(said[: said.index(said[3])])

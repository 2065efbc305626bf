"""Direct preference optimization: what it comes to prefer, where it starts from, and how it refuses."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from helpers.chats import chat_model, chat_tokenizer, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tessera.data.preferences import load_preferences
from tessera.training import dpo as module
from tessera.training.dpo import DPOArguments, dpo, encode_pairs


def preferences(count: int, seed: int) -> list[dict]:
    """Yes is chosen over no, and the other words are chance."""
    draw = random.Random(seed)
    names = ["Ada", "Ben", "Cora", "Dan", "Elsa", "Finn"]
    return [
        {
            "prompt": f"Is {draw.choice(names)} {draw.choice(names)}?",
            "chosen": f"Yes, {(name := draw.choice(names))}.",
            "rejected": f"No, {name}.",
        }
        for _ in range(count)
    ]


def arguments(folder: Path, model: str, **given) -> DPOArguments:
    if "data" not in given:
        given["data"] = write_rows(folder / "pairs.jsonl", preferences(40, seed=0))
    defaults = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "evaluations": 0, "sample_tokens": 4}
    return DPOArguments(**{"model": model, "save_path": str(folder / "run"), **defaults, **given})


@torch.no_grad()
def log_odds(folder: Path | str, rows: list[dict]) -> torch.Tensor:
    """How much likelier the chosen answer is than the rejected one, pair by pair, written out by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), chat_tokenizer()
    differences = []
    for row in rows:
        scores = []
        for side in ("chosen", "rejected"):
            prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(f"{prompt}{row[side]}<|im_end|>", return_tensors="pt")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            log_probs = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        differences.append(scores[0] - scores[1])
    return torch.tensor(differences)


@pytest.mark.parametrize("lora", [False, True])
def test_held_out_preferences_are_learnt(lora, tmp_path):
    held_out = preferences(15, seed=5)
    base = chat_model(tmp_path / "base", "gpt2-tiny" if not lora else "llama-tiny")
    eval_data = write_rows(tmp_path / "held_out.jsonl", held_out)
    result = dpo(arguments(tmp_path, base, steps=12, eval_data=eval_data, lora=lora, evaluations=1))
    before, after = log_odds(base, held_out), log_odds(result.final, held_out)
    moved = after - before
    assert (moved > 0).float().mean() > 0.9 and moved.mean() > 2
    assert result.before["reward_accuracy"] == 0.5 and result.before["reward_margin"] == 0
    # what is reported is what an independent loop finds
    assert result.after["reward_margin"] == pytest.approx(0.1 * moved.mean().item(), rel=2e-3)
    assert result.after["reward_accuracy"] == pytest.approx((moved > 0).float().mean().item())
    assert result.after["preferred"] == pytest.approx((after > 0).float().mean().item())
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    first = next(record for record in lines if "loss" in record)
    # Policy and reference are one at the start; dropout, which gpt2-tiny has, would tell them apart.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (result.folder / "loss.png").is_file()


def test_the_configuration_comes_through_unchanged(tmp_path):
    base = chat_model(tmp_path / "base", "bytegpt-tiny", resid_pdrop=0.25, router_aux_loss_coef=0.01)
    final = dpo(arguments(tmp_path, base, steps=2)).final
    before, after = (json.loads((Path(path) / "config.json").read_text()) for path in (base, final))
    for key in ("eos_token_id", "pad_token_id", "transformers_version"):
        before.pop(key, None), after.pop(key, None)
    assert after == before


def test_padding_of_the_vocabulary_takes_no_probability(tmp_path, monkeypatch):
    base = chat_model(tmp_path / "base", padded_vocab_size=448)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[400:] = model.lm_head.weight[:48] * 20
    model.save_pretrained(base)
    trainers = []
    monkeypatch.setattr(
        module._Trainer, "training_step", lambda self, *args, **kwargs: trainers.append(self) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        dpo(arguments(tmp_path, base))
    ids = torch.randint(0, 300, (2, 12))
    expected = AutoModelForCausalLM.from_pretrained(base)(ids).logits.log_softmax(-1)[:, :-1]
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
    for policy in (trainers[0].model, trainers[0].ref_model):
        ours = policy(ids, labels=ids, fused_lm_head=True).log_probs
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_an_answer_is_its_words_and_the_end_of_its_turn(tmp_path):
    pairs = list(load_preferences(write_rows(tmp_path / "a.jsonl", preferences(3, seed=1))))
    tokenizer = chat_tokenizer()
    for pair, row in zip(pairs, encode_pairs(tokenizer, pairs, length=64), strict=True):
        prompt = tokenizer.decode(row["prompt_ids"])
        assert prompt == f"<|im_start|>user\n{pair.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(row["chosen_ids"]) == pair.chosen["content"] + "<|im_end|>"
        assert tokenizer.decode(row["rejected_ids"]) == pair.rejected["content"] + "<|im_end|>"
        whole = len(row["prompt_ids"]) + len(row["chosen_ids"])
        (cut,) = encode_pairs(tokenizer, [pair], length=whole - 2)
        assert cut["chosen_ids"] == row["chosen_ids"][:-2]
        assert encode_pairs(tokenizer, [pair], length=len(row["prompt_ids"])) == []


def test_a_run_that_was_killed_goes_on_from_the_same_reference(tmp_path, monkeypatch):
    base = chat_model(tmp_path / "base")
    given = {"steps": 6, "checkpoint_minutes": 1e-9}
    whole = dpo(arguments(tmp_path, base, **given, save_path=str(tmp_path / "whole")))
    step = module._Trainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise SystemExit
        return step(self, *args, **kwargs)

    monkeypatch.setattr(module._Trainer, "training_step", killed)
    with pytest.raises(SystemExit):
        dpo(arguments(tmp_path, base, **given))
    monkeypatch.undo()
    resumed = dpo(arguments(tmp_path, base, **given), resume=True)
    expected = load_file(whole.final / "model.safetensors")
    for name, tensor in load_file(resumed.final / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=0, msg=name)
    assert resumed.after == pytest.approx(whole.after, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"data": "none.jsonl"}, "there is no file or folder none.jsonl"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"max_seq_len": 4}, "no prompt leaves room for an answer in --max-seq-len 4 tokens"),
        ({"limit": 1}, "one must be held out"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(given, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        dpo(arguments(tmp_path, chat_model(tmp_path / "base"), **given))
    assert not (tmp_path / "run").exists()

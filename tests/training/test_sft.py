"""Supervised fine-tuning: what it learns, that it learns nothing else, what it leaves, and how it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.chats import assistant_nats, chat_model, chat_tokenizer, conversations, turn, write_rows
from helpers.models import DIALECTS
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessera.data.chat import load_conversations
from tessera.tokenization import build_byte_tokenizer, train_tokenizer
from tessera.training import sft as module
from tessera.training.sft import SFTArguments, sft

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))
PADDED = {"padded_vocab_size": 448}  # of 400


def arguments(folder: Path, model: str, **given) -> SFTArguments:
    """A few steps on generated conversations; the run is `folder / "run"`."""
    if "data" not in given:
        given["data"] = write_rows(folder / "chats.jsonl", conversations(60))
    defaults = {"steps": 4, "batch_size": 4, "max_seq_len": 128, "learning_rate": 3e-3}
    defaults |= {"evaluations": 0, "sample_tokens": 4}
    return SFTArguments(**{"model": model, "save_path": str(folder / "run"), **defaults, **given})


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def records(run: Path, key: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in r]


class Captured(Exception):
    """Ends training at its first micro-batch."""


def capture(monkeypatch, args: SFTArguments):
    """The trainer of a run and its first micro-batch."""
    caught = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        caught.extend([self, inputs])
        raise Captured

    monkeypatch.setattr(module._Trainer, "training_step", training_step)
    with pytest.raises(Captured):
        sft(args)
    return caught


# ---- learning ----


def test_the_held_out_loss_of_the_assistant_falls(tmp_path):
    base = chat_model(tmp_path / "base")
    held_out = conversations(20, seed=77)
    eval_data = write_rows(tmp_path / "held_out.jsonl", held_out)
    result = sft(arguments(tmp_path, base, eval_data=eval_data, steps=60, evaluations=2, max_seq_len=256))
    before, after = assistant_nats(base, held_out), assistant_nats(result.final, held_out)
    assert before > 5.5 and after < 0.3 * before
    # what is reported is what an independent loop finds
    assert result.before["val_loss"] == pytest.approx(before, rel=1e-4)
    assert result.after["val_loss"] == pytest.approx(after, rel=1e-4)
    assert [r["step"] for r in records(result.folder, "val_loss")] == [0, 20, 40, 60]
    assert len(records(result.folder, "loss")) == 60
    assert (result.folder / "loss.png").is_file() and "assistant: " in (
        result.folder / "sample.txt"
    ).read_text()


@pytest.mark.shared
def test_the_held_out_loss_falls_on_real_conversations_with_tools(tmp_path):
    source = SHARED / "data" / "sgd_chat"
    rows = load_conversations(str(source / "train.jsonl.gz"), limit=300)
    tokenizer = train_tokenizer((json.dumps(row) for row in rows), vocab_size=1024)
    base = chat_model(tmp_path / "base", tokenizer=tokenizer, max_position_embeddings=1024)
    held_out = list(load_conversations(str(source / "dev.jsonl.gz"), limit=10))
    args = arguments(tmp_path, base, data=str(source), limit=500, steps=45, batch_size=8, max_seq_len=256)
    result = sft(args)
    before, after = assistant_nats(base, held_out), assistant_nats(result.final, held_out)
    assert before > 6 and after < 0.75 * before


def test_the_tuned_model_answers_and_stops_at_the_end_of_its_turn(tmp_path):
    row = {"messages": turn("Which colour has snow?", "White.")}
    data = write_rows(tmp_path / "one.jsonl", [row] * 40)
    final = sft(
        arguments(tmp_path, chat_model(tmp_path / "base"), data=data, steps=30, learning_rate=1e-2)
    ).final
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    vocabulary = tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    inputs = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=50)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]) == "White.<|im_end|>"


def test_only_the_assistants_words_are_learnt(tmp_path):
    """Two answers that are certain after questions that are chance: the loss goes to nothing."""
    rows = [{"messages": turn(f"{i * 7919 % 1000}?", "Yes.")} for i in range(80)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    args = arguments(tmp_path, chat_model(tmp_path / "base"), data=data, steps=30, learning_rate=1e-2)
    assert sft(args).after["val_loss"] < 0.01


# ---- packing ----


@pytest.mark.parametrize("preset", [*DIALECTS, "nanochat-moe-smear-gqa", "latent-learned-layernorm"])
def test_packed_conversations_score_as_alone_and_see_no_neighbour(preset, tmp_path, monkeypatch):
    padded = {"padded_vocab_size": 448} if "nanochat" in preset else {}
    # The balance of experts is a matter of each batch.
    base = chat_model(tmp_path / "base", preset, initializer_range=0.2, router_aux_loss_coef=0.0, **padded)
    trainer, inputs = capture(monkeypatch, arguments(tmp_path, base, max_seq_len=250))
    trainer.model.eval()  # no dropout
    clean = AutoModelForCausalLM.from_pretrained(base).eval()
    spans = []
    for row, (positions, mask) in enumerate(
        zip(inputs["position_ids"], inputs["attention_mask"], strict=True)
    ):
        starts = (positions * mask + (1 - mask) == 0).nonzero().flatten().tolist()
        spans += [(row, *span) for span in zip(starts, [*starts[1:], int(mask.sum())], strict=True)]
    assert len(spans) >= len(inputs["input_ids"]) + 3
    alone, counted = 0.0, 0
    with torch.no_grad():
        packed = trainer.compute_loss(trainer.model, dict(inputs)).item()
        for row, start, end in spans:
            ids, targets = inputs["input_ids"][row : row + 1, start:end], inputs["labels"][row, start:end]
            log_probs = clean(ids, use_cache=False).logits[0].log_softmax(-1)
            for i in range(1, end - start):
                if targets[i] != -100:
                    alone, counted = alone - log_probs[i - 1, targets[i]].item(), counted + 1
    assert packed == pytest.approx(alone / counted, abs=2e-4)
    # and none sees its neighbours: what is put in the place of one moves nothing but its own scores
    row, start, end = next(
        span for span in spans if span[1] and span[2] < inputs["attention_mask"][span[0]].sum()
    )
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][row, start:end] = torch.randint(0, 300, (end - start,))
    with torch.no_grad():
        one, other = (
            trainer.model(**batch, fused_lm_head=True, use_cache=False).log_probs
            for batch in (inputs, changed)
        )
    moved = (one - other).abs()
    assert moved[row, start : end - 1].max() > 1e-3
    moved[row, start - 1 : end - 1] = 0
    assert moved.max() < 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_both_ways_of_batching_train_on_the_same_tokens(packing, tmp_path, monkeypatch):
    rows = conversations(8, seed=4)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    given = {"data": data, "eval_data": data, "batch_size": 8, "max_seq_len": 256, "packing": packing}
    _, inputs = capture(monkeypatch, arguments(tmp_path, chat_model(tmp_path / "base"), **given))
    expected = []
    for row in rows:
        encoded = chat_tokenizer().apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        expected += [i for i, trained in pairs if trained]
    assert sorted(inputs["labels"][inputs["labels"] != -100].tolist()) == sorted(expected)
    assert (len(inputs["input_ids"]) < 8) == packing
    assert inputs["input_ids"].shape[1] <= 256


@pytest.mark.parametrize(("too_long", "left"), [("truncate", 1), ("split", 4), ("drop", 0)])
def test_long_conversations_train_as_asked_and_it_is_told(too_long, left, tmp_path, monkeypatch, capsys):
    """Of a conversation of four rows, its first, all, or nothing; beside short ones that always count."""
    short, long = turn("Who?", "Ada."), turn("What?", "Yes, snow is white. " * 60)
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": short}, {"messages": long}])
    eval_data = write_rows(tmp_path / "eval.jsonl", [{"messages": short}])
    base = chat_model(tmp_path / "base")
    size = len(chat_tokenizer().apply_chat_template(long)["input_ids"])
    length = -(-size // 4)
    given = {"data": data, "eval_data": eval_data, "max_seq_len": length, "too_long": too_long}
    trainer, _ = capture(monkeypatch, arguments(tmp_path, base, **given))
    sizes = sorted(size for row in trainer.train_dataset for size in row["seq_lengths"])
    # Each further piece begins with the last token of the one before it.
    assert len(sizes) == 1 + left and sum(sizes) == sizes[0] + {0: 0, 1: length, 4: size + 3}[left]
    told = capsys.readouterr().out
    done = {"truncate": "cut", "split": "split", "drop": "left out"}[too_long]
    assert f"1 conversations of over {length} tokens {done}" in told
    assert re.search(rf"packed into \d rows of {length} tokens, \d+\.\d\d % full", told)


def test_a_conversation_without_a_mask_ends_the_run_with_its_row(tmp_path):
    """A template that marks text alone: what calls a tool would be read and never learnt."""
    base = chat_model(tmp_path / "base")
    marked = (Path(base) / "chat_template.jinja").read_text()
    text_alone = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and m.content %}"
    text_alone += "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}\n{% endfor %}"
    (Path(base) / "chat_template.jinja").write_text(text_alone)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [{"messages": turn("a", "b")}, {"messages": [{"role": "user", "content": "c"}, call]}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    eval_data = write_rows(tmp_path / "eval.jsonl", rows[:1])
    assert "generation" in marked
    with pytest.raises(ValueError, match="rows.jsonl, row 2: the chat template marks nothing of a convers"):
        sft(arguments(tmp_path, base, data=data, eval_data=eval_data))


def test_a_preset_stands_in_the_place_of_data(tmp_path, monkeypatch, capsys):
    from tessera import cli

    given = []
    monkeypatch.setattr(module, "sft", lambda args, resume: given.append(args) or exit(0))
    for words in (["--preset", "openthoughts"], ["--preset", "x"], ["--preset", "alpaca", "--data", "y"]):
        with pytest.raises(SystemExit):
            cli.run(["sft", "--model", "m", "--save-path", str(tmp_path / "run"), *words])
    assert [args.data for args in given] == ["open-thoughts/OpenThoughts-114k"]
    told = capsys.readouterr().err
    assert "there is no preset 'x'" in told and "give either --data or --preset" in told


# ---- adapters ----


@pytest.mark.parametrize("preset", ["llama-tiny", "bytegpt-tiny", "nanochat-moe-smear-gqa"])
def test_merged_adapters_answer_as_adapters_and_leave_the_rest_alone(preset, tmp_path):
    base = chat_model(tmp_path / "base", preset)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    result = sft(arguments(tmp_path, base, lora=True, lora_rank=4, learning_rate=1e-2))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    old, merged = weights(base), weights(result.final)
    assert old.keys() == merged.keys()
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, merged[name])}
    attention = {name for name in old if ".self_attn." in name and name.endswith("proj.weight")}
    experts = {name for name in old if ".experts." in name}
    assert attention | experts <= changed
    assert not any("embed_tokens" in name or "lm_head" in name or "norm" in name for name in changed)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.folder / "adapter")
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base)
    final = AutoModelForCausalLM.from_pretrained(result.final)
    with torch.no_grad():
        ours, theirs, start = (model.eval()(ids).logits for model in (final, adapted, plain))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert (ours - start).abs().max() > 1e-3


# ---- what a run leaves ----


@pytest.mark.parametrize("preset", ["bytegpt-tiny", "gpt2-tiny"])
def test_the_configuration_comes_through_training_unchanged(preset, tmp_path):
    coefficient = {"router_aux_loss_coef": 0.01} if preset == "bytegpt-tiny" else {}
    base = chat_model(tmp_path / "base", preset, **coefficient)
    final = sft(arguments(tmp_path, base)).final
    before, after = (json.loads((Path(path) / "config.json").read_text()) for path in (base, final))
    for key in ("eos_token_id", "pad_token_id", "transformers_version"):
        before.pop(key, None), after.pop(key, None)
    assert after == before


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_predict_ahead_are_trained_on_or_dropped_with_a_sentence(lora, tmp_path, capsys):
    base = chat_model(tmp_path / "base", num_mtp_layers=1, train_mtp=True)
    final = sft(arguments(tmp_path, base, lora=lora)).final
    config = json.loads((final / "config.json").read_text())
    before, after = ({n: t for n, t in weights(path).items() if "layers.2." in n} for path in (base, final))
    assert config["train_mtp"] is False and config["num_mtp_layers"] == (0 if lora else 1)
    assert ("are left out" in capsys.readouterr().out) == lora
    assert after.keys() == (set() if lora else before.keys())
    assert all(not torch.equal(before[name], after[name]) for name in after)


def test_padding_of_the_vocabulary_takes_no_probability(tmp_path, monkeypatch):
    base = chat_model(tmp_path / "base", padded_vocab_size=448)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[400:] = model.lm_head.weight[:48] * 20
    model.save_pretrained(base)
    trainer, inputs = capture(monkeypatch, arguments(tmp_path, base))
    clean = AutoModelForCausalLM.from_pretrained(base)
    expected = clean(**inputs, use_cache=False)
    assert trainer.compute_loss(trainer.model, dict(inputs)).item() == pytest.approx(
        expected.loss.item(), rel=1e-4
    )


def test_no_file_of_a_run_is_a_pickle(tmp_path):
    result = sft(arguments(tmp_path, chat_model(tmp_path / "base"), checkpoint_minutes=1e-9, lora=True))
    suffixes = {path.suffix for path in result.folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".png", ".yaml", ".md", ".py"}


def test_a_base_model_on_bytes_learns_to_chat(tmp_path):
    base = chat_model(tmp_path / "base", tokenizer=build_byte_tokenizer(), max_position_embeddings=512)
    with pytest.raises(ValueError, match="lacks 14 tokens of the chat template.*not learnt with --lora"):
        sft(arguments(tmp_path, base, lora=True))
    result = sft(arguments(tmp_path, base, steps=20, max_seq_len=256))
    model, tokenizer = (kind.from_pretrained(result.final) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) == 270 == model.get_input_embeddings().num_embeddings
    assert result.after["val_loss"] < result.before["val_loss"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_a_stream_trains_on_what_is_not_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT_OF_A_STREAM", 5)
    rows = [{"messages": turn("Name?", name)} for name in ["Ada"] * 5 + ["Ben"] * 30]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    base = chat_model(tmp_path / "base")
    trainer, inputs = capture(monkeypatch, arguments(tmp_path, base, data=data, streaming=True))
    trained = trainer.processing_class.decode(inputs["labels"][inputs["labels"] != -100])
    assert "Ben" in trained and "Ada" not in trained
    monkeypatch.undo()
    other = {"data": data, "streaming": True, "save_path": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="nothing left to train on after 100 conversations are held out"):
        sft(arguments(tmp_path, base, **other))
    result = sft(arguments(tmp_path, base, eval_data=data, **other))
    assert len(records(result.folder, "loss")) == 4


# ---- stopping and going on ----


@pytest.mark.parametrize(
    "given",
    [{}, {"lora": True}, {"preset": "bytegpt-tiny"}, {"packing": False, "accumulation": 2}],
    ids=["plain", "lora", "experts", "accumulated"],
)
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(given, tmp_path, monkeypatch):
    base = chat_model(tmp_path / "base", given.pop("preset", "llama-tiny"))
    given = {"steps": 8, "checkpoint_minutes": 1e-9, "learning_rate": 1e-3, **given}
    whole = sft(arguments(tmp_path, base, **given, save_path=str(tmp_path / "whole")))
    args = arguments(tmp_path, base, **given)
    step = module._Trainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise SystemExit
        return step(self, *args, **kwargs)

    monkeypatch.setattr(module._Trainer, "training_step", killed)
    with pytest.raises(SystemExit):
        sft(args)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds files; resume that run"):
        sft(args)
    resumed = sft(args, resume=True)
    expected = weights(whole.final)
    for name, tensor in weights(resumed.final).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=0, msg=name)
    for key in ("loss", "tokens"):
        ours, theirs = ([r[key] for r in records(run.folder, "loss")] for run in (resumed, whole))
        assert ours == pytest.approx(theirs, abs=2e-6)
    assert resumed.before == pytest.approx(whole.before, abs=1e-5)


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path):
    base = chat_model(tmp_path / "base", "bytegpt-tiny", router_aux_loss_coef=0.0)
    data = write_rows(tmp_path / "rows.jsonl", conversations(60))
    given = "--max-seq-len 128 --steps 4 --learning-rate 1e-3 --no-packing --checkpoint-minutes 1e-9".split()
    losses, finals = [], []
    for processes in (1, 2):
        run = tmp_path / f"run{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [
            "-m",
            "tessera.training.sft",
            "--model",
            base,
            "--data",
            data,
            "--save-path",
            str(run),
            *given,
        ]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *command], check=True, env=environment)
        losses.append([(record["loss"], record["tokens"]) for record in records(run, "loss")])
        finals.append(records(run, "val_loss")[-1]["val_loss"])
    assert len(losses[0]) == 4
    assert sum(losses[1], ()) == pytest.approx(sum(losses[0], ()), rel=1e-4)
    assert finals[1] == pytest.approx(finals[0], rel=1e-4)


# ---- refusals ----


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model": "none"}, "there is no checkpoint none"),
        ({"data": "none.jsonl"}, "there is no file or folder none.jsonl"),
        ({"max_seq_len": 300}, "--max-seq-len 300 is longer than the model's context of 256"),
        ({"max_seq_len": 4}, "has an answer within --max-seq-len 4 tokens"),
        ({"batch_size": 3, "accumulation": 2}, "--batch-size 3 does not divide into 2 micro-batches"),
        ({"too_long": "x"}, "--too-long must be one of truncate, split, drop, got 'x'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"epochs": 1, "steps": 3}, "give epochs or steps, not both"),
        ({"steps": None, "streaming": True}, "--streaming needs --steps"),
        ({"limit": 1}, "one must be held out"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_and_writes_nothing(given, sentence, tmp_path):
    model = given.pop("model", None) or chat_model(tmp_path / "base")
    with pytest.raises(ValueError, match=sentence):
        sft(arguments(tmp_path, model, **given))
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_resuming_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        sft(arguments(tmp_path, chat_model(tmp_path / "base")), resume=True)


def test_a_template_that_marks_nothing_is_refused(tmp_path):
    base = chat_model(tmp_path / "base")
    template = Path(base) / "chat_template.jinja"
    marked = template.read_text()
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="does not mark what the assistant says"):
        sft(arguments(tmp_path, base))
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="marks nothing of a conversation as the assistant's"):
        sft(arguments(tmp_path, base))
    assert "generation" in marked


def test_an_exhausted_gpu_ends_with_advice_in_order(tmp_path, monkeypatch):
    def training_step(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")

    monkeypatch.setattr(module._Trainer, "training_step", training_step)
    base = chat_model(tmp_path / "base")
    with pytest.raises(ValueError, match="memory is not enough") as refused:
        sft(arguments(tmp_path, base))
    said = str(refused.value)
    advice = [
        "--max-seq-len",
        "--batch-size",
        "--accumulation",
        "--gradient-checkpointing",
        "--lora",
        "CUDA out",
    ]
    places = [said.index(word) for word in advice]
    assert places == sorted(places) and "\n" not in said
    given = {"lora": True, "gradient_checkpointing": True, "save_path": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="memory is not enough") as refused:
        sft(arguments(tmp_path, base, **given))
    assert "--lora" not in str(refused.value) and "--gradient-checkpointing" not in str(refused.value)
    assert not (tmp_path / "run" / "final").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower --learning-rate"):
        sft(arguments(tmp_path, chat_model(tmp_path / "base"), learning_rate=1e30))

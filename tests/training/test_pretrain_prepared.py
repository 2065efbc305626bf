"""Training on prepared tokens, and the vocabulary that a model takes from its tokenizer."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import (
    REPETITIVE,
    tiny_arguments,
    tiny_run,
    untimed_records,
    write_config,
    write_prepared,
    write_text,
    write_words,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessera import TesseraConfig, build_byte_tokenizer
from tessera.training.pretrain import Run

WORDS = ["<unk>", "<eos>", *sorted(set(REPETITIVE.split()))]


def encode_words(text: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else 0 for word in text.split()]


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer of the ten words and signs in the text."""
    return write_words(tmp_path / "words")


@pytest.fixture
def prepared(tmp_path, words) -> str:
    """The text as tokens: the same split as a text file's, its last tenth, with an end after each part."""
    cut = len(REPETITIVE) - int(len(REPETITIVE) * 0.1)
    train, val = REPETITIVE[:cut], REPETITIVE[cut:]
    return write_prepared(
        tmp_path / "tokens", [*encode_words(train), 1], [*encode_words(val), 1], len(val), words
    )


GIVEN = {"config": "llama-tiny", "sequence_length": 16, "steps": 5, "log_steps": 1}


def test_prepared_tokens_train_as_their_text_does(prepared, words, tmp_path):
    from_text = tiny_run(tmp_path, tokenizer=str(words), **GIVEN)
    from_tokens = tiny_run(tmp_path, data_file=prepared, save_path=str(tmp_path / "second"), **GIVEN)
    assert len(untimed_records(from_text.folder)) == 8
    assert untimed_records(from_tokens.folder) == untimed_records(from_text.folder)
    assert from_tokens.after == from_text.after
    weights = [(run.final / "model.safetensors").read_bytes() for run in (from_text, from_tokens)]
    assert weights[0] == weights[1]


def test_prepared_bytes_need_no_tokenizer(tmp_path):
    data = REPETITIVE.encode()
    cut = len(data) - int(len(data) * 0.1)
    tokens = write_prepared(tmp_path / "tokens", list(data[:cut]), list(data[cut:]), len(data) - cut)
    from_text = tiny_run(tmp_path)
    from_tokens = tiny_run(tmp_path, data_file=tokens, save_path=str(tmp_path / "second"))
    assert untimed_records(from_tokens.folder) == untimed_records(from_text.folder)


def test_prepared_tokens_are_mapped_and_never_copied_or_hashed(words, tmp_path):
    """64 MB of tokens, of which the windows of a few steps are all that memory sees."""
    tokens = write_prepared(tmp_path / "tokens", [2], [2] * 100, 100, words, sha256={})
    with Path(tokens, "train.bin").open("r+b") as file:
        file.truncate(64_000_000)
    meta = json.loads(Path(tokens, "data_meta.json").read_text())
    meta["train"] = {"tokens": 32_000_000, "bytes": 100}
    meta["sha256"] = {"train.bin": "as written down"}
    Path(tokens, "data_meta.json").write_text(json.dumps(meta))
    Path(tokens, "train.idx").unlink()
    tracemalloc.start()
    try:
        run = Run(tiny_arguments(tmp_path, **{**GIVEN, "sequence_length": 512}, data_file=tokens))
        rows = run.feed.sequence.batch(range(8)).input_ids
        identity = run._rows_identity()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (corpus,), (made,) = run.corpora, run.feed.sequence.corpora
    assert isinstance(made.ids, np.memmap) and np.shares_memory(made.ids, corpus.train.ids)
    assert rows.shape == (8, 512)
    assert identity["sha256"] == ["as written down"] and identity["tokens"] == [32_000_000]
    assert peak < 16_000_000


def test_resuming_on_other_prepared_tokens_is_refused(prepared, words, tmp_path):
    tiny_run(tmp_path, data_file=prepared, **GIVEN)
    ids = np.fromfile(Path(prepared, "train.bin"), dtype="<u2").tolist()
    other = write_prepared(tmp_path / "other", [*ids[:-2], 0, 1], [2, 3, 4], 10, words)
    with pytest.raises(ValueError, match="trained on other data"):
        tiny_run(tmp_path, resume=True, data_file=other, **{**GIVEN, "steps": 8})
    tiny_run(tmp_path, resume=True, data_file=prepared, **{**GIVEN, "steps": 8})


def test_the_prepared_folders_own_tokenizer_may_be_named_and_no_other(prepared, words, tmp_path):
    result = tiny_run(tmp_path, data_file=prepared, tokenizer=str(words), **GIVEN)
    assert AutoTokenizer.from_pretrained(result.final)("lazy dog.")["input_ids"] == encode_words("lazy dog.")
    build_byte_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "bytes")
    with pytest.raises(
        ValueError, match="was encoded with another tokenizer than .*bytes; leave --tokenizer"
    ):
        given = {**GIVEN, "save_path": str(tmp_path / "other")}
        tiny_run(tmp_path, data_file=prepared, tokenizer=str(tmp_path / "bytes"), **given)


def test_a_file_of_prepared_tokens_is_no_text(prepared, tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.bin is part of the prepared tokens in .*; give that folder"
    ):
        Run(tiny_arguments(tmp_path, data_file=str(Path(prepared) / "train.bin")))


def test_tokens_beyond_the_vocabulary_are_refused(words, tmp_path):
    tokens = write_prepared(tmp_path / "tokens", [*range(10)] * 30 + [10], [2, 3, 4], 10, words)
    with pytest.raises(ValueError, match="holds the token 10, beyond the model's vocabulary of 10"):
        tiny_run(tmp_path, data_file=tokens, **GIVEN)
    assert not (tmp_path / "run").exists()


# ---- the vocabulary ----


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_a_presets_vocabulary_becomes_the_tokenizers(preset, prepared, tmp_path):
    assert TesseraConfig.from_preset(preset).vocab_size == 256
    result = tiny_run(tmp_path, data_file=prepared, **{**GIVEN, "config": preset})
    config = TesseraConfig.from_pretrained(result.final)
    assert (config.vocab_size, config.padded_vocab_size) == (len(WORDS), len(WORDS))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 1, None)
    model = AutoModelForCausalLM.from_pretrained(result.final)
    assert model.get_input_embeddings().weight.shape[0] == len(WORDS)
    assert model.generation_config.eos_token_id == 1


def test_a_presets_vocabulary_grows_with_the_tokenizer(tmp_path):
    build_byte_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(tmp_path / "bytes")
    result = tiny_run(tmp_path, config="llama-tiny", tokenizer=str(tmp_path / "bytes"), steps=1)
    config = TesseraConfig.from_pretrained(result.final)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (258, 256, 257)


def test_the_vocabulary_reaches_to_the_last_id_where_ids_have_gaps(tmp_path):
    """len() counts tokens; ids may lie beyond it."""
    words = write_words(tmp_path / "words")
    file = words / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["the"] = 20
    file.write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(words)
    assert len(tokenizer) == len(WORDS) and tokenizer("the")["input_ids"] == [20]
    result = tiny_run(tmp_path, tokenizer=str(words), **GIVEN)
    assert TesseraConfig.from_pretrained(result.final).vocab_size == 21


def test_the_vocabulary_of_a_file_and_of_weights_stays(prepared, words, tmp_path):
    larger = write_config(tmp_path, vocab_size=16)
    result = tiny_run(tmp_path, data_file=prepared, **{**GIVEN, "config": larger})
    assert TesseraConfig.from_pretrained(result.final).vocab_size == 16
    smaller = write_config(tmp_path, vocab_size=len(WORDS) - 1)
    for source in ({"data_file": prepared}, {"tokenizer": str(words)}):
        given = {**GIVEN, "config": smaller, "save_path": str(tmp_path / "other"), **source}
        with pytest.raises(
            ValueError, match="has 10 tokens, the model's vocabulary only 9: .* vocab_size 10"
        ):
            tiny_run(tmp_path, **given)
    base = tiny_run(tmp_path, config="llama-tiny", save_path=str(tmp_path / "base"), steps=1)
    build_byte_tokenizer(eos_token="<|end|>").save_pretrained(tmp_path / "bytes")
    given = {"config": "llama-tiny", "tokenizer": str(tmp_path / "bytes"), "ckpt_path": str(base.folder)}
    with pytest.raises(ValueError, match="has 257 tokens, the model's vocabulary only 256"):
        tiny_run(tmp_path, save_path=str(tmp_path / "other"), **given)


def test_a_preset_goes_on_from_weights_in_the_vocabulary_that_they_were_given(prepared, tmp_path):
    first = tiny_run(tmp_path, data_file=prepared, **GIVEN)
    given = {**GIVEN, "save_path": str(tmp_path / "second"), "ckpt_path": str(first.folder)}
    second = tiny_run(tmp_path, data_file=prepared, **given)
    assert second.before == first.after
    assert TesseraConfig.from_pretrained(second.final).vocab_size == len(WORDS)


def test_the_final_directory_has_the_tokenizers_template_and_notes(prepared, tmp_path):
    own = Path(prepared, "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(own)
    (own / "tokenizer_meta.json").write_text('{"vocab_size": 10}')
    final = tiny_run(tmp_path, data_file=prepared, **GIVEN).final
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in final.iterdir()
    }
    assert json.loads((final / "tokenizer_meta.json").read_text()) == {"vocab_size": 10}
    chat = [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog."}]
    saved = AutoTokenizer.from_pretrained(final)
    assert saved.apply_chat_template(chat, tokenize=False) == "lazy dog. "


# ---- several processes ----


@pytest.mark.distributed
def test_two_processes_read_the_same_prepared_tokens_as_one(prepared, tmp_path):
    options = f"--config llama-tiny --data {prepared} --steps 6 --batch-size 4 --micro-batch-size 1".split()
    options += "--sequence-length 16 --optimizer adamw --learning-rate 1e-4 --evaluations 1".split()
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes, launcher in ((1, []), (2, launch)):
        command = [sys.executable, *launcher, "-m", "tessera.training.pretrain", *options]
        command += ["--save-path", str(tmp_path / f"run{processes}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert f"on {processes} x cpu" in done.stdout
    one, two = untimed_records(tmp_path / "run1"), untimed_records(tmp_path / "run2")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for key in ("loss", "val_loss", "val_bits_per_byte"):
        ours, theirs = ([r[key] for r in run if key in r] for run in (one, two))
        assert ours and ours == pytest.approx(theirs, abs=1e-4)


def test_what_prepare_writes_is_trained_on(tmp_path):
    """From text to tokens to a model by the two commands."""
    from tessera import cli

    text = "\n<|endoftext|>\n".join(
        f"{i} the quick brown fox jumps over {i * i} lazy dogs." for i in range(300)
    )
    words = write_words(tmp_path / "words")
    prepare = ["data", "prepare", "--data", write_text(tmp_path, text), "--tokenizer", str(words)]
    prepare += ["--output", str(tmp_path / "tokens"), "--filters", "none", "--val-fraction", "0.1"]
    with pytest.raises(SystemExit) as code:
        cli.run(prepare)
    assert not code.value.code
    result = tiny_run(tmp_path, data_file=str(tmp_path / "tokens"), **GIVEN)
    meta = json.loads((tmp_path / "tokens" / "data_meta.json").read_text())
    assert result.after.num_bytes == pytest.approx(meta["val"]["bytes"], rel=0.01)
    assert AutoTokenizer.from_pretrained(result.final).eos_token == "<eos>"

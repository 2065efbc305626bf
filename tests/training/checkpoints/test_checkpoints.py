"""Checkpoints: written whole or not at all, verified before use, restored to the bit."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from helpers.models import tiny_config, tiny_model
from helpers.runs import one_step
from transformers import AutoModelForCausalLM, AutoTokenizer

from tessera import TesseraForCausalLM, build_byte_tokenizer
from tessera.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_verified,
    save_checkpoint,
    verify,
)
from tessera.training.optimizers import build_optimizer

SMALL = {"num_hidden_layers": 2}


def trained(preset: str = "llama-tiny", kind: str = "muon", steps: int = 2, **overrides):
    """A model and an optimizer whose state is not empty."""
    model = tiny_model(preset, **SMALL, **overrides).train()
    optimizer = build_optimizer(model, kind, weight_decay=0.01)
    for seed in range(steps):
        one_step(model, optimizer, seed)
    return model, optimizer


def save(folder, number: int, model, optimizer, **given):
    return save_checkpoint(folder, number, Accelerator(), model, optimizer, {"note": "kept"}, **given)


def flip_a_bit(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "bytegpt-tiny"])
def test_a_restored_run_goes_on_to_the_same_bits(preset, kind, tmp_path):
    """Dropout makes the random state count; GPT-2's embedding is tied."""
    dropout = {"resid_pdrop": 0.2} if preset == "gpt2-tiny" else {}
    model, optimizer = trained(preset, kind, **dropout)
    path = save(tmp_path, 2, model, optimizer)
    one_step(model, optimizer, 7)

    torch.manual_seed(999)
    other = TesseraForCausalLM(tiny_config(preset, **SMALL, **dropout)).train()
    other_optimizer = build_optimizer(other, kind, weight_decay=0.01)
    state = load_checkpoint(path, Accelerator(), other, other_optimizer)
    assert state == {"step": 2, "note": "kept"}
    one_step(other, other_optimizer, 7)

    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[ours].keys() == other_optimizer.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            assert torch.equal(other_optimizer.state[theirs][key], value), key


def test_a_checkpoint_is_a_hugging_face_directory_of_safetensors_and_json(tmp_path):
    model, optimizer = trained()
    path = save(tmp_path, 2, model, optimizer, tokenizer=build_byte_tokenizer())
    files = {file.name for file in path.iterdir()}
    assert {file.rsplit(".", 1)[1] for file in files} == {"safetensors", "json", "py"}, "and the model's code"
    assert set(json.loads((path / "manifest.json").read_text())) == files - {"manifest.json"}
    assert AutoTokenizer.from_pretrained(path)("hi")["input_ids"] == list(b"hi")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_is_taken(tmp_path):
    model, optimizer = trained()
    older = save(tmp_path, 2, model, optimizer)
    newer = save(tmp_path, 4, model, optimizer)
    assert newest_verified(tmp_path) == (newer, [])
    for file in sorted(newer.iterdir()):
        content = file.read_bytes()
        flip_a_bit(file)
        assert verify(newer) is not None, file.name
        path, refused = newest_verified(tmp_path)
        assert path == older
        assert len(refused) == 1 and str(newer) in refused[0], refused
        file.unlink()
        assert newest_verified(tmp_path)[0] == older, f"{file.name} is not missed"
        file.write_bytes(content)
    assert verify(newer) is None


def test_no_good_checkpoint_is_none_with_a_sentence_for_each(tmp_path):
    assert newest_verified(tmp_path / "nowhere") == (None, [])
    save(tmp_path, 1, *trained()).joinpath("manifest.json").unlink()
    path, refused = newest_verified(tmp_path)
    assert path is None
    assert "no readable manifest.json" in refused[0]


def test_what_a_killed_run_left_is_ignored_and_cleared_by_the_next_checkpoint(tmp_path):
    model, optimizer = trained()
    first = save(tmp_path, 1, model, optimizer)
    shutil.copytree(first, tmp_path / ".step-000002.partial")
    shutil.copytree(first, tmp_path / ".step-000001.old")
    assert list_checkpoints(tmp_path) == [first]
    assert newest_verified(tmp_path) == (first, [])
    third = save(tmp_path, 3, model, optimizer)
    assert sorted(tmp_path.iterdir()) == [first, third]


def test_a_checkpoint_that_was_moved_aside_for_one_that_never_came_is_back(tmp_path):
    model, optimizer = trained()
    first = save(tmp_path, 1, model, optimizer)
    first.rename(tmp_path / ".step-000001.old")
    second = save(tmp_path, 2, model, optimizer)
    assert sorted(tmp_path.iterdir()) == [first, second]
    assert verify(first) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_are_kept(keep, tmp_path):
    model, optimizer = trained()
    for number in (999_999, 1_000_000, 1_000_001, 1_000_002):
        save(tmp_path, number, model, optimizer, keep=keep)
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == ["step-999999", "step-1000000", "step-1000001", "step-1000002"][-keep:]


def test_broken_checkpoints_do_not_push_out_the_good_ones_written_after_them(tmp_path):
    """A run whose newest two are broken goes on from the one before and saves at a step below theirs."""
    model, optimizer = trained()
    for number in (10, 20, 30):
        path = save(tmp_path, number, model, optimizer, keep=3)
        if number > 10:
            flip_a_bit(path / "model.safetensors")
    save(tmp_path, 12, model, optimizer, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000012"]
    assert newest_verified(tmp_path)[1] == []


def test_a_step_saved_again_is_replaced(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 5, model, optimizer)
    one_step(model, optimizer, 3)
    path = save(tmp_path, 5, model, optimizer)
    assert list(tmp_path.iterdir()) == [path]
    weights = TesseraForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}],
)
def test_the_checkpoint_of_another_model_is_refused(overrides, tmp_path):
    path = save(tmp_path, 2, *trained())
    other = TesseraForCausalLM(tiny_config("llama-tiny", **{**SMALL, **overrides}))
    with pytest.raises(ValueError, match=f"of another architecture: .*{next(iter(overrides))} "):
        load_checkpoint(path, Accelerator(), other, build_optimizer(other))


def test_a_path_means_a_model_or_the_end_or_the_newest_good_checkpoint_of_a_run(tmp_path):
    run = tmp_path / "run"
    model, optimizer = trained()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        find_checkpoint(run)
    run.mkdir()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        find_checkpoint(run)
    older, newer = (save(run / "checkpoints", number, model, optimizer) for number in (1, 2))
    assert find_checkpoint(run) == newer
    assert find_checkpoint(older) == older
    flip_a_bit(newer / "model.safetensors")
    assert find_checkpoint(str(run)) == older
    model.save_pretrained(run / "final")
    assert find_checkpoint(run) == run / "final"
    (tmp_path / "run.safetensors").touch()
    assert find_checkpoint(tmp_path / "run.safetensors") == run / "final"

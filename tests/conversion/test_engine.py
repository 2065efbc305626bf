"""A conversion's course: what it holds in memory, what a kill leaves, what it says when there is no room."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.memory import COUNTED, forget_peak, peak
from helpers.models import tiny_model
from safetensors.torch import load_file

from tessera import TesseraForCausalLM, cli
from tessera.conversion import aside, weight_writer
from tessera.conversion.convert import convert
from tessera.conversion.safetensors_format import lay_out
from tessera.conversion.sources import open_checkpoint
from tessera.modeling.loading import load_model

REPORTS = {"conversion_report.json", "conversion_report.md"}


def save(folder: Path, name: str = "llama-tiny", **overrides) -> TesseraForCausalLM:
    model = tiny_model(name, **overrides)
    model.save_pretrained(folder)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which says how long it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in REPORTS}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- a kill ----


class Counted:
    """Calls of the system that a conversion makes; at one of them the process dies."""

    def __init__(self, patch, last: int | None = None):
        self.count, self.last = 0, last
        for name in ("pwrite", "fsync", "rename", "ftruncate"):
            patch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call):
        def counted(*arguments):
            self.count += 1
            if self.count == self.last:
                if call.__name__ == "pwrite":  # within a tensor
                    call(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]), arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counted


def in_a_copy(run: Callable[[], object]) -> int:
    """Runs something in a copy of this process; gives how that ended, as `os.waitpid` says it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def convert_and_die(last: int, source: Path, target: Path, **options) -> None:
    """A conversion that is killed at one of its calls of the system."""

    def run() -> None:
        Counted(pytest.MonkeyPatch(), last)
        convert(source, target, **options)

    status = in_a_copy(run)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that is a copy of this one")
@pytest.mark.parametrize("options", [{"to": "llama", "max_shard_size": 40_000}, {"mp": 2}])
def test_what_is_killed_five_times_ends_as_if_it_never_was(options, tmp_path, monkeypatch):
    save(tmp_path / "ours")
    monkeypatch.setattr(weight_writer, "FLUSH_EVERY", 10_000)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        convert(tmp_path / "ours", tmp_path / "undisturbed", **options)
    moments, found = random.Random(0), []
    for _ in range(5):
        # Each goes on where the one before was killed, so five such pieces are not the whole yet.
        moment = moments.randint(counted.count // 20, counted.count // 8)
        convert_and_die(moment, tmp_path / "ours", tmp_path / "out", **options)
        assert names(tmp_path) == [".out.partial", "ours", "undisturbed"]
        with pytest.raises(ValueError):
            open_checkpoint(tmp_path / ".out.partial")
        found.append(len((tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()) - 1)
    assert found[-1] > 0 and found == sorted(found), "what was written before is kept"
    done = convert(tmp_path / "ours", tmp_path / "out", **options)
    assert any("bytes were there from a call that had not ended" in sentence for sentence in done.course)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert names(tmp_path) == ["ours", "out", "undisturbed"]


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that is a copy of this one")
def test_another_call_or_another_source_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_writer, "FLUSH_EVERY", 10_000)
    save(tmp_path / "ours")
    convert_and_die(30, tmp_path / "ours", tmp_path / "out", to="llama")
    done = convert(tmp_path / "ours", tmp_path / "out", to="llama", dtype="bfloat16")
    assert done.course == ["what a different call had written for this target is discarded"]
    shutil.rmtree(tmp_path / "out")
    convert_and_die(30, tmp_path / "ours", tmp_path / "out", to="llama")
    shutil.rmtree(tmp_path / "ours")
    model = save(tmp_path / "ours", num_hidden_layers=3)
    done = convert(tmp_path / "ours", tmp_path / "out", to="llama")
    assert done.course == ["what a different call had written for this target is discarded"]
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.layers.2.mlp.up_proj.weight"], model.model.layers[2].mlp.up_proj.weight)


def test_an_interrupt_leaves_what_was_written_to_go_on_from(tmp_path, monkeypatch):
    save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "undisturbed", to="llama")
    monkeypatch.setattr(weight_writer, "FLUSH_EVERY", 10_000)

    def interrupt(written: int, total: int) -> None:
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "ours", tmp_path / "out", to="llama", progress=interrupt)
    seen = []
    # Neither is read, or changes what is written.
    (tmp_path / "ours/notes.txt").write_text("mine")
    words = {"to": "llama", "verify": "weights"}
    done = convert(tmp_path / "ours", tmp_path / "out", **words, progress=lambda *told: seen.append(told))
    assert done.course and seen[-1][0] <= seen[-1][1] <= seen[-1][0] + 10_000, "all but the header is told of"
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_two_at_once_are_one_too_many(tmp_path):
    save(tmp_path / "ours")
    with aside.claimed(tmp_path / "out") as folder:
        (folder / "mine").write_text("")
        with pytest.raises(ValueError, match=r"another process is writing .*\.out\.partial; wait for it"):
            convert(tmp_path / "ours", tmp_path / "out", to="llama")
        assert (folder / "mine").exists(), "the second must not clear what the first is writing"
        (folder / "mine").unlink()
    convert(tmp_path / "ours", tmp_path / "out", to="llama")


# ---- the disk ----


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path / "ours")
    size = (tmp_path / "ours/model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    for free in (0, size):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage._replace(free=free))
        with pytest.raises(ValueError, match=rf"no room for out: [\d,]+ bytes are needed, {free:,} are free"):
            convert(tmp_path / "ours", tmp_path / "new/out", mp=2)
        assert names(tmp_path) == ["ours"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size + 2**21))
    convert(tmp_path / "ours", tmp_path / "new/out", to="llama")


@pytest.mark.parametrize("options", [{"to": "llama"}, {"to": "llama", "max_shard_size": 50_000}, {"mp": 2}])
def test_the_size_is_known_exactly(options, tmp_path):
    save(tmp_path / "ours")
    told = []
    convert(tmp_path / "ours", tmp_path / "out", progress=lambda *both: told.append(both), **options)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert {total for _, total in told} == {written}


@pytest.mark.parametrize("options", [{"to": "llama"}, {"mp": 2}])
def test_a_disk_that_is_full_is_an_error_of_the_file(options, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    save(tmp_path / "ours")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"model.*\.safetensors cannot be written: No space left on device"):
        convert(tmp_path / "ours", tmp_path / "new/out", **options)
    assert names(tmp_path) == ["ours"]


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that is a copy of this one")
def test_a_limit_on_the_size_of_files_ends_with_a_sentence(tmp_path):
    """The kernel's own refusal."""
    save(tmp_path / "ours")

    def run() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        with pytest.raises(OSError, match="model.safetensors cannot be written: File too large"):
            convert(tmp_path / "ours", tmp_path / "out", to="llama")

    assert in_a_copy(run) == 0
    assert names(tmp_path) == ["ours"]


# ---- what a directory is made of ----


def test_the_configuration_comes_last_so_that_nothing_half_written_loads(tmp_path, monkeypatch):
    save(tmp_path / "ours")
    seen = []
    flush = weight_writer.WeightWriter._flush

    def look(writer):
        seen.append(names(writer._folder))
        flush(writer)

    monkeypatch.setattr(weight_writer.WeightWriter, "_flush", look)
    for options in ({"to": "llama"}, {"mp": 2}, {"to": "tessera"}):
        convert(tmp_path / "ours", tmp_path / "-".join(map(str, options.values())), **options)
    assert len(seen) >= 4
    for files in seen:
        assert not any(name.endswith(".json") for name in files)
        assert any(name.endswith(".part") for name in files)


def test_each_tensor_is_read_and_computed_once_for_all_ranks(tmp_path, monkeypatch):
    save(tmp_path / "ours", "bytegpt-tiny")
    from tessera.conversion import tensor_files

    read = Counter()
    original = tensor_files.read_tensor

    def count(place, name, *given):
        read[name] += 1
        return original(place, name, *given)

    monkeypatch.setattr(tensor_files, "read_tensor", count)
    convert(tmp_path / "ours", tmp_path / "one", mp=1, verify="weights")
    once, _ = dict(read), read.clear()
    convert(tmp_path / "ours", tmp_path / "four", mp=4, verify="weights")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert {name: read[name] for name in ours} == {name: once[name] for name in ours}


# ---- memory ----

IN_LITTLE_MEMORY = """
import json, resource, sys
import psutil, torch
from helpers.memory import forget_peak, peak
from tessera.conversion.convert import convert

torch.set_num_threads(1)
options = json.loads(sys.argv[3])
# What is imported and kept for good the first time is not the model's.
convert(sys.argv[5], sys.argv[2] + "-first", **options)
before = forget_peak()
limit = psutil.Process().memory_info().vms + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
done = convert(sys.argv[1], sys.argv[2], **options)
print(json.dumps({
    "grown": peak() - before,
    "checks": [check.name for check in done.report.checks],
    "notes": done.notes,
}))
"""


def save_sparse(folder: Path, layers: int, **sizes) -> int:
    """A Llama whose file has holes for all layers but the first and the last; gives its bytes."""
    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    file = folder / "model.safetensors"
    start, places = lay_out(state, file)
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as stream:
        stream.write(start)
        stream.truncate(size := max(place.end for place in places.values()))
        for name, place in places.items():
            if "layers" not in name or any(f"layers.{i}." in name for i in (0, layers - 1)):
                values = (0.05 * torch.randn(place.shape, generator=generator)).bfloat16()
                stream.seek(place.begin)
                stream.write(values.flatten().view(torch.uint8).numpy())
    return size


def convert_in_little_memory(source: Path, target: Path, first: Path, room: int, **options) -> dict:
    """Converts a small model and then another, for which there are so many more addresses."""
    words = [str(source), str(target), json.dumps(options), str(room), str(first)]
    words = [sys.executable, "-c", IN_LITTLE_MEMORY, *words]
    # Each thread's own heap would reserve 64 MB of addresses; the library's loader has four.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512}


needs_peak = pytest.mark.skipif(not COUNTED, reason="needs the system's own count of memory")


@pytest.mark.distributed
@needs_peak
def test_a_model_is_written_as_one_file_without_being_in_memory(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    save_sparse(tmp_path / "small", 2, **small, **SIZES)
    wide = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 512}
    size = save_sparse(tmp_path / "llama", 24, **wide, **SIZES)

    def run() -> None:
        # What is kept for good the first time is not the model's.
        convert(tmp_path / "small", tmp_path / "first", mp=1, verify="weights")
        before = forget_peak()
        convert(tmp_path / "llama", tmp_path / "native", mp=1, verify="weights")
        (tmp_path / "grown").write_text(str(peak() - before))

    assert in_a_copy(run) == 0
    assert int((tmp_path / "grown").read_text()) < size // 3
    # Both are read back by what knows nothing of this: holes and all.
    before, after = (
        load_file(tmp_path / name) for name in ("llama/model.safetensors", "native/model0-mp1.safetensors")
    )
    assert torch.equal(before["model.layers.23.mlp.up_proj.weight"], after["layers.23.ffn.w3.weight"])
    assert len(before) == len(after)


@pytest.mark.slow
@needs_peak
def test_three_gigabytes_pass_through_a_third_of_it_and_are_compared_by_sample(tmp_path):
    size = save_sparse(
        tmp_path / "llama", 120, hidden_size=1024, intermediate_size=2816, vocab_size=4096, **SIZES
    )
    assert size > 3e9
    small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    save_sparse(tmp_path / "small", 2, **small, **SIZES)
    for source, target, options in (
        ("llama", "native", {"mp": 1}),
        ("llama", "ours", {}),
        ("ours", "back", {"to": "llama", "dtype": "bfloat16"}),
    ):
        places = (tmp_path / source, tmp_path / target, tmp_path / "small")
        seen = convert_in_little_memory(*places, int(0.3 * size), **options)
        print(f"{source} -> {target}: {size / 1e9:.2f} GB, peak {seen['grown'] / 1e6:.0f} MB above the start")
        assert seen["grown"] < 0.25 * size
        assert seen["notes"] == ["logits are compared on a sample: layers 0, 60, 119 of 120"]
        assert {"weights, read back", "logits in float32, random ids"} < set(seen["checks"])
    shutil.rmtree(tmp_path / "native")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        tmp_path / "llama/model.safetensors"
    ).read_bytes()


# ---- the report, and the command ----


def test_the_report_says_what_was_compared_and_names_no_place(tmp_path):
    save(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "out", to="llama", dtype="bfloat16")
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    table = (tmp_path / "out/conversion_report.md").read_text()
    assert report["source"] == {"name": "ours", "kind": "tessera"}
    assert report["target"] == {"name": "out", "kind": "llama"}
    assert report["parameters"] == done.parameters and report["dtype"] == "bfloat16"
    file = tmp_path / "out/model.safetensors"
    sums = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()
    assert report["files"]["model.safetensors"]["sha256"] == sums[0]
    assert report["files"]["model.safetensors"]["bytes"] == file.stat().st_size
    assert all(check["passed"] for check in report["checks"])
    checked = {check["name"] for check in report["checks"]}
    assert "logits in bfloat16, distance from float32" in checked and "names and shapes" in checked
    for check in report["checks"]:
        assert f"| {check['name']} | {check['found']} |" in table
    assert sums[0] in table and str(tmp_path) not in table + json.dumps(report)


def test_a_report_is_not_carried_along_but_finds_flipped_bits(tmp_path):
    save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "llama", to="llama")
    convert(tmp_path / "llama", tmp_path / "back")
    assert json.loads((tmp_path / "back/conversion_report.json").read_text())["source"]["name"] == "llama"
    file = tmp_path / "llama/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1  # finite, and no format would notice
    file.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged: conversion_report.json has another"):
        convert(tmp_path / "llama", tmp_path / "again")
    # Who saves other weights there knows nothing of the report.
    load_model(tmp_path / "back").bfloat16().save_pretrained(tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again", to="llama")


def run_in_process(*arguments) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.run([str(argument) for argument in arguments])
    return exit.value.code or 0


def test_the_command_shows_the_checks_and_takes_sizes(tmp_path, capsys):
    save(tmp_path / "ours")
    words = ("--to", "llama", "--max-shard-size", "50KB", "--verify", "weights")
    assert run_in_process("convert", tmp_path / "ours", tmp_path / "out", *words) == 0
    out = capsys.readouterr().out
    assert "weights, read back      " in out and "equal bit for bit" in out and "logits" not in out
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 5
    assert all(len(file) == 1 or sum(t.nbytes for t in file.values()) <= 50_000 for file in files)
    for words, sentence in (
        (("--max-shard-size", "2 bananas"), "--max-shard-size 2 bananas: give a size like 2GB"),
        (("--max-shard-size", "0"), "--max-shard-size 0: give a size"),
        (("--verify-memory", "-1"), "--verify-memory -1: give a size"),
        (("--verify", "not"), "--verify not: choose from full, sample, weights"),
    ):
        assert run_in_process("convert", tmp_path / "ours", tmp_path / "other", "--to", "llama", *words) == 2
        assert sentence in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "other").exists()

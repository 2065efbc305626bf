"""`tessera shard`: native files cut for other numbers of ranks, and back to the same bytes."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from helpers.native import SHARED_BY_FOUR, native
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tessera import build_byte_tokenizer, cli
from tessera.conversion import resharding
from tessera.conversion.convert import convert
from tessera.conversion.report import REPORT, TABLE, Report, hash_files
from tessera.conversion.resharding import shard
from tessera.conversion.slices import StoredSlice
from tessera.modeling.loading import load_model

SHARED = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[2].parent / "shared"))


def files(folder: Path) -> dict[str, bytes]:
    """All but the report, which has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (REPORT, TABLE)}


@pytest.mark.parametrize("name", SHARED_BY_FOUR)
def test_one_to_two_to_four_to_one_gives_the_same_files(name, tmp_path):
    native(name, tmp_path / "start")
    source = "start"
    for world in (2, 4, 1):
        done = shard(tmp_path / source, tmp_path / str(world), world)
        assert done.after == world and len(list((tmp_path / str(world)).glob("*.safetensors"))) == world
        source = str(world)
    assert files(tmp_path / "1") == files(tmp_path / "start")
    # Each step is what writing for so many ranks at once gives.
    for world in (2, 4):
        assert files(tmp_path / str(world)) == files(native(name, tmp_path / f"direct-{world}", world))


def test_each_rank_has_what_the_releases_converter_gives_it(tmp_path):
    """The rule of DeepSeek's `convert.py`: chunks of a dimension, experts by number, the rest everywhere."""
    native("latent-lowrank-sigmoid", tmp_path / "one")
    shard(tmp_path / "one", tmp_path / "four", 4)
    whole = load_file(tmp_path / "one/model0-mp1.safetensors")
    first = ("embed", "wq", "wq_b", "wkv_b", "head", "w1", "w3")
    for rank in range(4):
        part = load_file(tmp_path / f"four/model{rank}-mp4.safetensors")
        expected = {}
        for name, tensor in whole.items():
            key = name.split(".")[-2]
            if ".experts." in name and "shared" not in name:
                if int(name.split(".")[4]) == rank:  # one of four experts each
                    expected[name] = tensor
            elif key in first or key in ("wo", "w2"):
                expected[name] = tensor.chunk(4, dim=0 if key in first else 1)[rank]
            else:
                expected[name] = tensor
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], expected[name]) for name in part)


def test_metadata_and_what_lies_beside_the_weights_come_along(tmp_path):
    folder = native("dense", tmp_path / "one")
    weights = load_file(folder / "model0-mp1.safetensors")
    save_file(weights, folder / "model0-mp1.safetensors", metadata={"run": "seven"})
    build_byte_tokenizer().save_pretrained(folder)
    (folder / "params.json").unlink()
    shard(folder, tmp_path / "two", 2)
    with safe_open(tmp_path / "two/model1-mp2.safetensors", "pt") as file:
        assert file.metadata() == {"run": "seven"}
    shard(tmp_path / "two", tmp_path / "again", 1)
    assert files(tmp_path / "again") == files(folder)
    assert (tmp_path / "two/tokenizer_config.json").is_file()


def test_params_json_alone_is_enough(tmp_path):
    folder = native("latent-moe", tmp_path / "one", mlp_layer_types="DSSS")
    (folder / "config.json").unlink()
    shard(folder, tmp_path / "two", 2)
    assert json.loads((tmp_path / "two/params.json").read_text()) == json.loads(
        (folder / "params.json").read_text()
    )
    convert(tmp_path / "two", tmp_path / "ours")
    assert load_model(tmp_path / "ours").config.n_routed_experts == 4


def test_each_share_is_read_once_and_by_itself(tmp_path, monkeypatch):
    native("latent-moe", tmp_path / "one")
    sizes, read = [], StoredSlice.read

    def count(self, ranges):
        tensor = read(self, ranges)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(StoredSlice, "read", count)
    monkeypatch.setattr(resharding, "_verify", lambda *arguments: None)
    shard(tmp_path / "one", tmp_path / "four", 4)
    written = [load_file(path) for path in (tmp_path / "four").glob("*.safetensors")]
    assert sum(sizes) == sum(tensor.nbytes for part in written for tensor in part.values())
    assert max(sizes) == max(tensor.nbytes for part in written for tensor in part.values())


def test_a_killed_call_is_gone_on_from(tmp_path, monkeypatch):
    native("dense", tmp_path / "one")
    shard(tmp_path / "one", tmp_path / "expected", 2)

    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    monkeypatch.setattr(resharding, "_verify", kill)
    with pytest.raises(Killed):
        shard(tmp_path / "one", tmp_path / "two", 2)
    assert not (tmp_path / "two").exists()
    monkeypatch.undo()
    monkeypatch.setattr(StoredSlice, "read", None)  # nothing is left to be read for writing
    monkeypatch.setattr(resharding, "_verify", lambda *arguments: None)
    shard(tmp_path / "one", tmp_path / "two", 2)
    assert files(tmp_path / "two") == files(tmp_path / "expected")


SAID = {"name": "x", "kind": "native"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    return native("dense", tmp_path_factory.mktemp("native") / "two", 2)


def _lose_a_rank(folder):
    (folder / "model1-mp2.safetensors").unlink()


def _change(name, change):
    def damage(folder):
        file = folder / "model1-mp2.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _spoil(tensor):
    tensor[0, 0] = float("nan")
    return tensor


def _narrow(folder):
    for rank in range(2):
        file = folder / f"model{rank}-mp2.safetensors"
        tensors = load_file(file)
        tensors["norm.weight"] = tensors["norm.weight"].half()
        save_file(tensors, file, metadata={"format": "pt"})


def _flip_a_bit(folder):
    """In a directory that was written with its report."""
    file = folder / "model1-mp2.safetensors"
    Report(SAID, SAID, 0, "float32", hash_files([file])).write(folder)
    _flip_the_last_bit(file)


def _flip_the_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _add(folder):
    for rank in range(2):
        file = folder / f"model{rank}-mp2.safetensors"
        save_file({**load_file(file), "extra.weight": torch.zeros(1)}, file, metadata={"format": "pt"})


def _truncate(folder):
    file = folder / "model1-mp2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_settings(folder):
    for name in ("config.json", "params.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_lose_a_rank, r"lacks the files of ranks \[1\] of 2"),
        (_change("norm.weight", lambda t: t + 1), "norm.weight differs between ranks"),
        (_change("norm.weight", lambda t: t.half()), "rank 1 holds norm.weight as F16"),
        (_change("embed.weight", lambda t: t[:-1].clone()), r"rank 1 holds embed.weight as F32 \(127, "),
        (
            _change("layers.0.attn.wo.weight", lambda t: t.bfloat16()),
            "rank 1 holds layers.0.attn.wo.weight as BF16",
        ),
        (_change("layers.0.attn.wo.weight", _spoil), "layers.0.attn.wo.weight holds NaN or infinite"),
        (_narrow, "norm.weight is float16 where most weights are float32"),
        (_flip_a_bit, "model1-mp2.safetensors is damaged"),
        (_add, "unexpected extra.weight"),
        (_truncate, r"model1-mp2\.safetensors is truncated"),
        (_no_settings, "has neither config.json nor params.json"),
    ],
)
def test_a_damaged_source_is_refused_in_one_sentence(damage, sentence, two_ranks, tmp_path):
    shutil.copytree(two_ranks, tmp_path / "two")
    damage(tmp_path / "two")
    before = files(tmp_path / "two")
    with pytest.raises(ValueError, match=sentence):
        shard(tmp_path / "two", tmp_path / "four", 4)
    assert files(tmp_path / "two") == before
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_what_is_written_wrongly_is_not_kept(tmp_path, monkeypatch):
    native("dense", tmp_path / "one")
    verify = resharding._verify

    def wrongly(files, stored, folder):
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            tensors["norm.weight"][0] += 1
            save_file(tensors, path, metadata={"format": "pt"})
        verify(files, stored, folder)

    monkeypatch.setattr(resharding, "_verify", wrongly)
    with pytest.raises(ValueError, match=r"1 tensors read back are not what was written \(norm.weight\)"):
        shard(tmp_path / "one", tmp_path / "two", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("mp", "sentence"),
    [
        ("3", r"mp 3 does not divide num_attention_heads \(4\), .*n_routed_experts \(4\)"),
        ("0", "mp must be at least 1, got 0"),
    ],
)
def test_the_command_refuses_what_does_not_divide_with_exit_code_two(mp, sentence, tmp_path, capsys):
    native("latent-moe", tmp_path / "one")
    with pytest.raises(SystemExit) as stopped:
        cli.run(["shard", str(tmp_path / "one"), str(tmp_path / "out"), "--mp", mp])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert re.search(sentence, message)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(tmp_path):
    native("latent-moe", tmp_path / "one")
    done = CliRunner().invoke(cli.app, ["shard", str(tmp_path / "one"), str(tmp_path / "two"), "--mp", "2"])
    assert done.exit_code == 0, done.output
    assert "1 -> 2 ranks: 69 tensors" in done.output
    written = hash_files(sorted((tmp_path / "two").glob("*.safetensors")))
    report = json.loads((tmp_path / "two" / REPORT).read_text())
    assert len(written) == 2 and report["files"] == written
    assert report["dtype"] == "float32" and all(check["passed"] for check in report["checks"])
    assert "cut from 1 to 2 ranks" in (tmp_path / "two" / TABLE).read_text()
    # Which is what finds a damage later.
    _flip_the_last_bit(tmp_path / "two/model0-mp2.safetensors")
    with pytest.raises(ValueError, match="model0-mp2.safetensors is damaged"):
        shard(tmp_path / "two", tmp_path / "one again", 1)


@pytest.mark.parametrize("name", ["ours", "missing"])
def test_only_native_directories_are_cut(name, tmp_path):
    tiny_model("llama-tiny").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="not in the native layout|there is no directory"):
        shard(tmp_path / name, tmp_path / "out", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    native("dense", tmp_path / "one")
    with pytest.raises(ValueError, match="is there already and not empty"):
        shard(tmp_path / "one", tmp_path / "full", 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["deepseek_sigmoid_yarn", "bytegpt_softmax_yarn"])
def test_golden_files_are_cut_and_joined_to_the_same_bytes_with_their_logits(name, tmp_path):
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        args = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    (tmp_path / "start").mkdir()
    # As the release's converter writes it: without metadata, and with params.json alone.
    save_file(weights, tmp_path / "start/model0-mp1.safetensors")
    (tmp_path / "start/params.json").write_text(json.dumps(args))
    source = "start"
    for world in (2, 4, 1):
        if args["n_heads"] % world or args["n_routed_experts"] % world:
            continue
        shard(tmp_path / source, tmp_path / str(world), world)
        source = str(world)
    assert source == "1"
    assert files(tmp_path / "1") == files(tmp_path / "start")

    world = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal())
    convert(tmp_path / str(world), tmp_path / "ours")
    with torch.no_grad():
        found = load_model(tmp_path / "ours")(tensors["io.input_ids"]).logits
    torch.testing.assert_close(found, tensors["io.logits"], atol=2e-4, rtol=0)
    convert(tmp_path / "ours", tmp_path / "native", to="native", mp=world)
    for file in (tmp_path / str(world)).glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "native" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

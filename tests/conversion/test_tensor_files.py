"""Safetensors read and written tensor by tensor: the library's bytes, and a sentence for each damage."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.conversion.journal import Journal
from tessera.conversion.rules import TRANSPOSED, Changed, Renamed, Step, Translated
from tessera.conversion.safetensors_format import DTYPES
from tessera.conversion.tensor_files import TensorFiles, open_safetensors, write_safetensors
from tessera.conversion.torch_files import read_pt
from tessera.conversion.weight_writer import WeightWriter


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}-{dtype}".replace(" ", ""): torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in DTYPES.values()
        for name, shape in (("matrix", (3, 5)), ("zärtlich", (4,)), ("scalar", ()))
        if dtype != torch.complex64  # the library's torch side does not save it
    }
    return tensors | {"empty": torch.zeros(0, 7)}


def test_a_file_is_the_librarys_byte_for_byte_and_is_read_as_it_reads_it(tmp_path):
    tensors = tensors_of_every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_safetensors(tmp_path, tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    ours, theirs = open_safetensors(tmp_path), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == ours.header(name).dtype
        assert ours[name].shape == tensor.shape == ours.outline(name).shape
        assert (
            ours[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
        )


def test_slices_read_what_they_name(tmp_path):
    tensor = torch.arange(60).reshape(5, 4, 3)
    save_file({"x": tensor, "after": torch.ones(3)}, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    assert torch.equal(files.read_slice("x", 0, 1, 4), tensor[1:4])
    assert torch.equal(files.read_slice("x", 1, 2, 4), tensor[:, 2:4])
    assert torch.equal(files.read_slice("x", 1, 0, 4), tensor)
    assert files.read_slice("x", 0, 2, 2).shape == (0, 4, 3)


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"rows": whole[1:3], "columns": whole[:, ::2], "transposed": whole.T}
    write_safetensors(tmp_path, tensors, largest_file=50)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    found = open_safetensors(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_outlines_tell_what_comes_without_reading(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    files = open_safetensors(tmp_path)
    plan = [Step(("x",), ("a",), TRANSPOSED)]
    changed = Changed(Renamed(Translated(files, plan, out=False), {"y": "x"}), lambda _, t: t.bfloat16())
    (tmp_path / "model.safetensors").unlink()  # nothing is there to be read
    meta = changed.outline("y")
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", (3, 2), torch.bfloat16)


def test_a_file_that_is_not_complete_has_no_name_that_anything_loads(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError), WeightWriter(tmp_path, {"model.safetensors": tensors}) as writer:
        writer.write("model.safetensors", "b", tensors["b"])
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.part"]


def test_very_many_files_are_not_open_at_once_and_those_of_ranks_are(tmp_path):
    resource = pytest.importorskip("resource")
    tensors = {f"t{i:03d}": torch.full((3,), float(i)) for i in range(200)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = len(os.listdir("/dev/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
    try:
        write_safetensors(tmp_path, tensors, largest_file=12)
        with WeightWriter(tmp_path, {"x": {"a": torch.ones(2)}, "y": {"a": torch.ones(2)}}) as writer:
            for file in "xy":
                writer.write(file, "a", torch.ones(2))
        files = [tmp_path / f"{i}" for i in range(60)]
        with pytest.raises(OSError, match="cannot be written: Too many open files"):
            with WeightWriter(
                tmp_path, {f.name: {"a": torch.ones(2), "b": torch.ones(2)} for f in files}
            ) as w:
                for file in files:
                    w.write(file.name, "a", torch.ones(2))
                w.write("0", "b", torch.ones(2))
        assert len(os.listdir("/dev/fd")) <= room - 40, "all are closed"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) == 200 and load_file(files[-1])["t199"].tolist() == [199.0] * 3


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    with (
        pytest.raises(
            ValueError, match=r"a came out as \(3,\) in torch.float64, and was announced as \(3,\)"
        ),
        WeightWriter(tmp_path, {"m": {"a": torch.ones(3)}}) as writer,
    ):
        writer.write("m", "a", torch.ones(3).double())


def test_what_a_journal_tells_of_is_kept_and_what_changed_since_is_written_again(tmp_path):
    tensors = {name: torch.full((50,), float(i)) for i, name in enumerate("abc")}
    read = []

    class Counted(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    write_safetensors(tmp_path, Counted(tensors), journal=Journal(tmp_path, {"call": 1}))
    once = list(read)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    write_safetensors(tmp_path, Counted(tensors), journal=(journal := Journal(tmp_path, {"call": 1})))
    assert read[len(once) :].count("c") == 2 and read[len(once) :].count("a") == 1, (
        "the plan looks at each once"
    )
    assert journal.bytes_found == 400
    assert load_file(tmp_path / "model.safetensors")["c"].tolist() == [2.0] * 50
    other = Journal(tmp_path, {"call": 2})
    assert other.discarded and [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_journal_that_ends_within_a_line_counts_up_to_there(tmp_path):
    journal = Journal(tmp_path, {"call": 1})
    journal.add([("m", "a", 1), ("m", "b", 2)])
    with journal.path.open("ab") as file:
        file.write(b'["m", "c", ')
    again = Journal(tmp_path, {"call": 1})
    again.add([("m", "d", 4)])
    last = Journal(tmp_path, {"call": 1})
    assert [last.find("m", name) for name in "abcd"] == [1, 2, None, 4]


def rewrite_header(file, change) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(name, **values):
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: f.write_bytes(b""), "has 0 bytes, and its header should take 0"),
        (lambda f: f.write_bytes(b"abc"), "it is truncated or no safetensors file"),
        (lambda f: f.write_bytes(b"\xff" * 90), "its header should take 18,446,744,073,709,551,615"),
        (
            lambda f: f.write_bytes(f.read_bytes()[:-5]),
            r"truncated: b should take 12 bytes up to byte .*, but",
        ),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), "its header or its end is damaged"),
        (lambda f: rewrite_header(f, lambda h: "{" + json.dumps(h)), "its header is damaged"),
        (lambda f: rewrite_header(f, lambda h: "[1]"), "no JSON object"),
        (lambda f: rewrite_header(f, lambda h: "{" * 9999), "its header is damaged"),
        (lambda f: rewrite_header(f, lambda h: json.dumps(h)[:-1] + ', "b": 1}'), "a name is there twice"),
        (lambda f: rewrite_header(f, entry("a", dtype="F17")), "a has the unknown dtype 'F17'"),
        (lambda f: rewrite_header(f, entry("a", dtype=["F32"])), "a has the unknown dtype"),
        (lambda f: rewrite_header(f, entry("a", shape=[-2])), "are not all numbers from 0 on"),
        (lambda f: rewrite_header(f, entry("a", shape=[2.0])), "are not all numbers from 0 on"),
        (
            lambda f: rewrite_header(f, entry("a", shape=[3])),
            r"a of shape \(3,\) and dtype F32 takes 12 bytes",
        ),
        (
            lambda f: rewrite_header(f, entry("a", shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
            r"a of shape \(0, .*\) is larger than any tensor",
        ),
        (lambda f: rewrite_header(f, entry("b", data_offsets=[9, 21])), "b begins at byte .*, not where"),
        (lambda f: rewrite_header(f, entry("b", data_offsets=[0, 12])), "begins at byte"),
        (lambda f: rewrite_header(f, lambda h: h["a"].pop("shape") and None), "lacks dtype, shape or"),
        (lambda f: rewrite_header(f, lambda h: h.update(__metadata__=3)), "metadata"),
        (lambda f: f.unlink(), "cannot be read: No such file"),
    ],
)
def test_a_damaged_file_is_described(damage, sentence, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, file)
    damage(file)
    with pytest.raises(ValueError, match=sentence) as caught:
        TensorFiles([file])
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_described(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="is truncated: a should take 8 bytes"):
        files["a"]


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (
            {"a": "one.safetensors", "b": "../two.safetensors"},
            "places b in '../two.safetensors', which is no",
        ),
        ({"a": "one.safetensors", "b": "C:\\two"}, "which is no file beside it"),
        ({"a": "one.safetensors", "b": ".."}, "which is no file beside it"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "lacks three.safetensors, which"),
        (
            {"a": "two.safetensors", "b": "two.safetensors"},
            "says that a is in two.safetensors, which does not",
        ),
        ({"a": "one.safetensors"}, None),
        ({"b": "two.safetensors", "c": "two.safetensors"}, "says that c is in two.safetensors"),
        (
            {"b": "two.safetensors", "d": "more.safetensors"},
            "more.safetensors holds e, which .* does not name",
        ),
        (
            {"b": "two.safetensors", "a": "twice.safetensors"},
            "b is in .*twice.safetensors and in two.safetensors",
        ),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_says_other_things_than_the_files_is_refused(places, sentence, tmp_path):
    for name, held in (("one", "a"), ("two", "b"), ("more", "de"), ("twice", "ab")):
        save_file({key: torch.ones(1) for key in held}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if sentence is None:
        assert list(open_safetensors(tmp_path)) == ["a"]
        return
    with pytest.raises(ValueError, match=sentence):
        open_safetensors(tmp_path)


def test_an_index_beside_another_single_file_is_refused(tmp_path):
    for name in ("model", "one"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds model.safetensors and an index of other files"):
        open_safetensors(tmp_path)


def test_a_flipped_bit_in_a_pt_file_is_found_by_its_checksum(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    assert read_pt(tmp_path / "a.pt")["a"].sum() == 1000
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(torch.ones(100).numpy().tobytes()) + 200] ^= 4
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="a.pt cannot be read: .*data/0 in it is damaged"):
        read_pt(tmp_path / "a.pt")

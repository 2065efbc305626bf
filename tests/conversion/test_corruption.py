"""Damaged inputs: one clear error and no output, or the very weights that the damaged input holds.

Each mutation is a number: it says what is damaged and where. A flip within the bytes of a weight that leaves
it finite is another weight: no format can tell, unless a checksum is stored beside it. So what comes out must
then be what the library reads from the damaged input; and where checksums are, in a Tessera-written directory
and in a `.pt`, it must be an error.
"""

import json
import math
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import tiny_model
from helpers.weights import randomize
from safetensors.torch import load_file, save_file

from tessera import cli
from tessera.conversion.convert import convert
from tessera.conversion.nanochat_original import RULES
from tessera.conversion.rules import to_theirs

KINDS = ("llama", "sharded", "tessera", "native", "deepseek_v3", "nanochat")
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**TINY, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32}
DEEPSEEK = {
    **TINY,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_mtp_layers": 0,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    llama = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    llama.save_pretrained(folder / "llama")
    llama.save_pretrained(folder / "sharded", max_shard_size="4KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    convert(folder / "llama", folder / "tessera")
    tiny_model("llama-tiny", num_hidden_layers=2, vocab_size=64).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "native", mp=2)
    deepseek = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK))
    randomize(deepseek).save_pretrained(folder / "deepseek_v3")
    save_nanochat(folder / "nanochat")
    convert(folder / "nanochat", folder / "nanochat-as-tessera")
    return folder


def save_nanochat(folder: Path) -> None:
    """As nanochat's own code names and describes it."""
    model = tiny_model("nanochat-tiny")
    model.config.sliding_window = 129
    theirs = to_theirs(model.state_dict(), model.config, RULES)
    folder.mkdir()
    torch.save({name: theirs[name].clone() for name in theirs}, folder / "model_000010.pt")
    args = {"sequence_len": 512, "vocab_size": 256, "n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 96}
    (folder / "meta_000010.json").write_text(json.dumps({"model_config": {**args, "window_pattern": "SSSL"}}))


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")])


# ---- what can be done to a directory; each is given the random numbers that say where ----


def truncate(folder: Path, rng: random.Random) -> None:
    file = rng.choice(weight_files(folder))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def append(folder: Path, rng: random.Random) -> None:
    file = rng.choice(weight_files(folder))
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 99)))


def flip(file: Path, at: int, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_in_header(folder: Path, rng: random.Random) -> None:
    file = rng.choice(weight_files(folder))
    length = struct.unpack("<Q", file.read_bytes()[:8])[0] if file.suffix == ".safetensors" else 200
    flip(file, rng.randrange(8 + length), rng)


def flip_in_weights(folder: Path, rng: random.Random) -> None:
    file = rng.choice(weight_files(folder))
    length = struct.unpack("<Q", file.read_bytes()[:8])[0] if file.suffix == ".safetensors" else 200
    flip(file, rng.randrange(8 + length, file.stat().st_size), rng)


def flip_in_description(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(p for p in folder.glob("*.json") if "report" not in p.name))
    flip(file, rng.randrange(file.stat().st_size), rng)


def change_description(folder: Path, rng: random.Random) -> None:
    file = rng.choice(
        sorted(p for p in folder.glob("*.json") if p.name in ("config.json", "meta_000010.json"))
    )
    values = json.loads(file.read_text())
    inner = values.get("model_config", values)
    key = rng.choice(sorted(inner))
    if rng.random() < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice([None, -1, 0, 3, 1.5, "wibble", [], {}, True, 10**30, [7, 7], inner[key]])
    file.write_text(json.dumps(values))


def change_tensors(folder: Path, rng: random.Random, change) -> None:
    file = rng.choice(weight_files(folder))
    if file.suffix == ".pt":
        state = torch.load(file, weights_only=True)
        change(state, rng.choice(sorted(state)))
        torch.save(state, file)
        return
    state = load_file(file)
    change(state, rng.choice(sorted(state)))
    save_file(state, file, metadata={"format": "pt"})


def rename(folder: Path, rng: random.Random) -> None:
    def change(state, name):
        state[name + rng.choice("x0.")] = state.pop(name)

    change_tensors(folder, rng, change)


def drop(folder: Path, rng: random.Random) -> None:
    change_tensors(folder, rng, lambda state, name: state.pop(name))


def reshape(folder: Path, rng: random.Random) -> None:
    def change(state, name):
        tensor = state[name]
        way = rng.randrange(4)
        state[name] = (
            tensor.reshape(1, -1) if way == 0
            else tensor[: math.ceil(len(tensor) / 2)].clone() if way == 1 and tensor.ndim
            else torch.cat([tensor.reshape(-1), tensor.reshape(-1)]) if way == 2
            else tensor.reshape(*tensor.shape, 1)
        )  # fmt: skip

    change_tensors(folder, rng, change)


def swap_dtype(folder: Path, rng: random.Random) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float64)

    def change(state, name):
        state[name] = state[name].to(rng.choice(dtypes))

    change_tensors(folder, rng, change)


def spoil(folder: Path, rng: random.Random) -> None:
    def change(state, name):
        flat = state[name].reshape(-1)
        flat[rng.randrange(len(flat))] = rng.choice([math.nan, math.inf, -math.inf])

    change_tensors(folder, rng, change)


def remove(folder: Path, rng: random.Random) -> None:
    rng.choice(weight_files(folder)).unlink()


def spoil_index(folder: Path, rng: random.Random) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text()) if file.is_file() else {"weight_map": {}}
    places = index["weight_map"]
    name = rng.choice(sorted(places)) if places else "model.norm.weight"
    way = rng.randrange(6)
    if way == 0:
        file.write_bytes(rng.randbytes(rng.randint(0, 200)))
        return
    if way == 1 and places:
        del places[name]
    elif way == 2:
        places[rng.choice(["wibble", name + "x"])] = next(iter(places.values()), "model.safetensors")
    elif way == 3:
        places[name] = rng.choice(
            ["../model.safetensors", "/etc/passwd", "", ".", "nothing.safetensors", "a\nb"]
        )
    elif way == 4:
        places[name] = rng.choice([None, 3, [], {}])
    else:
        index["weight_map"] = rng.choice([None, [], "wibble", {}])
    file.write_text(json.dumps(index))


def double(folder: Path, rng: random.Random) -> None:
    """A tensor in two files, or a file twice."""
    file = rng.choice(weight_files(folder))
    if file.suffix == ".pt":
        return truncate(folder, rng)
    other = file.with_name(rng.choice(["model-00001-of-00002.safetensors", "model2-mp2.safetensors"]))
    files = [path.name for path in weight_files(folder)] + [other.name]
    shutil.copy(file, other)
    places = {name: path for path in files for name in load_file(folder / path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


MUTATIONS = (
    truncate,
    append,
    flip_in_header,
    flip_in_header,
    flip_in_weights,
    flip_in_description,
    flip_in_description,
    change_description,
    change_description,
    rename,
    drop,
    reshape,
    swap_dtype,
    spoil,
    remove,
    spoil_index,
    double,
)


def tensors_of(folder: Path, pattern: str = "*.safetensors") -> dict[tuple[str, str], torch.Tensor]:
    """By the library; which file of several is of account only where each is a rank's."""
    return {
        (file.name if "-mp" in file.name else "", name): tensor
        for file in folder.glob(pattern)
        for name, tensor in load_file(file).items()
    }


def check(number: int, originals: Path, place: Path, capsys) -> str:
    """Damages an input and converts it; gives how that ended."""
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    mutation = rng.choice(MUTATIONS)
    story = f"{number}: {mutation.__name__} of {kind}"
    source, target = place / "in", place / "out"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(originals / kind, source)
    mutation(source, rng)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    words = {"llama": ["--to", "llama"], "sharded": ["--to", "llama"], "nanochat": []}.get(
        kind, ["--to", kind]
    )
    words += ["--mp", "2"] if kind == "native" else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(["convert", str(source), str(target), *words])
    output = capsys.readouterr()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before, f"{story}: source changed"
    if exit.value.code:
        lines = [line for line in output.err.splitlines() if line.startswith("tessera: error")]
        assert exit.value.code == 2 and len(lines) == 1 and len(lines[0]) < 700, (story, output.err)
        assert [path.name for path in place.iterdir()] == ["in"], f"{story}: something is left"
        return f"{story}: {lines[0]}"
    assert mutation not in (truncate, rename, drop, spoil, remove), f"{story}: it should have been refused"
    found, expected = tensors_of(target), tensors_of(originals / "nanochat-as-tessera")
    if kind != "nanochat":
        pattern = "model[0-9]-mp2.safetensors" if kind == "native" else "*.safetensors"
        expected = tensors_of(source, pattern)
    if mutation is flip_in_weights:
        assert kind not in ("tessera", "native", "nanochat"), f"{story}: a checksum is there"
    tied = {("", "lm_head.weight")}
    assert expected.keys() - tied <= found.keys() <= expected.keys(), story
    for name, tensor in found.items():
        if kind == "nanochat" and mutation is swap_dtype:  # its own are of several dtypes too
            torch.testing.assert_close(tensor, expected[name], atol=0, rtol=1e-2)
            continue
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, (story, name)
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), (story, name)
    return f"{story}: the same weights"


def check_all(numbers: range, originals: Path, place: Path, capsys) -> None:
    ends = [check(number, originals, place / "work", capsys) for number in numbers]
    print(*ends, sep="\n")
    refused = sum("tessera: error" in end for end in ends)
    assert refused > 0.7 * len(ends), "most damage is an error"


def test_thirty_damaged_inputs_end_clearly(originals, tmp_path, capsys):
    check_all(range(30), originals, tmp_path, capsys)


@pytest.mark.slow
def test_two_hundred_damaged_inputs_end_clearly(originals, tmp_path, capsys):
    check_all(range(30, 200), originals, tmp_path, capsys)

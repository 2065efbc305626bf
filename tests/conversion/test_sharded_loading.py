"""Native files of k ranks on n processes, without joining them first, are the model of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import sharded_ranks
from helpers.models import tiny_model
from helpers.native import native
from safetensors.torch import load_file, save_file

from tessera import build_byte_tokenizer
from tessera.conversion.convert import convert
from tessera.conversion.native import open_slices, read_native_config
from tessera.conversion.rank_files import RankFiles
from tessera.conversion.resharding import shard
from tessera.conversion.sharded_loading import load_sharded
from tessera.conversion.sources import open_checkpoint
from tessera.modeling.loading import load_model

PAGE = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
# kind of split, model, files; "fp8" are files in FP8.
CASES = [
    ("tensor", "llama-tiny", "2"),
    ("tensor", "bytegpt-tiny", "1"),
    ("tensor", "bytegpt-tiny", "2"),
    ("tensor", "bytegpt-tiny", "4"),
    ("tensor", "latent-sliding-lowrank-sigmoid", "2"),
    ("tensor", "nanochat-tiny", "2"),
    ("tensor", "gpt2-tiny", "4"),
    ("tensor", "bytegpt-tiny", "fp8"),
    ("expert", "bytegpt-tiny", "4"),
    ("expert", "latent-sliding-lowrank-sigmoid", "1"),
    ("data", "llama-tiny", "2"),
]


def torchrun(folder: Path, *program) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    paths = [str(Path(sharded_ranks.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, program)
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[tuple[str, str, str], list[dict]]:
    """What `helpers/sharded_ranks.py` finds, of each rank; two processes for all cases."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in {name for _, name, _ in CASES}:
        tiny_model(name).save_pretrained(folder / name)
        for world in {files for _, other, files in CASES if other == name}:
            place = folder / f"{name}-{world}"
            if world != "fp8":
                convert(folder / name, place, to="native", mp=int(world))
                continue
            # Of two ranks, and compared with the model that they make when they are joined.
            convert(folder / name, place, to="native", mp=2, dtype="fp8")
            convert(place, folder / f"{name}-out-of-fp8")
    cases = {}
    for kind, name, files in CASES:
        whole = f"{name}-out-of-fp8" if files == "fp8" else name
        cases[kind, name, files] = f"{kind},{folder / f'{name}-{files}'},{folder / whole}"
    report = folder / "report.json"
    done = torchrun(folder, sharded_ranks.__file__, report, *cases.values())
    assert report.is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(report.read_text())
    return {case: found[words] for case, words in cases.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_and_generation_are_those_of_one_process(reports, case):
    for rank in reports[case]:
        assert rank["difference"] < 1e-5
        assert rank["same_text"]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_process_reads_what_it_holds_and_nothing_else(reports, case):
    for rank in reports[case]:
        if case[2] == "fp8":
            # One byte for what is in fp32 afterwards, two where it was bf16.
            assert rank["read"] < 0.4 * rank["held"]
        else:
            # A buffer is no parameter: the router's correction bias.
            assert 0 <= rank["read"] - rank["held"] < 200
        assert rank["held"] < 0.63 * rank["whole"]


@pytest.mark.distributed
def test_the_example_of_the_docs_runs(tmp_path):
    example = next(
        text for text in re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL) if "load_sharded" in text
    )
    model, tokenizer = tiny_model("bytegpt-tiny"), build_byte_tokenizer()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "shards", n_experts=model.config.n_routed_experts, mp=4)
    (tmp_path / "split.py").write_text(example)
    done = torchrun(tmp_path, "split.py")
    assert done.returncode == 0, done.stderr[-4000:]
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0]) in done.stdout


@pytest.mark.parametrize("name", ["latent-moe", "moe-of-heads", "nanochat-moe", "gpt"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_slices_of_any_part_are_those_of_the_tensor(name, world, tmp_path):
    folder = native(name, tmp_path / "native", world)
    files = RankFiles(folder)
    slices = open_slices(files, read_native_config(folder, files))
    tensors = open_checkpoint(folder).tensors
    assert slices.keys() == set(tensors)
    generator = torch.Generator().manual_seed(0)
    for name, part in slices.items():
        whole = tensors[name]
        assert part.get_shape() == list(whole.shape) and torch.equal(part[...], whole)
        for _ in range(3):
            ends = [
                sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in whole.shape
            ]
            index = tuple(slice(*pair) for pair in ends)
            assert torch.equal(part[index], whole[index])
        assert torch.equal(part[1:], whole[1:])


def test_slices_out_of_fp8_are_those_of_the_tensor(tmp_path):
    tiny_model("bytegpt-tiny", intermediate_size=512).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "one", to="native", dtype="fp8")
    shard(tmp_path / "one", tmp_path / "two", 2)
    files = RankFiles(tmp_path / "two")
    slices = open_slices(files, read_native_config(tmp_path / "two", files))
    tensors = open_checkpoint(tmp_path / "one").tensors
    for name, part in slices.items():
        assert part.get_dtype() == "BF16" and torch.equal(part[...], tensors[name])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(slices[name][100:400, 3:50], tensors[name][100:400, 3:50])


def test_one_process_loads_it_whole_in_any_type(tmp_path):
    model = tiny_model("bytegpt-tiny")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", mp=2)
    loaded = load_sharded(tmp_path / "native")
    assert loaded.dtype == torch.float32 and loaded.generation_config.max_new_tokens == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    half = load_sharded(tmp_path / "native", dtype=torch.bfloat16)
    expected = load_model(tmp_path / "ours", dtype=torch.bfloat16).state_dict()
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in half.state_dict().items())


def test_a_tied_head_is_tied_again(tmp_path):
    loaded = load_sharded(native("gpt", tmp_path / "native", 2))
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def _without(name):
    def damage(tensors):
        del tensors[name]

    return damage


def _narrow(tensors):
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()


def _change_expert(change):
    def damage(tensors):
        name = "layers.1.ffn.experts.2.w1.weight"
        tensors[name] = change(tensors[name])

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            _change_expert(lambda t: t[:-1].clone()),
            r"belong together but are F32 \(31, 96\) and F32 \(32, 96\)",
        ),
        (_change_expert(lambda t: t.bfloat16()), "belong together but are BF16 .* and F32 "),
        (_change_expert(lambda t: t.flatten()), r"belong together but are F32 \(32, 96\) and F32 \(3072,\)"),
        (_without("layers.0.ffn.w1.weight"), "missing layers.0.ffn.w1.weight"),
        (_narrow, r"norm.weight gives a tensor of shape \(95,\), but the configuration says \(96,\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_read(damage, sentence, tmp_path):
    folder = native("moe-of-heads", tmp_path / "native")
    tensors = load_file(folder / "model0-mp1.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model0-mp1.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_sharded(folder)
    with pytest.raises(ValueError, match="there is no directory"):
        load_sharded(tmp_path / "nowhere")

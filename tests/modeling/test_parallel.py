"""Models split over two processes by transformers' engine are the models of one process.

The processes are those of `helpers/ranks.py`, one start for each kind of split; where two GPUs are at hand
the same checks run over NCCL.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ranks
from helpers.models import DIALECTS, tiny_model
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import TensorParallelLayer

from tessera import build_byte_tokenizer

pytestmark = pytest.mark.distributed

# Beside the dialects: tiles that no preset combines, and sizes that two ranks do not divide.
VARIANTS = {
    "absorbed": ("bytegpt-tiny", {"latent_attention_mode": "absorb"}),
    "odd-sizes": ("llama-tiny", {"vocab_size": 251, "intermediate_size": 255}),
    "odd-tied-vocabulary": ("gpt2-tiny", {"vocab_size": 251}),
    "multi-token": ("bytegpt-tiny", {"num_mtp_layers": 1, "train_mtp": True}),
    "biased-gate": ("llama-tiny", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}
MIXTURES = [
    "latent-learned-layernorm",
    "latent-sliding-lowrank-sigmoid",
    "moe-qknorm-softcap",
    "nanochat-moe-smear-gqa",
    "partial-rotary-interleaved-llama3",
]
EVERY = [*DIALECTS, *MIXTURES, *VARIANTS]
SPARSE = ["bytegpt-tiny", "latent-sliding-lowrank-sigmoid", "moe-qknorm-softcap", "nanochat-moe-smear-gqa"]
STAGED = [name for name in EVERY if "nanochat" not in name and name != "multi-token"]
WRAPPED = [*DIALECTS, "latent-sliding-lowrank-sigmoid", "odd-tied-vocabulary", "multi-token"]
EVEN = [name for name in EVERY if not name.startswith("odd-")]
MODELS = {
    "tensor": EVERY if hasattr(TensorParallelLayer, "_from_local_last_dim_shard") else EVEN,
    "data": EVERY,
    "expert": SPARSE,
    "expert-data": SPARSE,
    "pipeline": STAGED,
    "accelerate": WRAPPED,
}
if "ep_size" not in DistributedConfig.__dataclass_fields__:
    del MODELS["expert-data"]
LOADED = [(kind, name) for kind in MODELS for name in MODELS[kind] if kind != "accelerate"]
TRAINED = [(kind, name) for kind in MODELS for name in MODELS[kind] if kind != "pipeline"]
SAVED = [pair for pair in LOADED if pair in TRAINED]

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])]


@pytest.fixture(scope="module", params=BACKENDS)
def reports(request, tmp_path_factory):
    """What `helpers/ranks.py` reports of a kind of split; the processes start when a test first asks."""
    known = {}

    def report_of(kind: str) -> dict:
        if kind not in known:
            known[kind] = start(kind, request.param, tmp_path_factory.mktemp(f"{request.param}-{kind}"))
        return known[kind]

    return report_of


def start(kind: str, backend: str, folder: Path) -> dict:
    for name in MODELS[kind]:
        preset, fields = VARIANTS.get(name, (name, {}))
        tiny_model(preset, **fields).save_pretrained(folder / name)
    report = folder / "report.json"
    done = torchrun(folder, backend, ranks.__file__, kind, report, folder, *MODELS[kind])
    assert report.is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(report.read_text())


def torchrun(folder: Path, backend: str, *program) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": str(backend == "gloo").lower()}
    paths = [str(Path(ranks.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, program)
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


def require(report: dict, name: str, claim: str) -> None:
    assert report[name]["loads"] is None, report[name]["loads"]
    assert report[name][claim] is None, report[name][claim]


@pytest.mark.parametrize("kind, name", TRAINED)
def test_each_rank_holds_its_part_of_every_large_tensor(reports, kind, name):
    require(reports(kind), name, "holds_its_part")


@pytest.mark.parametrize("name", STAGED)
def test_each_stage_holds_its_own_layers(reports, name):
    require(reports("pipeline"), name, "holds_its_layers")


@pytest.mark.parametrize("name", WRAPPED)
def test_accelerate_wraps_each_layer_and_the_last_norm_with_the_head(reports, name):
    require(reports("accelerate"), name, "is_wrapped_unit_by_unit")


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in MODELS for name in MODELS[kind]])
def test_logits_of_split_models_equal_those_of_one_process(reports, kind, name):
    require(reports(kind), name, "logits")


@pytest.mark.parametrize("kind, name", LOADED)
def test_split_models_generate_what_one_process_does(reports, kind, name):
    require(reports(kind), name, "generation")


@pytest.mark.parametrize("kind, name", TRAINED)
def test_losses_gradients_and_the_next_step_equal_those_of_one_process(reports, kind, name):
    require(reports(kind), name, "training")


@pytest.mark.parametrize("kind, name", SAVED)
def test_split_models_save_the_bytes_of_one_process(reports, kind, name):
    require(reports(kind), name, "saved_bytes")


def test_the_example_of_the_docs_runs(tmp_path):
    example = re.search(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)[1]
    model, tokenizer = tiny_model("bytegpt-tiny"), build_byte_tokenizer()
    final = tmp_path / "runs" / "demo" / "final"
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    (tmp_path / "split.py").write_text(example)
    done = torchrun(tmp_path, "gloo", "split.py")
    assert done.returncode == 0, done.stderr[-4000:]
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert text in done.stdout
    assert (
        ranks.digests(tmp_path / "split-and-whole-again")["model.safetensors"]
        == (ranks.digests(final)["model.safetensors"])
    )

"""The Hub of the examples takes and gives what huggingface_hub, transformers and datasets send and want."""

import json
import os
import subprocess
import sys

from local_hub import LocalHub

CLIENT = r"""
import json, pathlib, sys
import torch
from huggingface_hub import HfApi, HfFileSystem, create_repo, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

scratch = pathlib.Path(sys.argv[1])
api = HfApi()
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.push_to_hub("someone/model", max_shard_size="20KB")
again = AutoModelForCausalLM.from_pretrained("someone/model")
state = again.state_dict()
assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

first = api.model_info("someone/model").sha
api.create_branch("someone/model", branch="try/this")
api.upload_file(
    path_or_fileobj=b"0123456789", path_in_repo="sub/x.txt", repo_id="someone/model", revision="try/this"
)
assert api.file_exists("someone/model", "sub/x.txt", revision="try/this")
assert not api.file_exists("someone/model", "sub/x.txt")
assert api.model_info("someone/model").sha == first, "commits stay"
assert "x.txt" in str(list(pathlib.Path(snapshot_download("someone/model", revision="try/this")).rglob("*")))
with HfFileSystem().open("someone/model@try%2Fthis/sub/x.txt", "rb", block_size=4) as file:
    file.seek(3)
    assert file.read(4) == b"3456", "a range"
api.delete_file("sub/x.txt", repo_id="someone/model", revision="try/this")
assert not api.file_exists("someone/model", "sub/x.txt", revision="try/this")

import datasets
create_repo("someone/lines", repo_type="dataset", exist_ok=True)
create_repo("someone/lines", repo_type="dataset", exist_ok=True)
(scratch / "up").mkdir()
rows = [{"text": f"row {i}"} for i in range(100)]
(scratch / "up/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
api.upload_folder(repo_id="someone/lines", folder_path=scratch / "up", repo_type="dataset")
streamed = datasets.load_dataset("someone/lines", split="train", streaming=True)
assert list(streamed) == rows
datasets.Dataset.from_list(rows).push_to_hub("someone/parquet")
assert list(datasets.load_dataset("someone/parquet", split="train", streaming=True)) == rows

api.create_repo("someone/mine", private=True)
for call, error in (
    (lambda: HfApi(token=False).model_info("someone/mine"), RepositoryNotFoundError),
    (lambda: HfApi(token="hf_wrong").create_repo("someone/other"), HfHubHTTPError),
    (lambda: api.model_info("../datasets/someone"), Exception),
):
    try:
        call()
    except error:
        continue
    sys.exit("was not refused")
"""


def test_models_and_datasets_go_up_and_come_back(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environment},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    # What was there is there again after a restart.
    with LocalHub(tmp_path / "hub") as hub:
        repository = hub.find("datasets", "someone/lines")
        file = repository.commit(repository.resolve("main"))["files"]["train.jsonl"]
        line = repository.blob(file["sha256"]).read_text().splitlines()[7]
        assert json.loads(line) == {"text": "row 7"}

"""Models, configurations and tokenizers push themselves whole: whatever the way, others load it by name."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_model
from helpers.remote_code import travelling, without_tessera
from local_hub import LocalHub
from safetensors.torch import load_file

from tessera import build_byte_tokenizer

pytestmark = pytest.mark.distributed

CODE = {f"{name}.py" for name in travelling()}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
IDS = torch.tensor([list(b"Hello, stranger!")])

# Each way by which a user of transformers sends a model; argv[1] has one. The answers go to argv[2].
OWNER = """
import sys
import torch
import tessera
from pathlib import Path
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import Trainer, TrainingArguments, default_data_collator

source, out, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
ids = torch.tensor([list(b"Hello, stranger!")])

def answer(model):
    with torch.no_grad():
        return model.eval()(ids).logits.contiguous()

tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.push_to_hub("someone/sharded")
AutoConfig.from_pretrained(source).push_to_hub("someone/config")
model = AutoModelForCausalLM.from_pretrained(source)
model.push_to_hub("someone/sharded", max_shard_size="500KB")

lora = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
merged = lora.merge_and_unload()
merged.push_to_hub("someone/merged", commit_message="merged")
answers = {"merged": answer(merged)}

settings = TrainingArguments(
    str(out / "trained"), push_to_hub=True, hub_model_id="someone/trained", hub_strategy="checkpoint",
    max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
    hub_always_push=True,
)
merged.requires_grad_(True).config.save_pretrained(settings.output_dir)
rows = [{"input_ids": ids[0], "labels": ids[0]}] * 2
trainer = Trainer(merged, settings, default_data_collator, rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
answers["trained"] = answer(merged)
save_file(answers, out / "owner.safetensors")
"""

# Somebody else, who also passes on what was loaded.
STRANGER = """
import sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

out, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
answers = {}
for name in sys.argv[3:]:
    name, _, folder = name.partition(":")
    model, info = AutoModelForCausalLM.from_pretrained(
        f"someone/{name}", trust_remote_code=True, output_loading_info=True, subfolder=folder
    )
    assert not any(info.values()), info
    if name == "sharded":
        ids = torch.tensor([AutoTokenizer.from_pretrained("someone/sharded", trust_remote_code=True)(
            "Hello, stranger!").input_ids])
        config = AutoConfig.from_pretrained("someone/config", trust_remote_code=True)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
        fresh.load_state_dict(model.state_dict())
        answers["config"] = fresh(ids).logits.detach().contiguous()
        model.push_to_hub("someone/onward")
    with torch.no_grad():
        answers[name + folder] = model(ids).logits.contiguous()
save_file(answers, out / "stranger.safetensors")
"""

# The same again, when the Hub is gone.
OFFLINE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(f"someone/{name}", trust_remote_code=True)
AutoTokenizer.from_pretrained("someone/sharded", trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after everybody was there, the folder of their answers, and the model of the owner."""
    root = tmp_path_factory.mktemp("push")
    model = tiny_model("nanochat-tiny")
    model.save_pretrained(root / "source")
    build_byte_tokenizer().save_pretrained(root / "source")
    threads = torch.get_num_threads()
    with LocalHub(root / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", OWNER, str(root / "source"), str(root), str(threads)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **hub.environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        names = ["sharded", "merged", "trained", "trained:last-checkpoint", "onward"]
        home = root / "elsewhere"
        without_tessera(STRANGER, root, threads, *names, home=home, **hub.environment)
        without_tessera(OFFLINE, "sharded", "merged", home=home)
        yield hub, root, model


def files_of(hub: LocalHub, name: str, revision: str = "main") -> set[str]:
    repository = hub.find("models", f"someone/{name}")
    return set(repository.commit(repository.resolve(revision))["files"]) - {"README.md"}


def test_what_is_pushed_is_complete(pushed):
    hub, _, _ = pushed
    shards = {name for name in files_of(hub, "sharded") if name.startswith("model-")}
    assert len(shards) > 2
    index = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert files_of(hub, "sharded") == CODE | TOKENIZER | index | shards
    assert files_of(hub, "config") == CODE | {"config.json"}
    assert files_of(hub, "merged") == CODE | MODEL
    assert files_of(hub, "onward") == CODE | MODEL
    trained = {name for name in files_of(hub, "trained") if not name.startswith("last-checkpoint/")}
    assert trained - {"training_args.bin"} == CODE | MODEL | TOKENIZER
    checkpoint = {name.removeprefix("last-checkpoint/") for name in files_of(hub, "trained") - trained}
    assert checkpoint >= CODE | MODEL | TOKENIZER | {"optimizer.pt", "trainer_state.json"}


def test_a_trainer_that_pushes_on_its_way_leaves_nothing_half_if_the_configuration_was_there_first(pushed):
    hub, _, _ = pushed
    repository = hub.find("models", "someone/trained")
    states = [set(commit["files"]) for _, commit in repository.history(repository.resolve())]
    weights = [state for state in states if "model.safetensors" in state]
    assert len(weights) > 1
    assert all(state >= CODE | MODEL | TOKENIZER for state in weights)


def test_a_stranger_gets_the_same_logits_from_all_of_them(pushed):
    _, root, model = pushed
    theirs, ours = load_file(root / "stranger.safetensors"), load_file(root / "owner.safetensors")
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.equal(theirs["sharded"], expected)
    assert torch.equal(theirs["config"], expected)
    assert torch.equal(theirs["onward"], expected)
    assert torch.equal(theirs["merged"], ours["merged"]) and not torch.equal(theirs["merged"], expected)
    assert torch.equal(theirs["trained"], ours["trained"])
    assert torch.equal(theirs["trainedlast-checkpoint"], ours["trained"])

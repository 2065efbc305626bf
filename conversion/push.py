"""A model as others load it: the complete directory with its code and card, checked, and sent to the Hub.

What belongs here: what a release consists of, the proof that it loads where Tessera is not installed, and one
commit to the Hub with every way that can fail as a sentence.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tessera.data.hub_errors import why_refused
from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .model_card import write_model_card
from .sources import open_checkpoint
from .tensor_files import INDEX, SINGLE_FILE
from .verify import TOLERANCE, build_model

T = TypeVar("T")

# What older versions of transformers wrote into configurations.
_PATHS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}

# Loads a directory as somebody does who has transformers and no Tessera.
_LOAD = """
import sys
sys.modules["tessera"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, out, remote, has_tokenizer = sys.argv[1:]
ids, remote = load_file(ids)["ids"], remote == "True"
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=remote, dtype=torch.float32, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
if has_tokenizer == "True":
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    assert len(tokenizer) <= model.config.vocab_size, "the tokenizer has more tokens than the model"
with torch.no_grad():
    save_file({"logits": model.eval()(ids, use_cache=False).logits.float().contiguous()}, out)
model.generate(ids[:1, :1], max_new_tokens=2, do_sample=False, pad_token_id=0)
"""


def push(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Builds and checks the release of a model, and commits it to the Hub.

    Args:
        model: model directory, or a run's.
        repo_id: `owner/name`; created if it is not there.
        private: of a new repository; one that is there and public is refused.
        revision: branch, made from the main one if it is not there; default: the main one.
        message: of the commit.
        license: identifier for the card.
        dry_run: directory to put the release in, instead of sending it.

    Returns:
        The address of the commit, or the directory.

    Raises:
        ValueError: for a model that cannot be released as it is, a name that the Hub does not take, or a Hub
            that refuses or is not reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a name on the Hub: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} lacks the owner: give owner/name")
    if dry_run is not None and Path(dry_run).exists():
        raise ValueError(f"{dry_run} is there already; choose another directory")
    if dry_run is None:
        if not get_token():
            raise ValueError("there is no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
        # Before the work: whether the Hub is there and knows the token.
        _ask(lambda api: api.whoami(), repo_id)
    with tempfile.TemporaryDirectory(prefix="tessera-push-") as scratch:
        folder = Path(scratch) / "release"
        folder.mkdir()
        checkpoint = open_checkpoint(model)
        build_release(checkpoint, folder, repo_id, run=_find_run(model), license=license)
        check_release(checkpoint, folder, Path(scratch))
        if dry_run is not None:
            aside = Path(dry_run).with_name(f".{Path(dry_run).name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                shutil.copytree(folder, aside)
                aside.rename(dry_run)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return str(dry_run)
        return _upload(folder, repo_id, private, revision, message or "Upload model")


def build_release(
    checkpoint: Checkpoint, folder: Path, repo_id: str, *, run: Path | None = None, license: str | None = None
) -> None:
    """Fills an empty directory with everything that others need.

    Raises:
        ValueError: if the checkpoint is of a kind that transformers does not load.
    """
    if checkpoint.kind not in ("tessera", getattr(checkpoint.family, "model_type", None)):
        raise ValueError(
            f"{checkpoint.folder} is in the layout '{checkpoint.kind}', which transformers does not load; "
            "convert it first"
        )
    for file in _weight_files(checkpoint.folder):
        _link_or_copy(file, folder / file.name)
    for file in checkpoint.side_files:
        _copy_without_paths(file, folder / file.name)
    if checkpoint.family is None:
        config = checkpoint.config
        config.architectures = ["TesseraForCausalLM"]
        config.save_pretrained(folder)
    else:
        _copy_without_paths(checkpoint.folder / "config.json", folder / "config.json")
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)
    if not (folder / "tokenizer_config.json").is_file() and checkpoint.config.vocab_size == 256:
        from tessera.tokenization import build_byte_tokenizer

        build_byte_tokenizer().save_pretrained(folder)
    write_model_card(
        folder, repo_id, checkpoint.config, checkpoint.kind, run=run, license=license, on_hub=_on_hub
    )


def check_release(checkpoint: Checkpoint, folder: Path, scratch: Path) -> None:
    """Loads a release in a new process that cannot import Tessera nor go online, and compares the logits.

    Raises:
        ValueError: if it does not load, or is not the same model.
    """
    length = min(32, checkpoint.config.max_position_embeddings - 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.config.vocab_size, (2, max(length, 1)), generator=generator)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    arguments = [folder, scratch / "ids.safetensors", scratch / "logits.safetensors"]
    arguments += [checkpoint.family is None, (folder / "tokenizer_config.json").is_file()]
    environment = {
        **os.environ,
        # A home of its own: the code must come from the directory and from no cache.
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "home" / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, *map(str, arguments)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
    )
    if loaded.returncode:
        lines = [line for line in loaded.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(f"the release does not load without Tessera: {lines[-1]}")
    with torch.no_grad():
        expected = build_model(checkpoint)(ids, use_cache=False).logits.float()
    found = load_file(scratch / "logits.safetensors")["logits"]
    largest, allowed = (
        float((expected - found).abs().max()),
        TOLERANCE * max(1.0, float(expected.abs().max())),
    )
    if not largest <= allowed:
        raise ValueError(f"the release loads as another model: logits differ by up to {largest:.3g}")


def _upload(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    def send(api: HfApi) -> str:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there already and public; choose another name, or make it private on the Hub"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
        )
        return commit.commit_url

    return _ask(send, repo_id)


def _ask(question: Callable[[HfApi], T], repo_id: str) -> T:
    """What the Hub answers, or why it does not, in a sentence."""
    api = HfApi()
    try:
        return question(api)
    except Exception as error:
        reason = why_refused(error, api.endpoint, repo_id)
        if reason is None:
            raise
        raise ValueError(reason) from error


def _on_hub(name: str, kind: str) -> bool:
    """Whether the Hub has a repository of this name; not, where it cannot be asked."""
    try:
        return HfApi().repo_exists(name, repo_type=kind)
    except Exception:
        return False


def _find_run(model: str | Path) -> Path | None:
    """The run that a model belongs to."""
    path = Path(model).absolute()
    if path.name == "final":
        path = path.parent
    elif path.parent.name == "checkpoints":
        path = path.parent.parent
    return path if (path / "recipe.yaml").is_file() else None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE_FILE]
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [index, *(folder / name for name in sorted(set(places.values())))]


def _copy_without_paths(source: Path, target: Path) -> None:
    """Copies a file; of a JSON configuration, not where its parts once lay on somebody's machine."""
    values = read_json(source) if source.name in ("config.json", "tokenizer_config.json") else {}
    if not values.keys() & _PATHS:
        shutil.copyfile(source, target)
        return
    kept = {key: value for key, value in values.items() if key not in _PATHS}
    target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are large: a second name for the same file where the file system can, else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy(source, target)

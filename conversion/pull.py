"""A model from the Hub: fetched, compared with what the Hub says of it, opened, and only then kept.

What belongs here: which files of a repository make a model, the order of these steps, and every way that can
fail as a sentence. The download itself is `huggingface_hub`'s.
"""

import glob
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tessera.data.hub_errors import why_refused
from tessera.modeling.accounting import count_costs
from tessera.modeling.loading import read_json

from .convert import convert
from .families import FAMILIES
from .push import content_hash, format_size
from .sources import open_checkpoint
from .targets import TARGETS

# What a model consists of: at the top of the repository, and nothing that is unpickled.
_WANTED = re.compile(r"[^/]+\.(safetensors|json|jinja|py|md|txt|model|png|tiktoken)|LICENSE")
_WEIGHTS = ".safetensors"


@dataclass
class Pulled:
    """What came.

    Attributes:
        folder: where the model is.
        commit: of the repository.
        kind: of the model as it is in `folder`, as `convert` calls it.
        parameters: of the model.
        context: its positions.
        files: how many came.
        size: their bytes.
        left: files that stayed on the Hub.
        has_tokenizer, has_template: whether these came with it.
        notes: what a conversion did, in sentences.
    """

    folder: Path
    commit: str
    kind: str
    parameters: int
    context: int
    files: int
    size: int
    left: list[str]
    has_tokenizer: bool
    has_template: bool
    notes: list[str] = field(default_factory=list)


def pull(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    to: str | None = None,
    dtype: str | None = None,
) -> Pulled:
    """Fetches a model. The directory appears when everything is there, compared and opened, or not at all.

    What came before a connection was lost stays in `.NAME.download` beside it, and the next call goes on
    there. A file whose content is not what the Hub announces is removed from it, and all of it if the files
    are no model that is known.

    Args:
        repo_id: `owner/name`.
        folder: directory that does not exist yet, or is empty; default: the repository's name.
        revision: branch, tag or commit; default: the main branch.
        to: kind to convert to, one of `TARGETS`; default: as it is.
        dtype: to round to; default: as it is.

    Raises:
        ValueError: if the Hub does not give it or is not reached, what came is not what the Hub announced, or
            no model that Tessera knows; or if it cannot be converted.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a name on the Hub: {error}") from error
    target = Path(folder if folder is not None else repo_id.split("/")[-1]).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; choose another directory")
    if to is not None and to not in TARGETS:
        raise ValueError(f"--to {to}: known targets are {', '.join(TARGETS)}")
    aside = target.with_name(f".{target.name}.download")
    commit, entries = _list(repo_id, revision)
    wanted = {path: entry for path, entry in entries.items() if _WANTED.fullmatch(path)}
    _require_model(repo_id, wanted, entries)
    size = sum(entry.size for entry in wanted.values())
    _require_space(repo_id, aside, size)

    # The small files first: they tell whether the weights are wanted.
    small = [path for path in wanted if not path.endswith(_WEIGHTS)]
    _download(repo_id, commit, aside, small)
    _require_known(repo_id, aside)
    _download(repo_id, commit, aside, list(wanted))
    _compare(repo_id, aside, wanted)
    for left in aside.iterdir():
        if left.name not in wanted and left.name != ".cache":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        checkpoint = open_checkpoint(aside)
    except ValueError as error:
        shutil.rmtree(aside)
        reason = str(error).replace(f"{aside}/", "").replace(str(aside), repo_id)
        raise ValueError(f"what {repo_id} holds is no model that can be opened: {reason}") from error
    kind, notes = checkpoint.kind, list(checkpoint.notes)
    costs = count_costs(checkpoint.config)
    if (to is not None and to != kind) or dtype is not None:
        try:
            done = convert(aside, target, to=to or kind, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{error}; the model as it came is in {aside}, for another --to") from error
        notes = [*done.notes, f"converted from {kind} to {to or kind}" + (f" in {dtype}" if dtype else "")]
        kind = to or kind
        shutil.rmtree(aside)
    else:
        shutil.rmtree(aside / ".cache", ignore_errors=True)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    return Pulled(
        target,
        commit,
        kind,
        costs.parameters,
        checkpoint.config.max_position_embeddings,
        len(wanted),
        size,
        sorted(entries.keys() - wanted.keys() - {".gitattributes"}),
        (target / "tokenizer_config.json").is_file() or (target / "tokenizer.json").is_file(),
        _has_template(target),
        notes,
    )


def _list(repo_id: str, revision: str | None) -> tuple[str, dict]:
    """The commit that is meant, and its files: path -> what the Hub says of it."""
    api = HfApi()
    try:
        # Once for all: a branch may move while files come.
        commit = api.model_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return commit, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    except Exception as error:
        raise _explained(error, repo_id, revision) from error


def _explained(error: Exception, repo_id: str, revision: str | None = None) -> Exception:
    """The error as a sentence, if it is one of the Hub's."""
    what = repo_id if revision is None else f"{repo_id} at {revision}"
    reason = why_refused(error, HfApi().endpoint, what, reads=True)
    return error if reason is None else ValueError(reason)


def _require_model(repo_id: str, wanted: dict, entries: dict) -> None:
    if not any(path.endswith(_WEIGHTS) for path in wanted):
        others = sorted(path for path in entries if re.search(r"\.(bin|pt|pth|gguf|ckpt|onnx|h5)$", path))
        there = f"; {', '.join(others[:3])} there is not read" if others else ""
        raise ValueError(f"{repo_id} has no safetensors at its top{there}")


def _require_known(repo_id: str, folder: Path) -> None:
    """Refuses a model of another architecture before its weights come."""
    if not (folder / "config.json").is_file():
        return
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except ValueError as error:
        shutil.rmtree(folder)
        raise ValueError(f"{repo_id}: {str(error).replace(f'{folder}/', '')}") from error
    if model_type is not None and model_type not in ("tessera", *FAMILIES):
        shutil.rmtree(folder)
        raise ValueError(
            f"{repo_id} is of model type {model_type!r}; known are tessera, {', '.join(FAMILIES)}"
        )


def _require_space(repo_id: str, aside: Path, size: int) -> None:
    there = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside.is_dir() else 0
    place = next(path for path in aside.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if size - there > free:
        needed = format_size(size - there)
        raise ValueError(f"{place} has {format_size(free)} free, and {needed} of {repo_id} are to come")


def _download(repo_id: str, commit: str, aside: Path, paths: list[str]) -> None:
    try:
        patterns = [glob.escape(path) for path in paths]
        snapshot_download(
            repo_id, revision=commit, local_dir=aside, allow_patterns=patterns, endpoint=HfApi().endpoint
        )
    except Exception as error:
        explained = _explained(error, repo_id)
        if explained is error:
            raise
        if aside.is_dir() and any(path.name != ".cache" for path in aside.iterdir()):
            hint = f"; what has come is in {aside}, and the same command goes on there"
            raise ValueError(f"{explained}{hint}") from error
        shutil.rmtree(aside, ignore_errors=True)
        raise explained from error


def _compare(repo_id: str, aside: Path, wanted: dict) -> None:
    """Compares each file with the size and the hash that the Hub gives; the client looks at sizes only."""
    broken = []
    for path, entry in wanted.items():
        file = aside / path
        expected = (entry.lfs.sha256, True) if entry.lfs else (entry.blob_id, False)
        if not file.is_file():
            broken.append(path)
        elif file.stat().st_size != entry.size or content_hash(file, expected[1]) != expected[0]:
            file.unlink()
            broken.append(path)
    if broken:
        raise ValueError(
            f"{', '.join(broken)} of {repo_id} did not come with the size and hash that the Hub gives, and "
            "is not kept; the same command fetches it again"
        )


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError:
        return False

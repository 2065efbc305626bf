"""A model from the Hub: fetched, compared with what the Hub says of it, opened, and only then kept.

What belongs here: which files of a repository make a model, the order of these steps, and every way that can
fail as a sentence. The download itself is `huggingface_hub`'s.
"""

import glob
import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from tessera.modeling.accounting import count_costs
from tessera.modeling.loading import read_json

from .convert import convert
from .families import FAMILIES
from .hub_files import ask, content_hash, format_size, require_repo_id, require_revision
from .report import Report
from .sources import open_checkpoint
from .targets import TARGETS, require_dtype
from .tensor_files import INDEX, SINGLE_FILE

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
    require_repo_id(repo_id)
    require_revision(revision)
    target = Path(folder if folder is not None else repo_id.split("/")[-1]).resolve()
    if target == Path.cwd():
        raise ValueError(f"{target} is the current directory, which cannot be replaced; name a new one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; choose another directory")
    if to is not None and to not in TARGETS:
        raise ValueError(f"--to {to}: known targets are {', '.join(TARGETS)}")
    if dtype is not None:
        require_dtype(dtype, to)
    aside = target.with_name(f".{target.name}.download")
    was_there = aside.is_dir()
    commit, entries = _list(repo_id, revision)
    wanted = {path: entry for path, entry in entries.items() if _WANTED.fullmatch(path)}
    _require_model(repo_id, wanted, entries)

    # The small files first: they tell whether the weights are wanted, and which.
    small = {path: entry for path, entry in wanted.items() if not path.endswith(_WEIGHTS)}
    _require_space(repo_id, aside, sum(entry.size for entry in small.values()))
    _download(repo_id, commit, aside, list(small))
    _require_known(repo_id, aside)
    weights = _named_weights(aside, wanted)
    wanted = {path: entry for path, entry in wanted.items() if path in small or path in weights}
    size = sum(entry.size for entry in wanted.values())
    try:
        _require_space(repo_id, aside, size)
    except ValueError:
        if not was_there:
            shutil.rmtree(aside, ignore_errors=True)
        raise
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
    has_tokenizer, has_template = _has_tokenizer(aside), _has_template(aside)
    costs = count_costs(checkpoint.config)
    if (to is not None and to != kind) or dtype is not None:
        try:
            done = convert(aside, target, to=to or kind, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{error}; the model as it came is in {aside}, for another --to") from error
        notes = [*done.notes, f"converted from {kind} to {to or kind}" + (f" in {dtype}" if dtype else "")]
        kind = to or kind
        if target.is_dir():
            _complete(repo_id, aside, target, done.report)
        if TARGETS[kind].suffix is None:  # else they are in the one file
            has_tokenizer, has_template = _has_tokenizer(target), _has_template(target)
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
        has_tokenizer,
        has_template,
        notes,
    )


def _list(repo_id: str, revision: str | None) -> tuple[str, dict]:
    """The commit that is meant, and its files: path -> what the Hub says of it."""

    def look(api: HfApi) -> tuple[str, dict]:
        # Once for all: a branch may move while files come.
        commit = api.model_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return commit, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    what = repo_id if revision is None else f"{repo_id} at {revision}"
    return ask(HfApi(), look, what, reads=True)


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


def _named_weights(folder: Path, wanted: dict) -> set[str]:
    """The files that the model is read from; its weights may be there in another layout as well."""
    every = {path for path in wanted if path.endswith(_WEIGHTS)}
    if (folder / INDEX).is_file():
        try:
            places = read_json(folder / INDEX)["weight_map"].values()
            return every & set(places)
        except (AttributeError, KeyError, TypeError, ValueError):
            return every  # what is wrong with it is told when it is opened
    return {SINGLE_FILE} if SINGLE_FILE in every and "config.json" in wanted else every


def _complete(repo_id: str, came: Path, target: Path, report: Report) -> None:
    """Gives a converted model its card and license, and its report the name that people know it by."""
    for name in ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (came / name).is_file():
            shutil.copyfile(came / name, target / name)
    replace(report, source={**report.source, "name": repo_id}).write(target)


def _require_space(repo_id: str, aside: Path, size: int) -> None:
    there = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside.is_dir() else 0
    place = next(path for path in aside.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if size - there > free:
        needed = format_size(size - there)
        raise ValueError(f"{place} has {format_size(free)} free, and {needed} of {repo_id} are to come")


def _download(repo_id: str, commit: str, aside: Path, paths: list[str]) -> None:
    patterns = [glob.escape(path) for path in paths]

    def fetch(api: HfApi) -> None:
        snapshot_download(
            repo_id, revision=commit, local_dir=aside, allow_patterns=patterns, endpoint=api.endpoint
        )

    def advise(passes: bool) -> str:
        if aside.is_dir() and any(path.name != ".cache" for path in aside.iterdir()):
            return f"; what has come is in {aside}, and the same command goes on there"
        shutil.rmtree(aside, ignore_errors=True)
        return ""

    ask(HfApi(), fetch, repo_id, reads=True, advice=advise)


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


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError:
        return False

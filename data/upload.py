"""A folder of tokens to the Hub: checked, described, and sent in one commit.

What belongs here: what such a repository holds, its card, and every way that sending can fail as a sentence.
The way back is `data/download.py`.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

from .files import COMPRESSIONS, ROW_SUFFIXES, TEXT_SUFFIXES, suffixes
from .hub_errors import why_refused
from .token_files import META, SPLITS, open_prepared

# The files of the format, beside those of tokenizer/.
NAMES = (META, *(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")))


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload tokens",
    dry_run: str | Path | None = None,
) -> str:
    """Sends a folder of tokens to a dataset repository, with a card if neither has one of somebody's hand.

    What an earlier call that was broken off has sent is not sent again; the repository changes only when
    everything is there. What is left of tokens that it held before (another tokenizer's files, say) goes in
    the same commit; files that are none of the format's stay.

    Args:
        folder: what `prepare` or `download` wrote.
        repo: `owner/name` of a dataset; created if it is not there.
        private: of a new repository; one that is there and public is refused.
        revision: branch, made from the main one if it is not there; default: the main one.
        message: of the commit.
        dry_run: directory to put what would be sent in, instead of sending it.

    Returns:
        The address of the commit, or the directory.

    Raises:
        ValueError: if the folder is not what was written, or the Hub refuses or is not reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot be a name on the Hub: {error}") from error
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} lacks the owner: give owner/name")
    if dry_run is not None and Path(dry_run).exists():
        raise ValueError(f"{dry_run} is there already; choose another directory")
    if dry_run is None and not get_token():
        raise ValueError("there is no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
    folder = Path(folder).resolve()
    meta = open_prepared(folder, verify=True).meta
    files = _files_to_send(folder)
    with tempfile.TemporaryDirectory(prefix="tessera-upload-") as scratch:
        card = Path(scratch) / "README.md"
        card.write_text(write_card(meta, repo), encoding="utf-8")
        described = Path(scratch) / META
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        described.write_text(
            json.dumps(_without_paths(content), indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        has_card = "README.md" in files
        files = {"README.md": card, **files, META: described}
        if dry_run is not None:
            for name, path in files.items():
                (Path(dry_run) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, Path(dry_run) / name)
            return str(dry_run)
        return _send(files, has_card, repo, private, revision, message)


def write_card(meta: dict, repo: str) -> str:
    """The dataset card of tokens.

    Args:
        meta: `data_meta.json`, as `open_prepared` completes it.
        repo: `owner/name`.
    """
    tokens = sum(meta[split]["tokens"] for split in SPLITS)
    lines = [
        "---",
        "tags: [tokens, pretraining, tessera]",
        "---",
        "",
        f"# {repo.split('/')[1]}",
        "",
        f"{tokens:,} tokens for training a language model, as {meta['dtype']}"
        + (f" of a vocabulary of {meta['vocab_size']:,}" if meta.get("vocab_size") else "")
        + ".",
        "",
        "| split | documents | tokens | bytes of text |",
        "|---|---|---|---|",
    ]
    for split in SPLITS:
        documents = meta[split].get("documents")
        shown = "?" if documents is None else f"{documents:,}"
        lines.append(f"| {split} | {shown} | {meta[split]['tokens']:,} | {meta[split]['bytes']:,} |")
    if meta.get("sources"):
        lines += ["", "| source | weight | documents | tokens |", "|---|---|---|---|"]
        for source in meta["sources"]:
            name = _name(source["source"])
            config = f" ({source['name']})" if source.get("name") else ""
            weight = source.get("weight", "")
            lines.append(f"| {name}{config} | {weight} | {source['documents']:,} | {source['tokens']:,} |")
    dropped = (meta.get("filters") or {}).get("dropped")
    if dropped:
        lines += ["", "| dropped by | documents |", "|---|---|"]
        lines += [f"| {name} | {count:,} |" for name, count in dropped.items()]
    lines += [
        "",
        "`train.bin` and `val.bin` hold the ids one after the other, little-endian; `.idx` files where each",
        f"document starts; `{META}` the rest.",
        "",
        "```",
        f"tessera data download {repo} --output tokens",
        "tessera pretrain --config PRESET --data tokens",
        "```",
        "",
    ]
    return "\n".join(lines)


def _name(given: str) -> str:
    """A source without its folder: a path on somebody's machine says nothing to others.

    Whether it is one, its form tells, as what it names may be gone or on another machine.
    """
    path = Path(given)
    suffix, compression = suffixes(path)
    of_machine = (
        given.startswith(("/", "~", "."))
        or "\\" in given
        or given.count("/") > 1
        or compression in COMPRESSIONS
        or suffix in TEXT_SUFFIXES | ROW_SUFFIXES
        or path.exists()
    )
    return (re.split(r"[/\\]", given.rstrip("/\\"))[-1] or given) if of_machine else given


def _without_paths(meta: dict) -> dict:
    """`data_meta.json` with names instead of paths; that of others, who have other keys, as it is."""
    if not isinstance(meta.get("format"), int):
        return meta
    sources = [{**source, "source": _name(source["source"])} for source in meta.get("sources") or []]
    val_data = [_name(given) for given in meta["val_data"]] if meta.get("val_data") else None
    changed = {"sources": sources, "val_data": val_data}
    return {key: changed.get(key, value) for key, value in meta.items()}


def _files_to_send(folder: Path) -> dict[str, Path]:
    """Those of the format, by their names in the repository."""
    files = {name: folder / name for name in (*NAMES, "README.md") if (folder / name).is_file()}
    if (folder / "tokenizer").is_dir():
        for path in sorted((folder / "tokenizer").iterdir()):
            if path.is_file() and not path.name.startswith("."):
                files[f"tokenizer/{path.name}"] = path
    return files


def _send(
    files: dict[str, Path], has_card: bool, repo: str, private: bool, revision: str | None, message: str
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        api.whoami()
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.dataset_info(repo).private:
            raise ValueError(
                f"{repo} is there already and public; choose another name, or make it private on the Hub"
            )
        if revision is not None:
            api.create_branch(repo, repo_type="dataset", branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        if not has_card and "README.md" in there and not _is_our_card(repo, revision, there):
            files = {name: path for name, path in files.items() if name != "README.md"}
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [
            CommitOperationDelete(name)
            for name in there
            if name not in files and (name in NAMES or name.startswith("tokenizer/"))
        ]
        commit = api.create_commit(
            repo, operations, repo_type="dataset", revision=revision, commit_message=message
        )
        return commit.commit_url
    except Exception as error:
        reason = why_refused(error, api.endpoint, repo)
        if reason is None:
            raise
        raise ValueError(reason) from error


def _is_our_card(repo: str, revision: str | None, there: list[str]) -> bool:
    """Whether the card in a repository is the one that tokens there were given, and nobody has changed it."""
    from huggingface_hub import hf_hub_download

    if META not in there:
        return False
    card, meta = (
        Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision)).read_bytes()
        for name in ("README.md", META)
    )
    try:
        return card == write_card(json.loads(meta), repo).encode("utf-8")
    except (AttributeError, KeyError, TypeError, ValueError):  # somebody else's notes
        return False

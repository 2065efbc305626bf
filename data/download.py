"""Tokens that somebody else made, from the Hub.

What belongs here: which files of a repository are those of `data/token_files.py`, and fetching them so that
a folder with the name that was asked for is whole and has been checked.
"""

import shutil
from pathlib import Path

from .token_files import META, SPLITS, PreparedData, open_prepared

FILES = [META, *(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")), "tokenizer/*"]


def download(repo: str, output: str | Path) -> PreparedData:
    """Fetches a folder of tokens.

    Args:
        repo: `org/name` of a dataset, or of a model where there is no such dataset.
        output: folder to write; it must not exist, or be empty.

    Returns:
        The folder, opened; every file was read and checked.

    Raises:
        ValueError: if there is no such repository or it holds no tokens. Nothing is left behind then.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give another, or remove it first")
    output = output.resolve()
    # Of this repository: files of another one would be taken for its own.
    partial = output.with_name(f"{output.name}.{repo.replace('/', '--')}.partial")
    for kind in ("dataset", "model"):
        try:
            # What an earlier call that was broken off left there is not fetched again.
            snapshot_download(repo, repo_type=kind, allow_patterns=FILES, local_dir=partial)
            break
        except HFValidationError as error:
            raise ValueError(f"{repo!r} is no name on the Hub, which is written org/name") from error
        except GatedRepoError as error:
            raise ValueError(
                f"{repo} is gated: accept its terms on its page on the Hub, and log in with hf auth login"
            ) from error
        except RepositoryNotFoundError as error:
            if kind == "model":
                shutil.rmtree(partial, ignore_errors=True)
                raise ValueError(
                    f"there is no dataset or model {repo} on the Hub, or it is private"
                ) from error
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{repo} cannot be fetched from the Hub: {reason}") from error
    try:
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # what the client knows of its downloads
        missing = [name for name in FILES[:2] if not (partial / name).is_file()]
        if missing:
            raise ValueError(f"{repo} on the Hub has no {missing[0]}: it does not hold tokens")
        open_prepared(partial, verify=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_prepared(output)

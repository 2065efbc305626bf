"""What an error of the Hub's client means, in a sentence: for all that is sent there and fetched from there.

What belongs here: errors that a user can do something about. All others stay what they are.
"""

import os
from collections.abc import Sequence

SECONDS_FOR_AN_ANSWER = 10.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def why_refused(error: BaseException | None, endpoint: str, repo: str, reads: bool = False) -> str | None:
    """A sentence on an error of `huggingface_hub`; None for one that is not about the Hub.

    Args:
        error: what it raised.
        endpoint: address of the Hub.
        repo: what was to be written or read.
        reads: which of the two.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError) and reads:
        return (
            f"{repo} is given only to those who were granted access: ask for it on its page at {endpoint}, "
            "and use your token (HF_TOKEN, or `hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such branch, tag or commit as was asked for"
    if isinstance(error, RepositoryNotFoundError) and reads:
        return (
            f"there is no {repo} on the Hub, or it is private and your token does not see it (HF_TOKEN, or "
            "`hf auth login`)"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = str(error).splitlines()[-1].strip()
        reasons = {401: "the Hub does not know the token; check HF_TOKEN, or log in with `hf auth login`"}
        # The Hub answers the same to a token that may not write and to storage that is full.
        if "storage" not in said.lower():
            reasons[403] = f"the token may not {'read' if reads else 'write to'} {repo}"
        return reasons.get(status, f"the Hub refused {repo} ({status}): {said}")
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub cannot be reached: HF_HUB_OFFLINE is set"
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        return "the token for the Hub has characters that no token has; check HF_TOKEN, or log in again"
    if _is_of_connection(error):
        return f"the Hub at {endpoint} cannot be reached: {error}"
    if isinstance(error, RuntimeError):
        # Of a file that could not be uploaded it says no more than the name; the reason is beneath.
        reason = why_refused(error.__cause__, endpoint, repo, reads)
        return reason and f"{str(error).rstrip('.')}, and no commit was made: {reason}"
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # Of a snapshot that could not be fetched.
        return why_refused(error.__cause__, endpoint, repo, reads)
    return None


def why_missing(given: str, files: Sequence[str]) -> str | None:
    """Why a name is neither a directory here nor a model on the Hub; None if it is, or nobody can tell.

    The Hub is asked once: loaders ask it again and again for a minute before they give up.

    Args:
        given: the name.
        files: that it may have; where one was fetched before, the Hub is not asked.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if os.path.exists(given):
        return None
    missing = f"there is no directory {given}"
    api = HfApi()
    try:
        if any(isinstance(try_to_load_from_cache(given, file), str) for file in files):
            return None
        api.model_info(given, timeout=SECONDS_FOR_AN_ANSWER)
    except HFValidationError:  # a path, and no name that the Hub could have
        return missing
    except Exception as error:
        if may_pass(error) and not _is_of_connection(error):
            return None
        reason = why_refused(error, api.endpoint, given, reads=True)
        return reason and f"{missing}, and {reason}"
    return None


def may_pass(error: BaseException | None) -> bool:
    """Whether the same may succeed later: after a lost connection, and where the Hub is busy or broken."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        # Too many requests, and all that is the Hub's own fault.
        return error.response.status_code == 429 or error.response.status_code >= 500
    return _is_of_connection(error) or (isinstance(error, RuntimeError) and may_pass(error.__cause__))


def _is_of_connection(error: BaseException | None) -> bool:
    # The client's transport is one library or another by version; all that they raise ends here.
    return type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError)

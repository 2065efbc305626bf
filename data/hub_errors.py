"""What an error of the Hub's client means, in a sentence: for all that is sent there, tokens and models.

What belongs here: errors that a user can do something about. All others stay what they are.
"""


def why_refused(error: BaseException | None, endpoint: str, repo: str) -> str | None:
    """A sentence on an error of `huggingface_hub`; None for one that is not about the Hub.

    Args:
        error: what it raised.
        endpoint: address of the Hub.
        repo: what was to be written.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: "the Hub does not know the token; check HF_TOKEN, or log in with `hf auth login`",
            403: f"the token may not write to {repo}",
        }
        said = str(error).splitlines()[-1].strip()
        return reasons.get(status, f"the Hub refused {repo} ({status}): {said}")
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub cannot be reached: HF_HUB_OFFLINE is set"
    # The client's transport is one library or another by version; all that they raise ends here.
    if type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError):
        return f"the Hub at {endpoint} cannot be reached: {error}"
    if isinstance(error, RuntimeError):
        # Of a file that could not be uploaded it says no more than the name; the reason is beneath.
        reason = why_refused(error.__cause__, endpoint, repo)
        return reason and f"{str(error).rstrip('.')}, and nothing was changed there: {reason}"
    return None

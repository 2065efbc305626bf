"""What several commands need before they start."""

import importlib.util


def silence_transformers() -> None:
    """No bars for files that are written at once, and no report beside the sentence that says the same."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def require_extra(extra: str, *modules: str) -> None:
    """Refuses in one sentence when a stage's own libraries are missing.

    Args:
        extra: name of the extra in pyproject.toml that has them.
        modules: import names.

    Raises:
        ValueError: with what to install.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"this command needs {', '.join(missing)}, which is not installed: "
            f"pip install 'tessera-lm[{extra}]'"
        )

"""What tests of conversion share: a process that stays as loud as it was, and a translation that is wrong."""

import pytest
from transformers.utils import logging

from tessera.conversion import convert as conversion


@pytest.fixture(autouse=True)
def loud_again():
    """A command silences transformers for its process; here others come after it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def translate_wrongly(monkeypatch):
    """Call it, and from then on weights arrive as they were written, but mean another model."""

    def start() -> None:
        prepare = conversion._prepare

        def wrong(*arguments):
            config, tensors = prepare(*arguments)
            config.rope_reverse = True
            return config, tensors

        monkeypatch.setattr(conversion, "_prepare", wrong)

    return start

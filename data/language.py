"""Which language a document is in, by a trained model that comes with its package and needs no network.

What belongs here: asking py3langid (naive Bayes over bytes, some hundred languages) for the probability of
one language, by the beginning of a text.
"""

from functools import lru_cache

# A document goes below this probability, as for FineWeb (Penedo et al. 2024, arXiv:2406.17557), whose
# probabilities were fastText's.
CONFIDENT = 0.65
# What a beginning tells: on the whole of a text the model takes a second for each megabyte.
_CHARS = 1000


def probability_of(language: str, text: str) -> float:
    """How likely a text is to be in a language, by its first thousand characters."""
    return dict(_identifier().rank(text[:_CHARS])).get(language, 0.0)


def require_language(language: str) -> None:
    """Whether the model knows a language, by its two letters.

    Raises:
        ValueError: if not, or if the package is not there.
    """
    known = sorted(name for name, _ in _identifier().rank("which are there?"))
    if language not in known:
        raise ValueError(f"there is no language {language!r}; there are {', '.join(known)}")


@lru_cache(maxsize=1)
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("--language needs py3langid: pip install 'tessera-lm[language]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

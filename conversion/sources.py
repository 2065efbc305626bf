"""The ways in: which kind of checkpoint lies at a path.

What belongs here: the list. Each source is a module with `recognises(path)`, which looks at names (and at
headers, where a name says too little), and `open_source(path)`, which returns a `Checkpoint` and leaves its
tensors on disk until they are asked for. The first that recognises a path opens it.
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from tessera.modeling.loading import first_sentence
from tessera.training.checkpoints import find_checkpoint

from . import hugging_face, llama2c, meta_original, nanochat_original, native
from .checkpoints import Checkpoint

# What comes of a value of another type or size than its reader and transformers' configurations expect.
_OF_DAMAGE = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)

_READ = (
    "what is read is a directory of transformers or of Tessera (config.json and model.safetensors), a run, a "
    "directory with native shards (model0-mp1.safetensors), nanochat's model_<step>.pt or Meta's "
    "consolidated.00.pth, and a file of llama2.c (.bin)"
)

SOURCES = (native, nanochat_original, meta_original, llama2c, hugging_face)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Finds out what a path holds and opens it.

    Args:
        path: a model directory or file of any kind, or a run's directory.

    Raises:
        ValueError: if nothing that is known is there, or it does not fit its own configuration.
    """
    place = Path(path)
    # A run has a configuration as well; its model is the one that it came to.
    source = None if (place / "recipe.yaml").is_file() else _find_source(place)
    if source is None:
        try:
            place = find_checkpoint(place)
        except ValueError as error:
            if not place.exists():
                raise
            raise ValueError(_why_not(place, str(error))) from error
        source = _find_source(place) or hugging_face
    try:
        return source.open_source(place)
    except ValueError as error:
        where = "" if str(place) in str(error) else f"{place}: "
        raise ValueError(f"{where}{error}") from error
    except _OF_DAMAGE as error:
        raise ValueError(f"{place} does not describe a model: {first_sentence(error)}") from error


def _why_not(place: Path, sentence: str) -> str:
    """What to say of a path at which no source is, beside what is not there."""
    if place.suffix == ".gguf":
        return f"{place} is a GGUF file, which is written and not read; convert what it was made from"
    if place.is_file():
        folder = place.absolute().parent
        if _find_source(folder) is not None or any(folder.glob("model*.safetensors")):
            return f"{place} is a file of a model's directory: name the directory, {place.parent}"
        sentence = f"{place} is no model"
    return f"{sentence}; {_READ}"


def _find_source(path: Path):
    return next((source for source in SOURCES if source.recognises(path)), None)

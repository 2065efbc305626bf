"""Which of our classes stands behind which Auto class: the `auto_map` of every configuration that is saved.

This file is also how the code travels. `TesseraConfig.save_pretrained` imports it, it imports the model, and
the model its parts; transformers copies whatever files these imports name, into a saved directory, to the Hub
and from there. So a new file of this folder needs no entry in any list: it travels if the model imports it.
"""

from .configuration_tessera import TesseraConfig
from .modeling_tessera import (
    TesseraForCausalLM,
    TesseraForSequenceClassification,
    TesseraForTokenClassification,
    TesseraModel,
)

AUTO_CLASSES = {
    "AutoConfig": TesseraConfig,
    "AutoModel": TesseraModel,
    "AutoModelForCausalLM": TesseraForCausalLM,
    "AutoModelForSequenceClassification": TesseraForSequenceClassification,
    "AutoModelForTokenClassification": TesseraForTokenClassification,
}


def complete(auto_map: dict) -> dict[str, str]:
    """An `auto_map` with all our classes, each in a file of the same directory.

    Args:
        auto_map: what the configuration has. Where a user registered a class of their own, it stays; a place
            in another repository (`owner/name--file.Class`) of one of our classes does not.
    """
    ours = {
        auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in AUTO_CLASSES.items()
    }
    theirs = {
        auto: place
        for auto, place in auto_map.items()
        if auto not in ours or place.rpartition("--")[2] != ours[auto]
    }
    return {**ours, **theirs}

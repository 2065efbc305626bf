"""Tessera: one Hugging Face-native decoder family, from raw text to a model that others load.

Importing it makes the Auto classes of transformers know `model_type` "tessera", and costs next to nothing:
the model is imported when its name is first used here, or when transformers imports its own Auto classes.
"""

import importlib

from ._registration import register

__version__ = "0.1.0"

# public name -> module
_EXPORTS = {
    "ByteTokenizer": "tessera.tokenization",
    "build_byte_tokenizer": "tessera.tokenization",
    "TesseraConfig": "tessera.modeling.configuration_tessera",
    "TesseraForCausalLM": "tessera.modeling.modeling_tessera",
    "TesseraForSequenceClassification": "tessera.modeling.modeling_tessera",
    "TesseraForTokenClassification": "tessera.modeling.modeling_tessera",
    "TesseraModel": "tessera.modeling.modeling_tessera",
    "TesseraPreTrainedModel": "tessera.modeling.modeling_tessera",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()

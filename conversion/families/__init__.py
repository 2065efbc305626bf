"""The model families of transformers that a Tessera model can come from and go to: the list."""

from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .experts import MIXTRAL, QWEN3_MOE
from .family import Family, architecture
from .gpt2 import GPT2
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3
from .nanochat import NANOCHAT

__all__ = ["FAMILIES", "Family", "architecture"]

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        MIXTRAL,
        GPT2,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        NANOCHAT,
    )
}

"""Registers Tessera with the Auto classes of transformers and with PEFT when those are imported.

`AutoModel.register` wants the model classes, and they need torch: two seconds that `import tessera` and
`tessera --help` should not cost. So a finder stands in front of the two modules that hold the Auto classes,
lets them load as always, and then enters names into their tables, as transformers does for its own models;
the class behind a name is imported when a model is first asked for. (Calling `register` there instead would
import our model in the middle of theirs.) PEFT is told in the same way which layers an adapter goes to where
nobody says.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable

MODEL_TYPE = "tessera"
CONFIG = "TesseraConfig"
# table in transformers' modeling_auto -> class that `tessera` exports
MODELS = {
    "MODEL_MAPPING": "TesseraModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "TesseraForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "TesseraForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "TesseraForTokenClassification",
}
# Where PEFT puts adapters unless told: queries and values, as in other families. Latent values begin at
# `kv_a_proj_with_mqa`, and absorbed decoding needs the bare weight of `kv_b_proj`.
ADAPTED = ["q_proj", "v_proj", "q_b_proj", "kv_a_proj_with_mqa"]


def register() -> None:
    """Registers now with what has been imported already, and with the rest when it is."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
    actions = {
        "transformers.models.auto.configuration_auto": _register_config,
        "transformers.models.auto.modeling_auto": _register_models,
        "peft.utils.constants": _register_adapted,
    }
    for name, register in list(actions.items()):
        if name in sys.modules:
            register(sys.modules[name])
            del actions[name]
    if actions:
        sys.meta_path.insert(0, _AfterImport(actions))


def _register_config(auto) -> None:
    auto.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG
    auto.CONFIG_MAPPING._modules[MODEL_TYPE] = sys.modules["tessera"]


def _register_models(auto) -> None:
    for table, model in MODELS.items():
        mapping = getattr(auto, table)
        mapping._reverse_config_mapping[CONFIG] = MODEL_TYPE
        mapping._model_mapping[MODEL_TYPE] = model
        mapping._modules[MODEL_TYPE] = sys.modules["tessera"]


def _register_adapted(constants) -> None:
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for name, table in vars(constants).items():
        # Each method has a table; those that go where LoRA goes have its entries.
        if name.endswith("_TARGET_MODULES_MAPPING") and table.get("llama") == lora["llama"]:
            table[MODEL_TYPE] = list(ADAPTED)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the named modules as the other finders would, and acts on each right after it is executed."""

    def __init__(self, actions: dict[str, Callable]):
        self.actions = actions

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a named module, whose loader also acts; None for all others."""
        if name not in self.actions:
            return None
        act = self.actions.pop(name)
        if not self.actions:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module) -> None:
                execute(module)
                act(module)

            spec.loader.exec_module = execute_and_act
        return spec

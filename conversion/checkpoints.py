"""What a directory holds: which kind of checkpoint it is, its configuration, and its tensors as Tessera's.

What belongs here: the way in, whatever wrote the directory. The tensors stay on disk until they are asked
for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_config, read_json
from tessera.training.checkpoints import find_checkpoint

from . import nanochat_original, native
from .families import FAMILIES, Family
from .rules import Renamed, Rule, to_ours
from .tensor_files import open_safetensors

TESSERA_RULES = [Rule("{rest}", "{rest}")]
# DeepSeek's releases repeat the model's embedding and head in each layer for multi-token prediction.
_SHARED_BY_PREDICTORS = (".embed_tokens.weight", ".shared_head.head.weight")
# What comes with weights, to be taken along as it is.
_SIDE_FILES = re.compile(
    r"tokenizer.*\.(json|model)|chat_template\.(jinja|json)|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|tekken\.json|generation_config\.json"
)


@dataclass
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: where it is.
        kind: `tessera`, `native`, `nanochat-original` or a family's model type.
        config: as Tessera has it.
        tensors: under Tessera's names, read when asked for.
        family: its family in transformers, if it is of one.
        notes: what was left out, in sentences.
    """

    folder: Path
    kind: str
    config: TesseraConfig
    tensors: Mapping[str, torch.Tensor]
    family: Family | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings beside the weights."""
        return sorted(p for p in self.folder.iterdir() if p.is_file() and _SIDE_FILES.fullmatch(p.name))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Finds out what a directory holds and opens it.

    Args:
        path: a model directory of any kind, or a run's.

    Raises:
        ValueError: if nothing that is known is there, or it does not fit its own configuration.
    """
    folder = Path(path)
    known = ("config.json", "params.json")
    if not folder.is_dir() or not (
        any((folder / name).is_file() for name in known) or nanochat_original.find_nanochat(folder)
    ):
        folder = find_checkpoint(folder)
    try:
        return _open(folder)
    except ValueError as error:
        place = "" if str(folder) in str(error) else f"{folder}: "
        raise ValueError(f"{place}{error}") from error


def _open(folder: Path) -> Checkpoint:
    if native.is_native(folder):
        tensors = native.RankFiles(folder)
        config = native.read_native_config(folder, tensors)
        return Checkpoint(folder, "native", config, to_ours(tensors, config, native.RULES))
    if file := nanochat_original.find_nanochat(folder):
        config, tensors = nanochat_original.read_nanochat(file)
        notes = []
        if any(folder.glob("*.pkl")):
            notes.append("its tokenizer is a pickle, which is not read: the result has none")
        ours = to_ours(tensors, config, nanochat_original.RULES)
        return Checkpoint(folder, "nanochat-original", config, ours, notes=notes)
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if model_type == "tessera":
        config = read_config(folder / "config.json")
        tensors, notes = _clean(open_safetensors(folder), config)
        return Checkpoint(folder, "tessera", config, to_ours(tensors, config, TESSERA_RULES), notes=notes)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'} is of model type {model_type!r}; known are tessera, "
            f"{', '.join(FAMILIES)}, the native layout and nanochat's own checkpoints"
        )
    family = FAMILIES[model_type]
    config = family.config_from(values)
    tensors, notes = _clean(open_safetensors(folder), config, family)
    ours = to_ours(tensors, config, family.rules_for(tensors))
    return Checkpoint(folder, model_type, config, ours, family, notes)


def _clean(
    tensors: Mapping[str, torch.Tensor], config: TesseraConfig, family: Family | None = None
) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """Leaves out what is no weight of the model, and gives the base model's tensors their prefix.

    The configuration comes to claim the layers for multi-token prediction that are there; many a release says
    that it has some and leaves them out.
    """
    prefix = "model." if family is None else family.prefix
    bare = not any(name.startswith(prefix) for name in tensors)
    names, predictors, depth = {}, 0, config.num_hidden_layers
    if family is not None and family.predicts_ahead:
        found = (re.search(r"layers\.(\d+)\.eh_proj\.", name) for name in tensors)
        there = {int(match[1]) for match in found if match}
        if not there.issuperset(range(depth, depth + config.num_mtp_layers)):
            config.num_mtp_layers, config.mtp_mlp_layer_types = 0, None
    held = depth + config.num_mtp_layers
    for name in tensors:
        full = prefix + name if bare and name != "lm_head.weight" else name
        if family is not None and any(re.fullmatch(pattern, full) for pattern in family.ignored):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", full)
        if family is not None and family.predicts_ahead and layer and int(layer[1]) >= depth:
            if full.endswith(_SHARED_BY_PREDICTORS):
                continue
            if int(layer[1]) >= held:
                predictors += 1
                continue
        names[full] = name
    notes = [f"{predictors} tensors of multi-token prediction are left out"] if predictors else []
    if config.tie_word_embeddings and "lm_head.weight" in names:
        embedding = "transformer.wte.weight" if prefix == "transformer." else "model.embed_tokens.weight"
        if embedding in names and not torch.equal(
            tensors[names["lm_head.weight"]], tensors[names[embedding]]
        ):
            raise ValueError("lm_head.weight differs from the embedding that tie_word_embeddings makes it")
        del names["lm_head.weight"]
    return Renamed(tensors, names), notes

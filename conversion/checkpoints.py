"""A checkpoint on disk, whatever wrote it: its configuration, and its tensors under Tessera's names.

What belongs here: what every way in gives and every way out takes. The ways in are listed in `sources.py`,
the ways out in `targets.py`.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig

from .families import Family
from .fp8_checkpoints import BlockScaled

# What comes with weights, to be taken along as it is: names in full, of files and never of folders.
SIDE_FILES = re.compile(
    r"tokenizer\.(json|model)|tokenizer_(config|meta)\.json|chat_template\.(jinja|json)"
    r"|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|tekken\.json|generation_config\.json"
)
# Where a tokenizer with several chat templates has all but the first.
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer that a checkpoint has in another form than transformers, if there is one that can be read.

    Attributes:
        write: writes it into a directory.
        bos_token_id, eos_token_id: what begins a text, and at what generation stops.
        notes: what to say of it, in sentences.
    """

    write: Callable[[Path], None] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: where it is; a file, for a format of one file.
        kind: `tessera`, `native`, another source's name or a family's model type.
        config: as Tessera has it.
        tensors: under Tessera's names, read when asked for.
        family: its family in transformers, if it is of one.
        notes: what was left out, in sentences.
        fp8: what it has in FP8; its tensors are out of it.
        write_tokenizer: writes tokenizer files into a directory, for a format that has them in another form.
    """

    folder: Path
    kind: str
    config: TesseraConfig
    tensors: Mapping[str, torch.Tensor]
    family: Family | None = None
    notes: list[str] = field(default_factory=list)
    write_tokenizer: Callable[[Path], None] | None = None
    fp8: BlockScaled | None = None

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, chat templates and generation settings beside the weights, as they will stay."""
        if not self.folder.is_dir():
            return []
        found = sorted(p for p in self.folder.iterdir() if p.is_file() and SIDE_FILES.fullmatch(p.name))
        found += sorted((self.folder / TEMPLATES).glob("*.jinja"))
        other_form = self.write_tokenizer is not None
        return [p for p in found if not (other_form and p.name.startswith("tokenizer"))]

    def copy_side_files(self, folder: Path) -> None:
        """Brings tokenizer, chat templates and generation settings into another directory."""
        for file in self.side_files:
            copy = folder / file.relative_to(self.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        if self.write_tokenizer is not None:
            self.write_tokenizer(folder)

"""From what a run is told to what it reads: a configuration, a tokenizer that fits, two streams of tokens.

What belongs here: reading `--config`, `--tokenizer` and `--data`, and whether they go together; the model
that follows from them.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from tessera.configs.presets import scale_to_depth
from tessera.configs.recipes import read_yaml
from tessera.configs.resolve import resolve_config
from tessera.conversion.model_args import config_from_model_args, is_model_args
from tessera.data.corpora import PreparedCorpus, meaning_of, open_folders
from tessera.data.hub_errors import TOKENIZER_FILES, why_missing
from tessera.data.mixing import parse_source
from tessera.data.sources import read_documents
from tessera.data.text import Tokens, split_documents
from tessera.data.token_files import is_prepared
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence, load_model, read_config, read_json
from tessera.modeling.modeling_tessera import TesseraForCausalLM
from tessera.tokenization import build_byte_tokenizer

from .pipeline_names import model_in_our_words
from .pretrain_arguments import PretrainArguments

TOKENIZER_META = "tokenizer_meta.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Corpus:
    """What a run reads, or one of the corpora that it mixes.

    Attributes:
        tokenizer: of the tokens.
        source: the directory it came from, if it came from one.
        train, val: the two streams; memory-mapped where they were prepared.
        written_hash: sha256 of the training tokens, where it was written down with them.
        name: what its figures are called in a mixture.
        folder: where prepared tokens are.
        weight: share of the rows, relative to other corpora; None where it is alone.
    """

    tokenizer: object
    source: Path | None
    train: Tokens
    val: Tokens
    written_hash: str | None = None
    name: str = ""
    folder: str | None = None
    weight: float | None = None

    @cached_property
    def train_hash(self) -> str:
        """sha256 that says which tokens these are; hashed once, of prepared tokens read from their notes."""
        return self.written_hash or hashlib.sha256(np.ascontiguousarray(self.train.ids)).hexdigest()

    @property
    def tokenizer_meta(self) -> Path | None:
        """The notes on the tokenizer that transformers does not copy with it."""
        path = self.source and self.source / TOKENIZER_META
        return path if path and path.is_file() else None


def open_corpora(
    data: str | list[str],
    tokenizer: str | None,
    config: TesseraConfig,
    follow: bool,
    documents: bool = False,
) -> tuple[list[Corpus], TesseraConfig]:
    """The tokens of a run and the configuration whose vocabulary fits them.

    Args:
        data: a folder of prepared tokens, a text file, or a folder of text files; or several folders of
            prepared tokens, each `folder:weight`.
        tokenizer: directory or Hub name; that of prepared tokens, or bytes for text, if not given.
        config: of the model.
        follow: whether the model's vocabulary may become the tokenizer's.
        documents: whether it must be known where documents start.

    Raises:
        ValueError: if one of them cannot be read, they do not fit each other, or there is too little text.
    """
    if isinstance(data, list) and len(data) > 1:
        return _open_tokens(open_folders(data, documents), tokenizer, config, follow)
    data = data[0] if isinstance(data, list) else data
    if Path(data).suffix == ".bin" and is_prepared(Path(data).parent):
        raise ValueError(f"{data} is part of the prepared tokens in {Path(data).parent}; give that folder")
    if is_prepared(parse_source(data).source):  # a weight says nothing of one alone
        return _open_tokens(open_folders([data], documents), tokenizer, config, follow)
    loaded, source = load_tokenizer(tokenizer)
    config = fit_vocabulary(config, loaded, tokenizer, follow)
    train, val = split_documents(read_documents(data))
    if not val:
        raise ValueError(f"{data} leaves no text for validation; give more of it")
    corpus = Corpus(loaded, source, encode(loaded, train), encode(loaded, val), name=Path(data).stem)
    if len(corpus.val.ids) < 2:
        raise ValueError(f"{data} is too short: its last tenth is for validation")
    return [corpus], config


def _open_tokens(
    prepared: list[PreparedCorpus], given: str | None, config: TesseraConfig, follow: bool
) -> tuple[list[Corpus], TesseraConfig]:
    own = prepared[0].data.tokenizer and str(prepared[0].data.tokenizer)
    tokenizer, source = load_tokenizer(own)
    if given is not None:
        theirs, tokenizer = tokenizer, load_tokenizer(given)[0]
        if meaning_of(theirs) != meaning_of(tokenizer):
            raise ValueError(
                f"{prepared[0].folder} was encoded with another tokenizer than {given}; leave --tokenizer "
                "out, or prepare the text with that one"
            )
        source = Path(given) if Path(given).is_dir() else None
    config = fit_vocabulary(config, tokenizer, given or own, follow)
    corpora = []
    for one in prepared:
        for ids in (one.data.train.ids, one.data.val.ids):
            _require_ids_below(config.vocab_size, ids, one.folder)
        written = (one.data.meta.get("sha256") or {}).get("train.bin")
        corpora.append(
            Corpus(tokenizer, source, one.train, one.data.val, written, one.name, one.folder, one.weight)
        )
    return corpora, config


def _require_ids_below(size: int, ids: np.ndarray, data: str) -> None:
    """Looks at 256 places, evenly spread: an id that the model does not have would end the run in mid-air."""
    block = 2**12
    for start in range(0, len(ids), max(len(ids) // 256, block)):
        if (found := int(ids[start : start + block].max())) >= size:
            raise ValueError(f"{data} holds the token {found}, beyond the model's vocabulary of {size}")


def read_model_config(given: str, depth: int | None = None) -> tuple[TesseraConfig, bool]:
    """The configuration that `--config` means, and whether it is a preset, whose vocabulary is anybody's.

    Args:
        given: a preset, a Tessera or ByteGPT JSON file, a directory, or a YAML file in the names of Hugging
            Face's Llama or in Tessera's, whose `preset` or `base` names the preset that lies under it.
        depth: layers, by which the depth rule scales all sizes.

    Raises:
        ValueError: if it is none of them, does not validate, or the depth rule does not fit it.
    """
    path = Path(given)
    if depth is not None:
        config, is_preset = read_model_config(given)
        if is_preset:
            return resolve_config(given, depth=depth), True
        try:
            return TesseraConfig.from_dict(scale_to_depth(config.to_dict(), depth)), False
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"--config {given}: {first_sentence(error)}") from error
    if path.suffix not in (".yaml", ".yml"):
        return resolve_config(given), not (path.exists() or path.suffix == ".json")
    values = read_yaml(path)
    try:
        if is_model_args(values):
            return config_from_model_args(values), False
        values = model_in_our_words(values, given)
        preset = values.pop("preset", None)
        if preset is not None:
            return TesseraConfig.from_preset(str(preset), **values), False
        return TesseraConfig(**values), False
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"--config {given}: {first_sentence(error)}") from error


def row_length(args: PretrainArguments, config: TesseraConfig) -> int:
    """Positions in a row: what was asked for, else the model's context, at most 1024.

    Raises:
        ValueError: if the model has no such context.
    """
    context = config.max_position_embeddings
    length = args.sequence_length or min(context, 1024)
    if length > context:
        raise ValueError(
            f"sequence_length {length} is longer than the model's context of {context} positions"
        )
    return length


def adopt_vocabulary(config: TesseraConfig, weights: Path) -> TesseraConfig:
    """A preset's configuration with the vocabulary that a run gave to weights of that preset."""
    file = weights / "config.json"
    values = read_json(file) if file.is_file() else {}
    if values.get("model_type") != config.model_type:
        return config
    theirs = read_config(file)
    names = ("vocab_size", "padded_vocab_size", *SPECIAL_IDS)
    return TesseraConfig.from_dict({**config.to_dict(), **{name: getattr(theirs, name) for name in names}})


def load_tokenizer(given: str | None) -> tuple[object, Path | None]:
    """The tokenizer of a run, and the directory that it came from; bytes if none is given.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if given is None:
        return build_byte_tokenizer(), None
    if reason := why_missing(given, TOKENIZER_FILES):
        raise ValueError(f"tokenizer {given} cannot be loaded: {reason}")
    try:
        return AutoTokenizer.from_pretrained(given), Path(given) if Path(given).is_dir() else None
    except Exception as error:  # tokenizers raises nothing narrower for a broken file
        reason = str(error).splitlines()[0]
        if Path(given).is_dir():
            reason = "that directory holds no tokenizer that transformers can read"
        raise ValueError(f"tokenizer {given} cannot be loaded: {reason}") from error


def fit_vocabulary(config: TesseraConfig, tokenizer, given: str | None, follow: bool) -> TesseraConfig:
    """The configuration with the tokenizer's vocabulary and special tokens, or as it is if that fits.

    Without a tokenizer the model is one of bytes, whatever its configuration says.

    Raises:
        ValueError: if the tokenizer has more tokens than a model that may not change.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    special = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    if given is None and config.vocab_size != size:
        follow = True
    if not follow:
        if size > config.vocab_size:
            raise ValueError(
                f"tokenizer {given} has {size} tokens, the model's vocabulary only {config.vocab_size}: a "
                f"preset without weights takes the tokenizer's, a file needs vocab_size {size} or more"
            )
        return config
    values = {**config.to_dict(), **special}
    if size != config.vocab_size:
        values.update(vocab_size=size, padded_vocab_size=None)
    return TesseraConfig.from_dict(values)


def encode(tokenizer, documents: list[bytes]) -> Tokens:
    """All documents as one stream; an end-of-text token, or a line break for bytes, stands between them."""
    num_bytes = sum(map(len, documents)) + len(documents) - 1
    eos = tokenizer.eos_token_id
    # Bytes are their own ids, whatever they say; for other tokenizers a text that spells a control token is
    # text.
    encode_one = getattr(tokenizer, "encode_bytes", None) or (
        lambda document: tokenizer(
            document.decode("utf-8", errors="replace"),
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
    )
    between = np.asarray(encode_one(b"\n") if eos is None else [eos], dtype=np.uint32)
    parts, starts = [], [0]
    for document in documents:
        parts += [np.asarray(encode_one(document), dtype=np.uint32), between]
        starts.append(starts[-1] + len(parts[-2]) + len(between))
    ids = np.concatenate(parts[:-1] if eos is None else parts)
    starts[-1] = len(ids)
    ids = ids.astype(np.uint8) if len(tokenizer) <= 256 else ids
    return Tokens(ids, num_bytes, np.array(starts, dtype=np.uint64))


def make_model(
    config: TesseraConfig, weights: Path | None, tokenizer, device: torch.device
) -> TesseraForCausalLM:
    """The model of a run in fp32, with random weights or those of a checkpoint, on any device.

    Args:
        config: of the model.
        weights: a directory or file to load, or None.
        tokenizer: whose special tokens the model generates with.
        device: that trains.
    """
    if weights is None:
        # A large model takes a minute to start on a CPU, and a moment where it will be.
        with device:
            model = TesseraForCausalLM(config)
    else:
        model = load_model(weights, config, dtype=torch.float32)
    for name in SPECIAL_IDS:
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model

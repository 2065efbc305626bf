"""Meta's consolidated layout, in: `consolidated.00.pth`, `.01.pth`, ... or `consolidated.safetensors`.

The layout of the Llama releases, and of Mistral's, whose code grew from it. One file a model-parallel rank,
and `params.json`; tensors are joined when they are asked for. What belongs here: the names, along which
dimension the ranks share each tensor, and what `params.json` says. Rotary pairs are interleaved here, and
stay so; the families of transformers that have halves get them on the way out.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import first_sentence, read_json

from .checkpoints import Checkpoint
from .meta_tokenizer import find_tokenizer
from .rules import UNSTACKED, UNSTACKED_PAIRS, Renamed, Rule, require_depth, to_ours
from .tensor_files import TensorFiles
from .torch_files import read_pt

_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "feed_forward.gate",
}
_EXPERT = "layers.{i}.feed_forward.experts.{e}"

META_RULES = [
    Rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    *(
        Rule(f"model.layers.{{i}}.{ours}.weight", f"layers.{{i}}.{theirs}.weight")
        for ours, theirs in _LAYER.items()
    ),
    Rule(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"),
        UNSTACKED_PAIRS,
    ),
    Rule("model.layers.{i}.mlp.experts.down_proj", f"{_EXPERT}.w2.weight", UNSTACKED),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "output.weight"),
]

_FILE = re.compile(r"consolidated(?:\.(\d+))?\.(pth|safetensors)")
# Computed from the configuration.
_NO_WEIGHTS = re.compile(r".*rope\.freqs")
_SPLIT = {"output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
# Of params.json: what is read, and what may stand there because it says nothing, or only this.
_READ = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps"),
    *("multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "sliding_window", "moe"),
    *("max_seq_len", "tied_embeddings", "max_batch_size", "model_parallel_size"),
)
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads")
_FURTHER_SIZES = ("head_dim", "multiple_of", "hidden_dim", "max_seq_len")
_FIXED = {"use_biases": False, "causal": True, "norm_type": "rmsnorm"}
# Llama 3.1's code, in which these four are constants.
_SCALED_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def recognises(path: Path) -> bool:
    """Whether this is a directory in Meta's layout, and not one of transformers' with such a file in it."""
    return bool(_find_files(path)) and not (path / "config.json").is_file()


def open_source(folder: Path) -> Checkpoint:
    """Opens a directory in Meta's layout, of any number of model-parallel ranks.

    Raises:
        ValueError: if files or tensors are missing, or do not fit `params.json`.
    """
    params = _read_params(folder / "params.json")
    tensors = RankFiles(_find_files(folder), params)
    if "tok_embeddings.weight" not in tensors:
        raise ValueError(f"{folder} has no tok_embeddings.weight: it is not in Meta's layout")
    require_depth(tensors, r"layers\.(\d+)\.", params["n_layers"], f"n_layers in {folder / 'params.json'}")
    try:
        config, notes = config_from_params(params, tensors)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'params.json'}: {first_sentence(error)}") from error
    tokenizer = find_tokenizer(folder, config.vocab_size, bool(params.get("use_scaled_rope")))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.dtype = tensors["tok_embeddings.weight"].dtype
    ours = to_ours(tensors, config, META_RULES)
    notes += tokenizer.notes
    return Checkpoint(folder, "meta", config, ours, notes=notes, write_tokenizer=tokenizer.write)


def _find_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))


# ---- tensors ----


class RankFiles(Mapping):
    """The tensors of all ranks together, under Meta's names, joined when asked for.

    Args:
        files: one a rank.
        params: content of `params.json`, for the sizes by which missing files are seen.

    Raises:
        ValueError: if files are missing, or a file holds anything but tensors.
    """

    def __init__(self, files: list[Path], params: dict[str, Any]):
        kinds = sorted({path.suffix for path in files})
        if len(kinds) > 1:
            raise ValueError(f"{files[0].parent} holds {' and '.join(kinds)} files; keep one kind")
        numbers = sorted(int(_FILE.fullmatch(path.name)[1] or 0) for path in files)
        missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        if missing or len(numbers) != len(set(numbers)):
            lacking = (
                f"consolidated.{missing[0]:02d}{kinds[0]}" if missing else "a rank of its own for each file"
            )
            raise ValueError(f"{files[0].parent} lacks {lacking}")
        self._files, self._heads = files, params["n_kv_heads"]
        self._ranks = [_open(path) for path in files]
        self._dim = params["dim"]
        for path, rank in zip(files, self._ranks, strict=True):
            different = set(rank) ^ set(self._ranks[0])
            if different:
                raise ValueError(f"{path} and {files[0].name} differ in {min(different)}, which one lacks")
        self._require_every_rank(params)

    def _require_every_rank(self, params: dict[str, Any]) -> None:
        """Sees by the first query that files at the end of the numbering are missing."""
        name = "layers.0.attention.wq.weight"
        if name not in self:
            return
        rows, expected = len(self._ranks[0][name]), params["n_heads"] * params["head_dim"]
        if rows * len(self._ranks) != expected and expected % rows == 0:
            raise ValueError(
                f"{self._files[0].name} has {rows} of {expected} rows of {name}: there must be "
                f"{expected // rows} files, but there are {len(self._ranks)}"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        dimension, holders = self._dimension(name), self._share(name)
        if dimension is None:
            first = self._ranks[0][name]
            if not all(torch.equal(rank[name], first) for rank in self._ranks[1:]):
                raise ValueError(f"{name} differs between ranks, which should hold the same")
            return first
        pieces = [rank[name] for rank in holders]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dimension)

    def outline(self, name: str) -> torch.Tensor:
        """A tensor without its numbers, on the meta device."""
        pieces = [torch.empty_like(rank[name], device="meta") for rank in self._share(name)]
        return torch.cat(pieces, dim=self._dimension(name) or 0)

    def _share(self, name: str) -> list[Mapping[str, torch.Tensor]]:
        """The ranks that hold the parts of a tensor."""
        world = len(self._ranks)
        if self._dimension(name) is None:
            return self._ranks[:1]
        if name.split(".")[-2] in ("wk", "wv") and world > self._heads:
            # More ranks than heads: each head is on several.
            return self._ranks[:: world // self._heads]
        return self._ranks

    def _dimension(self, name: str) -> int | None:
        if len(self._ranks) == 1:
            return None
        part = name.split(".")[-2]
        if part == "tok_embeddings":
            # Along the width until Llama 2, along the vocabulary since Llama 3.
            return 0 if self._ranks[0][name].shape[1] == self._dim else 1
        return _SPLIT.get(part)

    def __contains__(self, name: object) -> bool:
        return name in self._ranks[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])


def _open(file: Path) -> Mapping[str, torch.Tensor]:
    stored = read_pt(file) if file.suffix == ".pth" else TensorFiles([file])
    return Renamed(stored, {name: name for name in stored if not _NO_WEIGHTS.fullmatch(name)})


# ---- configuration ----


def _read_params(file: Path) -> dict[str, Any]:
    params = read_json(file)
    params = {name: value for name, value in params.items() if value is not None}
    for name, value in params.items():
        if name not in _READ and (name not in _FIXED or value != _FIXED[name]):
            raise ValueError(
                f"{file} says {name}: {value!r}, which is no part of a Llama, Mistral or Mixtral"
            )
    params.setdefault("n_kv_heads", params.get("n_heads"))
    wrong = [name for name in _SIZES if not _is_size(params.get(name))]
    if wrong:
        raise ValueError(f"{file} lacks a whole number for {', '.join(wrong)}")
    params.setdefault("head_dim", params["dim"] // params["n_heads"])
    moe = params.get("moe", {})
    if not isinstance(moe, dict):
        raise ValueError(f"{file} says moe: {moe!r}, which must have num_experts and num_experts_per_tok")
    _require(file, params, _FURTHER_SIZES, _is_size, "a whole number of at least 1")
    _require(file, params, ("sliding_window",), lambda n: type(n) is int and n >= 0, "a whole number")
    _require(file, params, ("rope_theta", "ffn_dim_multiplier"), _is_positive, "a number above 0")
    _require(file, params, ("use_scaled_rope",), lambda value: isinstance(value, bool), "true or false")
    if "moe" in params:
        per_tok = {"num_experts": None, "num_experts_per_tok": None, **moe}
        _require(
            file, per_tok, ("num_experts", "num_experts_per_tok"), _is_size, "a whole number of at least 1"
        )
    return params


def _require(
    file: Path, values: dict[str, Any], names: tuple[str, ...], fits: Callable[[Any], bool], what: str
) -> None:
    """Refuses a value that is there and does not fit."""
    for name in names:
        if name in values and not fits(values[name]):
            raise ValueError(f"{file} says {name}: {values[name]!r}, which must be {what}")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def config_from_params(
    params: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[TesseraConfig, list[str]]:
    """Tessera's configuration for the content of `params.json`.

    Args:
        params: the content, completed with `n_kv_heads` and `head_dim`.
        tensors: for what it does not say: the vocabulary, and whether the head is tied.

    Returns:
        The configuration, and what had to be assumed, in sentences.

    Raises:
        ValueError: if the sizes do not fit together or to the tensors.
    """
    rows = tensors["tok_embeddings.weight"].shape[0]
    vocabulary = params.get("vocab_size", -1)
    if vocabulary not in (-1, rows):
        raise ValueError(f"vocab_size is {vocabulary}, but tok_embeddings.weight has {rows} rows")
    depth, moe = params["n_layers"], params.get("moe")
    fields: dict[str, Any] = {}
    if params.get("sliding_window"):
        fields |= {"layer_types": ["sliding_attention"] * depth, "sliding_window": params["sliding_window"]}
    width = _inner_width(params, tensors)
    if moe:
        fields |= {
            "mlp_layer_types": ["sparse"] * depth,
            "n_routed_experts": moe["num_experts"],
            "num_experts_per_tok": moe["num_experts_per_tok"],
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
        }
    rope = {"rope_theta": params.get("rope_theta", 10000.0), "rope_type": "default"}
    if params.get("use_scaled_rope"):
        rope |= _SCALED_ROPE
    context, notes = _context(params, rows)
    config = TesseraConfig(
        **fields,
        vocab_size=rows,
        hidden_size=params["dim"],
        num_hidden_layers=depth,
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params["head_dim"],
        intermediate_size=width,
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_parameters=rope,
        rope_interleave=True,
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in tensors,
    )
    return config, notes


def _inner_width(params: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """The width of the feed-forward: as said, or by Llama's formula, or else as the tensors have it."""
    if "hidden_dim" in params:
        return params["hidden_dim"]
    if "multiple_of" in params:
        width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
        return -(-width // params["multiple_of"]) * params["multiple_of"]
    first = next((name for name in tensors if name.endswith(".w1.weight")), None)
    if first is None:
        raise ValueError("neither hidden_dim nor a tensor .w1.weight tells the width of the feed-forward")
    return tensors[first].shape[0]


def _context(params: dict[str, Any], rows: int) -> tuple[int, list[str]]:
    """The longest context, which the releases do not say: by what tells them apart."""
    if "max_seq_len" in params:
        return params["max_seq_len"], []
    if params.get("use_scaled_rope"):
        length, what = 131072, "Llama 3.1"
    elif "hidden_dim" in params:
        length, what = 32768, "Mistral"
    elif rows > 100000:
        length, what = 8192, "Llama 3"
    elif params.get("rope_theta", 10000.0) > 10000.0:
        length, what = 16384, "Code Llama"
    elif params.get("norm_eps") == 1e-6:
        length, what = 2048, "the first Llama"
    else:
        length, what = 4096, "Llama 2"
    sentence = (
        f"params.json does not say how long the context is: max_position_embeddings is {length}, as of {what}"
    )
    return length, [sentence]

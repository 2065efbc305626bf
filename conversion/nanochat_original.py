"""Checkpoints of nanochat's own code, both ways: `model_<step>.pt` and `meta_<step>.json`.

Two architectures: that of July 2026, and that of October 2025, which has neither residual scalars, value
embeddings, smear nor backout; transformers' NanoChat is of October too. The names of the tensors tell which
one a file holds. What belongs here: those names, the fields of the description, and the files. The tokenizer
beside them has a room of its own, `nanochat_tokenizer.py`.

nanochat loads `.pt` alone, so here a pickle is written, the only one in this package: a dictionary of plain
tensors, which `torch.load(..., weights_only=True)` reads. It is also how the files are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_json

from .checkpoints import Checkpoint
from .equivalents import pair_halves
from .families import architecture
from .nanochat_tokenizer import find_tokenizer
from .rules import VECTOR, Changed, Renamed, Rule, name_some, require_depth, to_ours, to_theirs
from .torch_files import read_pt, write_pt

Tensors = Mapping[str, torch.Tensor]

_ATTENTION = {
    "q_proj": "c_q",
    "k_proj": "c_k",
    "v_proj": "c_v",
    "o_proj": "c_proj",
    "value_gate": "ve_gate",
}

RULES = [
    Rule("model.embed_tokens.weight", "transformer.wte.weight"),
    *(
        Rule(f"model.layers.{{i}}.self_attn.{ours}.weight", f"transformer.h.{{i}}.attn.{theirs}.weight")
        for ours, theirs in _ATTENTION.items()
    ),
    Rule("model.layers.{i}.self_attn.value_embed.weight", "value_embeds.{i}.weight"),
    Rule("model.layers.{i}.mlp.up_proj.weight", "transformer.h.{i}.mlp.c_fc.weight"),
    Rule("model.layers.{i}.mlp.down_proj.weight", "transformer.h.{i}.mlp.c_proj.weight"),
    Rule("model.layers.{i}.residual_scale", "resid_lambdas", VECTOR),
    Rule("model.layers.{i}.embedding_scale", "x0_lambdas", VECTOR),
    Rule("model.smear.gate.weight", "smear_gate.weight"),
    Rule("model.smear.strength", "smear_lambda"),
    Rule("model.backout_scale", "backout_lambda"),
    Rule("lm_head.weight", "lm_head.weight"),
]

_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
# What only July has; the second line came in between.
_JULY = ("smear_gate.weight", "smear_lambda", "backout_lambda")
_AFTER_OCTOBER = ("resid_lambdas", "x0_lambdas", "value_embeds.", ".attn.ve_gate.")
_EMBEDDINGS = re.compile(r"transformer\.wte\.weight|value_embeds\.\d+\.weight")
_VOCABULARY_ROWS = ("embed_tokens.weight", "lm_head.weight", "value_embed.weight")


@dataclass(frozen=True)
class Architecture:
    """One of nanochat's architectures.

    Attributes:
        name: kind of checkpoint, and the name on the command line.
        fields: of Tessera, over those of the preset, which is July's.
        windows: whether `model_config` has a `window_pattern`.
        rows: what the rows of the embedding are a multiple of.
    """

    name: str
    fields: Mapping[str, object]
    windows: bool
    rows: int


JULY = Architecture("nanochat-original", {}, windows=True, rows=64)
OCTOBER = Architecture(
    "nanochat-2025",
    {
        "qk_norm_scale": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "value_embedding_interval": None,
        "residual_scalars": False,
        "smear": False,
        "backout": False,
    },
    windows=False,
    rows=1,
)
ARCHITECTURES = (JULY, OCTOBER)


# ---- in ----


def recognises(path: Path) -> bool:
    """Whether this is a directory with nanochat's own checkpoints."""
    return find_nanochat(path) is not None


def open_source(folder: Path) -> Checkpoint:
    """Opens the newest checkpoint of a directory.

    Raises:
        ValueError: if it cannot be read, or does not fit its description.
    """
    kind, config, tensors = read_nanochat(find_nanochat(folder))
    tokenizer = find_tokenizer(folder, config.vocab_size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    ours = to_ours(tensors, config, RULES)
    return Checkpoint(folder, kind.name, config, ours, notes=tokenizer.notes, write_tokenizer=tokenizer.write)


def find_nanochat(folder: Path) -> Path | None:
    """The newest `model_<step>.pt` of a directory, if there is one."""
    steps = {path for path in folder.glob("model_*.pt") if re.fullmatch(r"model_\d+\.pt", path.name)}
    return max(steps, key=lambda path: int(path.stem.removeprefix("model_")), default=None)


def read_nanochat(file: Path) -> tuple[Architecture, TesseraConfig, Tensors]:
    """Reads a checkpoint.

    What nanochat's loader adds to older files is added here too: full attention where there is no window
    pattern, and residual scalars without effect.

    Returns:
        Which architecture it is, its configuration, and its tensors under nanochat's names in one dtype: the
        embeddings, which nanochat keeps in bf16, come out in that of the matrices, exactly.

    Raises:
        ValueError: if the file holds more than tensors, is of neither architecture, or the description beside
            it is missing or lacks a size.
    """
    meta = file.with_name(file.stem.replace("model_", "meta_") + ".json")
    args = read_json(meta).get("model_config")
    wrong = [name for name in _SIZES if not isinstance(args, dict) or type(args.get(name)) is not int]
    if wrong:
        raise ValueError(f"{meta}: model_config lacks {', '.join(wrong)}")
    others = sorted(set(args) - {*_SIZES, "window_pattern"})
    if others:
        raise ValueError(f"{meta}: model_config has {', '.join(others)}, which neither architecture knows")
    if any(args[name] < 1 for name in _SIZES):
        raise ValueError(f"{meta}: the sizes of model_config must be at least 1, got {args}")
    stored = read_pt(file)
    # Compiled models were saved with a prefix.
    names = {name.removeprefix("_orig_mod."): name for name in stored}
    if "transformer.wte.weight" not in names:
        raise ValueError(f"{file} is not a nanochat model: it has no transformer.wte.weight")
    kind = _find_architecture(list(names), file)
    require_depth(names, r"transformer\.h\.(\d+)\.", args["n_layer"], f"n_layer in {meta}")
    tensors: Tensors = Renamed(stored, names)
    if kind is JULY:
        depth = args["n_layer"]
        neutral = {"resid_lambdas": torch.ones(depth), "x0_lambdas": torch.zeros(depth)}
        tensors = {**neutral, **tensors}
    dtypes = {tensors[name].dtype for name in tensors}
    dtype = torch.float32 if len(dtypes) > 1 else dtypes.pop()
    config = config_from_args(args, kind, padded_vocab_size=tensors["transformer.wte.weight"].shape[0])
    config.dtype = dtype
    return kind, config, Changed(tensors, lambda name, tensor: tensor.to(dtype))


def _find_architecture(names: list[str], file: Path) -> Architecture:
    if any(name in names for name in _JULY):
        return JULY
    later = [name for name in names if any(part in name for part in _AFTER_OCTOBER)]
    if later:
        raise ValueError(
            f"{file} is of a nanochat between the two that are read: it has {name_some(later)}, which came "
            f"after October 2025, and no {_JULY[1]}, which July 2026 has"
        )
    return OCTOBER


def config_from_args(args: dict, kind: Architecture, padded_vocab_size: int) -> TesseraConfig:
    """Tessera's configuration for a `model_config`.

    Args:
        args: its content.
        kind: the architecture.
        padded_vocab_size: rows of the embedding, which it does not say.

    Raises:
        ValueError: if its fields do not fit together.
    """
    width, heads, context = args["n_embd"], args["n_head"], args["sequence_len"]
    if width % heads:
        raise ValueError(f"model_config: n_embd ({width}) must be a multiple of n_head ({heads})")
    # A quarter of the context, rounded up to a multiple of 128. Theirs counts the tokens to the left, ours
    # the current one too.
    window = -(-context // 4 // 128) * 128 + 1
    return TesseraConfig.from_preset(
        "nanochat-d12",
        **{
            **kind.fields,
            "vocab_size": args["vocab_size"],
            "padded_vocab_size": padded_vocab_size,
            "hidden_size": width,
            "num_hidden_layers": args["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": args["n_kv_head"],
            "head_dim": width // heads,
            "intermediate_size": 4 * width,
            "layer_types": _expand(args.get("window_pattern", "L"), args["n_layer"]),
            "sliding_window": window,
            "max_position_embeddings": context,
        },
    )


def _expand(pattern: str, depth: int) -> list[str]:
    """Spells a window pattern out. The last layer is full whatever its letter is."""
    letters = pattern.upper() if isinstance(pattern, str) else ""
    if not letters or set(letters) - set("SL"):
        raise ValueError(f"model_config: window_pattern must consist of S and L, got {pattern!r}")
    tiled = [letters[i % len(letters)] for i in range(depth)]
    kinds = ["full_attention" if letter == "L" else "sliding_attention" for letter in tiled]
    return [*kinds[:-1], "full_attention"]


# ---- out ----


def prepare_nanochat(
    config: TesseraConfig, tensors: Tensors, kind: Architecture
) -> tuple[TesseraConfig, Tensors]:
    """The same model with as many rows of embedding and head as nanochat makes.

    Raises:
        ValueError: naming the fields that the architecture has no place for.
    """
    config, tensors = pair_halves(config, tensors)
    vocabulary = config.vocab_size
    rows = -(-vocabulary // kind.rows) * kind.rows
    if config.padded_vocab_size != rows:
        config.padded_vocab_size = rows

        def fit(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if not name.endswith(_VOCABULARY_ROWS):
                return tensor
            return F.pad(tensor[:rows], (0, 0, 0, max(0, rows - tensor.shape[0])))

        tensors = Changed(tensors, fit)
    args_for(config, kind)
    return config, tensors


def args_for(config: TesseraConfig, kind: Architecture) -> dict[str, int | str]:
    """The `model_config` of a Tessera model.

    Raises:
        ValueError: naming the fields that the architecture has no place for.
    """
    args: dict[str, int | str] = {
        "sequence_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
    }
    if kind.windows:
        args["window_pattern"] = _shorten(config.layer_types)
    try:
        back = config_from_args(args, kind, config.padded_vocab_size)
    except ValueError as error:
        raise ValueError(f"the model cannot be a {kind.name}: {error}") from error
    mine, theirs = architecture(config), architecture(back)
    obstacles = [
        f"{name} is {mine[name]!r} (there: {theirs[name]!r})"
        for name in sorted(mine.keys() & theirs.keys())
        if mine[name] != theirs[name]
    ]
    if obstacles:
        raise ValueError(f"the model cannot be a {kind.name}: {'; '.join(obstacles)}")
    return args


def _shorten(layer_types: list[str]) -> str:
    """A window pattern of these layers: nanochat's own if it fits, else the shortest."""
    letters = "".join("L" if kind == "full_attention" else "S" for kind in layer_types)
    tiles = [letters[: length + 1] for length in range(len(letters))]
    candidates = ["L", "SSSL", *(tile for tile in tiles if "L" in tile)]
    return next((tile for tile in candidates if _expand(tile, len(letters)) == list(layer_types)), letters)


def write_nanochat(folder: Path, config: TesseraConfig, tensors: Tensors, kind: Architecture) -> None:
    """Writes `model_000000.pt` and its description. All tensors are in memory together, as nanochat has them.

    The embeddings are bf16, as nanochat keeps them, if that is all that is in them: if every one of them is
    fp32 and exactly representable. Whatever else there is stays as it is.

    Raises:
        ValueError: if the architecture has no place for something.
    """
    args = args_for(config, kind)
    theirs = to_theirs(tensors, config, RULES)
    state = {name: theirs[name].clone(memory_format=torch.contiguous_format) for name in theirs}
    embeddings = [name for name in state if _EMBEDDINGS.fullmatch(name)]
    if all(_is_bfloat16(state[name]) for name in embeddings):
        state.update({name: state[name].bfloat16() for name in embeddings})
    write_pt(folder / "model_000000.pt", state)
    meta = {"step": 0, "model_config": args, "user_config": {}}
    (folder / "meta_000000.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and torch.equal(tensor.bfloat16().float(), tensor)

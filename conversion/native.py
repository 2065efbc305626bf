"""The native layout: the tensor names of the DeepSeek and Meta inference releases, one file a rank.

A directory holds `model{rank}-mp{world}.safetensors` for each model-parallel rank, `params.json` with the
sizes in the releases' own words, and Tessera's `config.json`, from which it is read back exactly. What
belongs here: the names, how each tensor is split over ranks, and the files. Split along the first dimension
are the rows of vocabulary, of heads and of the feed-forward's width; along the second, what those multiply
into the residual stream; routed experts go whole, in contiguous ranges; everything else is on every rank.

Names beyond the releases', for the tiles that they do not have: `pos_embed` (learned positions),
`embed_norm`, `attn.q_head_norm`, `attn.k_head_norm` (QK norm), `attn.value_embed`, `attn.value_gate`,
`residual_scale`, `embedding_scale`, `smear.gate`, `smear.strength`, `backout_scale`; biases are `.bias`
beside their `.weight`. A feed-forward without gate has `w2` and `w3`. A head that is tied to the embedding
is not stored.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_config, read_json

from .checkpoints import Checkpoint
from .journal import Journal
from .model_args import config_from_model_args, model_args_from_config
from .outlines import outline
from .rules import UNSTACKED, UNSTACKED_PAIRS, Rule, to_ours, to_theirs
from .tensor_files import TensorFiles
from .weight_writer import WeightWriter

_LAYER = (
    ("input_layernorm.{p}", "attn_norm.{p}"),
    ("post_attention_layernorm.{p}", "ffn_norm.{p}"),
    ("self_attn.q_proj.{p}", "attn.wq.{p}"),
    ("self_attn.k_proj.{p}", "attn.wk.{p}"),
    ("self_attn.v_proj.{p}", "attn.wv.{p}"),
    ("self_attn.o_proj.{p}", "attn.wo.{p}"),
    ("self_attn.q_norm.weight", "attn.q_head_norm.weight"),
    ("self_attn.k_norm.weight", "attn.k_head_norm.weight"),
    ("self_attn.q_a_proj.{p}", "attn.wq_a.{p}"),
    ("self_attn.q_a_layernorm.{p}", "attn.q_norm.{p}"),
    ("self_attn.q_b_proj.weight", "attn.wq_b.weight"),
    ("self_attn.kv_a_proj_with_mqa.{p}", "attn.wkv_a.{p}"),
    ("self_attn.kv_a_layernorm.{p}", "attn.kv_norm.{p}"),
    ("self_attn.kv_b_proj.weight", "attn.wkv_b.weight"),
    ("self_attn.value_embed.weight", "attn.value_embed.weight"),
    ("self_attn.value_gate.weight", "attn.value_gate.weight"),
    ("mlp.gate_proj.{p}", "ffn.w1.{p}"),
    ("mlp.down_proj.{p}", "ffn.w2.{p}"),
    ("mlp.up_proj.{p}", "ffn.w3.{p}"),
    ("mlp.gate.weight", "ffn.gate.weight"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared_experts.w1.weight"),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared_experts.w2.weight"),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared_experts.w3.weight"),
    ("residual_scale", "residual_scale"),
    ("embedding_scale", "embedding_scale"),
)
_EXPERTS = "layers.{i}.ffn.experts.{e}"

RULES = [
    Rule("model.embed_tokens.weight", "embed.weight"),
    Rule("model.embed_positions.weight", "pos_embed.weight"),
    Rule("model.embed_norm.{p}", "embed_norm.{p}"),
    Rule("model.smear.{rest}", "smear.{rest}"),
    *(Rule(f"model.layers.{{i}}.{ours}", f"layers.{{i}}.{theirs}") for ours, theirs in _LAYER),
    Rule(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        (f"{_EXPERTS}.w1.weight", f"{_EXPERTS}.w3.weight"),
        UNSTACKED_PAIRS,
    ),
    Rule("model.layers.{i}.mlp.experts.up_proj", f"{_EXPERTS}.w3.weight", UNSTACKED),
    Rule("model.layers.{i}.mlp.experts.down_proj", f"{_EXPERTS}.w2.weight", UNSTACKED),
    Rule("model.norm.{p}", "norm.{p}"),
    Rule("model.backout_scale", "backout_scale"),
    Rule("lm_head.weight", "head.weight"),
]

# The dimension along which ranks share a tensor, by the last two parts of its name.
SPLIT = {
    **dict.fromkeys(("embed.weight", "head.weight", "wq_b.weight", "wkv_b.weight", "value_gate.weight"), 0),
    **{f"{name}.{kind}": 0 for name in ("wq", "wk", "wv", "w1", "w3") for kind in ("weight", "bias")},
    **dict.fromkeys(("wo.weight", "w2.weight", "value_embed.weight"), 1),
}

_RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_EXPERT = re.compile(r".*\.ffn\.experts\.(\d+)\..*")


def recognises(path: Path) -> bool:
    """Whether this is a directory in the native layout."""
    return any(_RANK_FILE.fullmatch(file.name) for file in path.glob("model*.safetensors"))


def open_source(folder: Path) -> Checkpoint:
    """Opens a directory in the native layout, of any number of ranks.

    Raises:
        ValueError: if ranks or tensors are missing, or do not fit the configuration.
    """
    tensors = RankFiles(folder)
    config = read_native_config(folder, tensors)
    return Checkpoint(folder, "native", config, to_ours(tensors, config, RULES))


def split_dimension(name: str) -> int | None:
    """The dimension along which ranks share the tensor of this native name; None where each has all of it."""
    return SPLIT.get(".".join(name.split(".")[-2:]))


def check_world(config: TesseraConfig, world: int) -> None:
    """Refuses a number of ranks that heads, experts or rows cannot be shared among.

    Raises:
        ValueError: naming what does not divide.
    """
    if world < 1:
        raise ValueError(f"mp must be at least 1, got {world}")
    shared = {
        "num_attention_heads": config.num_attention_heads,
        "padded_vocab_size": config.padded_vocab_size,
    }
    if config.attention_type == "multi_head":
        shared["num_key_value_heads"] = config.num_key_value_heads
    if "dense" in config.mlp_layer_types:
        shared["intermediate_size"] = config.intermediate_size
    if "sparse" in config.mlp_layer_types:
        shared["n_routed_experts"] = config.n_routed_experts
        if config.n_shared_experts:
            shared["the shared experts' width"] = config.n_shared_experts * config.moe_intermediate_size
    wrong = [f"{name} ({count})" for name, count in shared.items() if count % world]
    if wrong:
        raise ValueError(f"mp {world} does not divide {', '.join(wrong)}")


def rank_files(
    config: TesseraConfig, tensors: Mapping[str, torch.Tensor], world: int
) -> dict[str, dict[str, torch.Tensor]]:
    """What each rank's file holds: name of the file -> native name -> tensor on the meta device.

    Raises:
        ValueError: if the model cannot be shared among that many.
    """
    check_world(config, world)
    native = to_theirs(tensors, config, RULES)
    files = {f"model{rank}-mp{world}.safetensors": {} for rank in range(world)}
    for name in native:
        meta = outline(native, name)
        for rank, held in enumerate(files.values()):
            if _holds(config, name, rank, world):
                held[name] = take_share(name, meta, rank, world)
    return files


def write_native(
    folder: Path,
    config: TesseraConfig,
    tensors: Mapping[str, torch.Tensor],
    world: int,
    journal: Journal | None = None,
) -> None:
    """Writes one file a rank, and `params.json`. All files grow together, so each tensor is computed once.

    Args:
        folder: an existing directory.
        config: of the model.
        tensors: under Tessera's names.
        world: model-parallel ranks.
        journal: of what is written already.

    Raises:
        ValueError: if the model cannot be shared among that many.
        OSError: if there is no room, or a file cannot be written.
    """
    files = rank_files(config, tensors, world)
    native = to_theirs(tensors, config, RULES)
    with WeightWriter(folder, files, journal) as writer:
        for name in native:
            ranks = {rank: file for rank, file in enumerate(files) if name in files[file]}
            if all(writer.is_written(file, name) for file in ranks.values()):
                continue
            tensor = native[name]
            for rank, file in ranks.items():
                writer.write(file, name, take_share(name, tensor, rank, world))
    params = json.dumps(model_args_from_config(config), indent=2)
    (folder / "params.json").write_text(params + "\n", encoding="utf-8")


def _holds(config: TesseraConfig, name: str, rank: int, world: int) -> bool:
    """Whether a rank has a tensor, or a share of it; of the routed experts each has a range."""
    expert = _EXPERT.fullmatch(name)
    return expert is None or int(expert[1]) * world // config.n_routed_experts == rank


def take_share(name: str, tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """What one rank holds of a tensor; of a routed expert, all."""
    dimension = split_dimension(name)
    if dimension is None or _EXPERT.fullmatch(name):
        return tensor
    return tensor.chunk(world, dim=dimension)[rank]


class RankFiles(Mapping):
    """The native tensors of all ranks together, joined when asked for.

    Args:
        folder: directory in the native layout.

    Raises:
        ValueError: if ranks are missing or there are several sets of them.
    """

    def __init__(self, folder: Path):
        found = {}
        for path in folder.glob("model*.safetensors"):
            if match := _RANK_FILE.fullmatch(path.name):
                found[int(match[2]), int(match[1])] = path
        worlds = sorted({world for world, _ in found})
        if len(worlds) != 1:
            raise ValueError(
                f"{folder} holds files of {' and of '.join(map(str, worlds))} ranks; keep one set"
            )
        self.world = worlds[0]
        missing = [rank for rank in range(self.world) if (self.world, rank) not in found]
        if missing or len(found) != self.world:
            raise ValueError(f"{folder} lacks the files of ranks {missing} of {self.world}")
        self._folder = folder
        self._ranks = [TensorFiles([found[self.world, rank]]) for rank in range(self.world)]
        self._names = dict.fromkeys(name for rank in self._ranks for name in rank)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._join(name, [rank[name] for rank in self._ranks if name in rank])

    def outline(self, name: str) -> torch.Tensor:
        """The tensor without its numbers, on the meta device."""
        return self._join(name, [rank.outline(name) for rank in self._ranks if name in rank])

    def _join(self, name: str, pieces: list[torch.Tensor]) -> torch.Tensor:
        if _EXPERT.fullmatch(name):
            if len(pieces) != 1:
                raise ValueError(f"{self._folder}: {len(pieces)} ranks hold {name}, not one")
            return pieces[0]
        if len(pieces) != self.world:
            raise ValueError(f"{self._folder}: only {len(pieces)} of {self.world} ranks hold {name}")
        dimension = split_dimension(name)
        if dimension is not None:
            return torch.cat(pieces, dim=dimension)
        if pieces[0].is_meta:
            return pieces[0]
        if not all(torch.equal(piece, pieces[0]) for piece in pieces):
            raise ValueError(f"{self._folder}: {name} differs between ranks, which should hold the same")
        return pieces[0]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_native_config(folder: Path, tensors: Mapping[str, torch.Tensor]) -> TesseraConfig:
    """The configuration of a directory in the native layout: `config.json`, or else `params.json`.

    Raises:
        ValueError: if there is neither, or it cannot be read.
    """
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json")
    if not (folder / "params.json").is_file():
        raise ValueError(f"{folder} has neither config.json nor params.json, which say what the model is")
    # What the file cannot say, the tensors do.
    overrides = {"tie_word_embeddings": "head.weight" not in tensors}
    if any(name.endswith(".ffn.gate.bias") for name in tensors):
        overrides["router_correction_bias"] = True
    args = read_json(folder / "params.json")
    try:
        return config_from_model_args(args, **overrides)
    except ValueError as error:
        raise ValueError(f"{folder / 'params.json'}: {error}") from error

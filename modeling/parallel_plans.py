"""Plans for transformers' distributed engine: which tensor of which tile is split, and in what style.

A plan is a table from module names (a star for the layer number) to styles that transformers defines; the
engine cuts the tensors while it reads the checkpoint, and puts the collectives around the modules. One
configuration class covers every dialect, so a plan is the union of the tables of the tiles that a
configuration has: a rule for a module that is not there would only hide that nothing was split. What belongs
here: the tables, what the version of transformers at hand calls a style, and the sentences that refuse sizes
that cannot be split. Names are those of the base model; the heads add their own (`_tp_plan`, ...).
"""

import torch
from transformers import PreTrainedConfig

_ATTENTION = "layers.*.self_attn"
_EXPERTS = "layers.*.mlp.experts"
_SHARED_EXPERTS = "layers.*.mlp.shared_experts"

# Every rank holds some of the heads, from the queries to the output projection; its sums are then added up.
_MULTI_HEAD = {
    f"{_ATTENTION}.q_proj": "colwise",
    f"{_ATTENTION}.k_proj": "colwise",
    f"{_ATTENTION}.v_proj": "colwise",
    f"{_ATTENTION}.o_proj": "rowwise",
}
# The latent and the rotated key are whole on every rank: the heads begin behind them. The style of their
# projection adds up the gradients of the rotated key, which goes to the heads without a split module between.
_LATENT = {
    f"{_ATTENTION}.kv_a_proj_with_mqa": "mla_kv_a_proj",
    f"{_ATTENTION}.kv_b_proj": "colwise",
    f"{_ATTENTION}.o_proj": "rowwise",
}
_LATENT_FULL_RANK_QUERY = {f"{_ATTENTION}.q_proj": "colwise"}
_LATENT_LOW_RANK_QUERY = {f"{_ATTENTION}.q_b_proj": "colwise"}
# A weight that all heads share: see `parallel_styles.py`.
HEAD_NORM = "head_norm"
_QK_NORM = {f"{_ATTENTION}.q_norm": HEAD_NORM, f"{_ATTENTION}.k_norm": HEAD_NORM}
_VALUE_GATE = {f"{_ATTENTION}.value_gate": "colwise"}


def tensor_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Styles of tensor parallelism by module: it splits heads, feed-forward widths and the vocabulary."""
    plan = {"embed_tokens": "embedding_rowwise"}
    if config.attention_type == "latent":
        plan |= _LATENT
        plan |= _LATENT_FULL_RANK_QUERY if config.q_lora_rank is None else _LATENT_LOW_RANK_QUERY
    else:
        plan |= _MULTI_HEAD
        if config.qk_norm is not None and config.norm_weight:
            plan |= _QK_NORM
        if config.value_embedding_interval is not None:
            plan |= _VALUE_GATE | _value_embedding_rules()
    if "dense" in config.mlp_layer_types:
        plan |= _feed_forward_rules("layers.*.mlp", config.gated_mlp)
    if "sparse" in config.mlp_layer_types:
        plan |= {
            f"{_EXPERTS}.gate_up_proj" if config.gated_mlp else f"{_EXPERTS}.up_proj": (
                "packed_colwise" if config.gated_mlp else "colwise"
            ),
            f"{_EXPERTS}.down_proj": "rowwise",
            _EXPERTS: "moe_tp_experts",
        }
        if config.n_shared_experts:
            plan |= _feed_forward_rules(_SHARED_EXPERTS, config.gated_mlp)
    return plan


def expert_parallel_plan(config: PreTrainedConfig) -> dict[str, str] | None:
    """Styles of expert parallelism by module: whole experts to a rank. None without experts."""
    if "sparse" not in config.mlp_layer_types:
        return None
    up = "gate_up_proj" if config.gated_mlp else "up_proj"
    plan = {f"{_EXPERTS}.{up}": "grouped_gemm", f"{_EXPERTS}.down_proj": "grouped_gemm"}
    if "ep_dispatch_experts" in _known_styles():
        return plan | {_EXPERTS: "ep_dispatch_experts"}
    # Before 5.21 the router hides the experts of other ranks, and the partial outputs are added up.
    return plan | {_EXPERTS: "moe_tp_experts", "layers.*.mlp.gate": "ep_router"}


def pipeline_plan(config: PreTrainedConfig) -> dict[str, tuple[list[str], list[str]]] | None:
    """Inputs and outputs of the modules that a pipeline cuts between; None where a stage needs more."""
    if _tiles_across_stages(config):
        return None
    return {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }


def sharded_data_plan(config: PreTrainedConfig) -> dict[str, str]:
    """The modules whose weights FSDP gathers together, and whether they are kept after the forward pass.

    A tied embedding and its head are left to one group, that of the whole model: FSDP takes no tensor in two.
    """
    plan = {"layers.*": "free_full_weight"}
    if not config.tie_word_embeddings:
        plan["embed_tokens"] = "free_full_weight"
    if config.norm_weight:
        plan["norm"] = "keep_full_weight"
    return plan


def require_splittable(config: PreTrainedConfig, sizes) -> None:
    """Refuses what the engine would split wrongly, or would fail at later.

    Args:
        config: the model's configuration.
        sizes: transformers' `DistributedConfig`.

    Raises:
        ValueError: with the field, its value and the size that it does not divide into.
    """
    tensor_parallel, pipeline = sizes.tp_size or 1, sizes.pp_size or 1
    expert_parallel = getattr(sizes, "ep_size", None) or 1
    if not hasattr(sizes, "ep_size") and sizes.enable_expert_parallel:
        # Before 5.21 the experts alone were split, over the ranks of tensor parallelism.
        tensor_parallel, expert_parallel = 1, tensor_parallel
    # A plan of the user's own says itself what is split.
    if tensor_parallel > 1 and not isinstance(sizes.tp_plan, dict):
        _require_multiples(config, "tp_size", tensor_parallel, _fields_split_by_tensor_parallelism(config))
    if expert_parallel > 1:
        if not config.n_routed_experts:
            raise ValueError(f"ep_size={expert_parallel} needs experts to split, but n_routed_experts is 0")
        _require_multiples(config, "ep_size", expert_parallel, ["n_routed_experts"])
    if pipeline > 1:
        _require_stages(config, pipeline)
    # The engine ties what it has split by tensor after it has padded it for FSDP, once for each of the names.
    both = tensor_parallel * (sizes.fsdp_size or 1)
    if config.tie_word_embeddings and 1 < tensor_parallel < both and config.padded_vocab_size % both:
        raise ValueError(
            f"padded_vocab_size ({config.padded_vocab_size}) of a tied embedding does not divide into "
            f"tp_size * fsdp_size = {both} parts"
        )


def is_split(tensor: torch.Tensor) -> bool:
    """Whether a rank holds only a part of a tensor (a DTensor)."""
    return hasattr(tensor, "to_local")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, unless it is split."""
    return tensor.to_local() if is_split(tensor) else tensor


def _feed_forward_rules(module: str, gated: bool) -> dict[str, str]:
    rules = {f"{module}.up_proj": "colwise", f"{module}.down_proj": "rowwise"}
    return {f"{module}.gate_proj": "colwise"} | rules if gated else rules


def _value_embedding_rules() -> dict[str, str]:
    """The table is split by key/value head, and each rank looks up its own heads' part."""
    table = f"{_ATTENTION}.value_embed"
    if {"embedding_colwise", "local_params"} <= _known_styles():
        return {f"{table}.weight": "embedding_colwise", table: "local_params"}
    # Before embeddings had styles of their own, those of linear layers served them.
    return {table: "colwise"}


def _known_styles() -> set[str]:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    return set(ALL_PARALLEL_STYLES.keys())


def _fields_split_by_tensor_parallelism(config: PreTrainedConfig) -> list[str]:
    names = ["num_attention_heads"]
    if config.attention_type == "multi_head":
        names.append("num_key_value_heads")
    if "sparse" in config.mlp_layer_types:
        names.append("moe_intermediate_size")
    if not _engine_splits_unevenly():
        names.append("padded_vocab_size")
        if "dense" in config.mlp_layer_types:
            names.append("intermediate_size")
    return names


def _engine_splits_unevenly() -> bool:
    """Whether the last rank's part of a linear layer may be shorter than the others'."""
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    return hasattr(TensorParallelLayer, "_from_local_last_dim_shard")


def _require_multiples(config: PreTrainedConfig, size_name: str, size: int, names: list[str]) -> None:
    for name in names:
        if getattr(config, name) % size:
            raise ValueError(
                f"{name} ({getattr(config, name)}) does not divide into {size_name}={size} parts"
            )


def _tiles_across_stages(config: PreTrainedConfig) -> list[str]:
    """The fields whose tiles need more than the hidden states of the layer before."""
    names = ("residual_scalars", "value_embedding_interval", "backout", "train_mtp")
    return [name for name in names if getattr(config, name) not in (False, None)]


def _require_stages(config: PreTrainedConfig, stages: int) -> None:
    if config.num_hidden_layers < stages:
        raise ValueError(
            f"num_hidden_layers ({config.num_hidden_layers}) is fewer than pp_size={stages} stages"
        )
    tiles = _tiles_across_stages(config)
    if tiles:
        raise ValueError(
            f"pp_size={stages} cannot be had with {', '.join(tiles)}: the stages of a pipeline hand on "
            "hidden states, and nothing of the tokens or of earlier layers"
        )

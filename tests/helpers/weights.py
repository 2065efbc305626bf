"""Copies weights of other implementations into a Tessera model, by name; every tensor must find its place."""

import re

import torch

# DeepSeek-V3 inference names (native layout) -> ours.
NATIVE = {
    r"^embed\.": "model.embed_tokens.",
    r"^head\.": "lm_head.",
    r"^norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.attn\.wq_a\.": ".self_attn.q_a_proj.",
    r"\.attn\.wq_b\.": ".self_attn.q_b_proj.",
    r"\.attn\.q_norm\.": ".self_attn.q_a_layernorm.",
    r"\.attn\.wkv_a\.": ".self_attn.kv_a_proj_with_mqa.",
    r"\.attn\.wkv_b\.": ".self_attn.kv_b_proj.",
    r"\.attn\.kv_norm\.": ".self_attn.kv_a_layernorm.",
    r"\.attn\.wq\.": ".self_attn.q_proj.",
    r"\.attn\.wo\.": ".self_attn.o_proj.",
    r"\.ffn\.": ".mlp.",
    r"\.w1\.": ".gate_proj.",
    r"\.w2\.": ".down_proj.",
    r"\.w3\.": ".up_proj.",
}

NANOCHAT = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.h\.": "model.layers.",
    r"^value_embeds\.(\d+)\.": r"model.layers.\1.self_attn.value_embed.",
    r"\.attn\.c_q\.": ".self_attn.q_proj.",
    r"\.attn\.c_k\.": ".self_attn.k_proj.",
    r"\.attn\.c_v\.": ".self_attn.v_proj.",
    r"\.attn\.c_proj\.": ".self_attn.o_proj.",
    r"\.attn\.ve_gate\.": ".self_attn.value_gate.",
    r"\.mlp\.c_fc\.": ".mlp.up_proj.",
    r"\.mlp\.c_proj\.": ".mlp.down_proj.",
    r"^smear_gate\.": "model.smear.gate.",
    r"^smear_lambda$": "model.smear.strength",
    r"^backout_lambda$": "model.backout_scale",
}

NANOCHAT_IN_TREE = {r"\.mlp\.fc1\.": ".mlp.up_proj.", r"\.mlp\.fc2\.": ".mlp.down_proj."}

GPT2 = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.wpe\.": "model.embed_positions.",
    r"^transformer\.h\.": "model.layers.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"\.ln_1\.": ".input_layernorm.",
    r"\.ln_2\.": ".post_attention_layernorm.",
    r"\.attn\.c_attn\.": ".self_attn.qkv.",
    r"\.attn\.c_proj\.": ".self_attn.o_proj.",
    r"\.mlp\.c_fc\.": ".mlp.up_proj.",
    r"\.mlp\.c_proj\.": ".mlp.down_proj.",
}


def rename(state: dict[str, torch.Tensor], rules: dict[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def stack_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor for each expert and projection -> one for all experts, gate above up."""
    stacked, experts = {}, {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if found:
            experts.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
        else:
            stacked[name] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        stacked[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        )
        stacked[f"{prefix}.down_proj"] = torch.stack([parts[e, "down"] for e in range(count)])
    return stacked


def split_layer_scalars(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """nanochat keeps the scalars of all layers in one vector."""
    state = dict(state)
    for vector, ours in (("resid_lambdas", "residual_scale"), ("x0_lambdas", "embedding_scale")):
        for i, value in enumerate(state.pop(vector)):
            state[f"model.layers.{i}.{ours}"] = value.reshape(1)
    return state


def split_gpt2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2 stores its matrices transposed, and q, k, v as one."""
    split = {}
    for name, tensor in rename(state, GPT2).items():
        matrix = tensor.ndim == 2 and "layers" in name
        tensor = tensor.T.contiguous() if matrix else tensor
        if ".qkv." in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = piece.contiguous()
        else:
            split[name] = tensor
    return split


def load_all(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Loads strictly, in eval mode; a tied head may be left out."""
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True)
    return model.eval()


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """Random weights, none at its start, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(scale * noise * tensor.shape[-1] ** -0.5)
            elif "bias" in name:
                tensor.copy_(0.1 * noise)
            else:
                tensor.copy_(1.0 + 0.2 * noise)
    return model.eval()

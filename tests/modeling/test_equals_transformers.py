"""Logits equal those of transformers' own models, on random tiny models with copied weights."""

import copy

import pytest
import torch
import transformers
from helpers.families import LLAMA3, SIZES
from helpers.weights import NANOCHAT_IN_TREE, load_all, randomize, rename, split_gpt2

from tessera import TesseraConfig, TesseraForCausalLM

TOLERANCE = 1e-4
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "intermediate_size": 96}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}


def same(state):
    return state


CASES = {
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=128, attn_pdrop=0, resid_pdrop=0
        ),
        dict(
            SIZES,
            attention_bias=True,
            position_embedding_type="learned",
            norm_type="layer_norm",
            rms_norm_eps=1e-5,
            hidden_act="gelu_new",
            gated_mlp=False,
            intermediate_size=256,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        split_gpt2,
    ),
    **{
        f"llama-{rope['rope_type']}": (
            transformers.LlamaConfig(
                **SIZES,
                num_key_value_heads=2,
                intermediate_size=96,
                rope_parameters=dict(rope),
                mlp_bias=True,
            ),
            dict(
                SIZES, num_key_value_heads=2, intermediate_size=96, rope_parameters=dict(rope), mlp_bias=True
            ),
            same,
        )
        for rope in (DEFAULT_ROPE, LINEAR, LLAMA3, YARN)
    },
    "mistral-window": (
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, sliding_window=9),
        dict(SIZES, num_key_value_heads=2, intermediate_size=96, sliding_window=9, layer_types="S"),
        same,
    ),
    "qwen3": (
        transformers.Qwen3Config(
            **SIZES, num_key_value_heads=2, intermediate_size=96, head_dim=24, attention_bias=True
        ),
        dict(
            SIZES,
            num_key_value_heads=2,
            intermediate_size=96,
            head_dim=24,
            attention_bias=True,
            qk_norm="before_rope",
        ),
        same,
    ),
    **{
        f"qwen3-moe-{'normalised' if normalised else 'raw'}": (
            transformers.Qwen3MoeConfig(
                **SIZES,
                **EXPERTS,
                num_key_value_heads=2,
                head_dim=16,
                num_experts=6,
                mlp_only_layers=[1],
                decoder_sparse_step=1,
                norm_topk_prob=normalised,
            ),
            dict(
                SIZES,
                **EXPERTS,
                num_key_value_heads=2,
                head_dim=16,
                n_routed_experts=6,
                mlp_layer_types="SD",
                norm_topk_prob=normalised,
                qk_norm="before_rope",
            ),
            same,
        )
        for normalised in (True, False)
    },
    **{
        f"deepseek-v3-{rope['rope_type']}": (
            transformers.DeepseekV3Config(
                **SIZES,
                **EXPERTS,
                **LATENT,
                **GROUPS,
                n_routed_experts=16,
                n_shared_experts=2,
                first_k_dense_replace=1,
                rope_parameters=dict(rope),
                num_mtp_layers=0,
            ),
            dict(
                SIZES,
                **EXPERTS,
                **LATENT,
                **GROUPS,
                attention_type="latent",
                n_routed_experts=16,
                n_shared_experts=2,
                mlp_layer_types=["dense", "sparse", "sparse"],
                scoring_func="sigmoid",
                router_correction_bias=True,
                rope_parameters=dict(rope),
                rope_interleave=True,
            ),
            same,
        )
        for rope in (DEFAULT_ROPE, dict(YARN, mscale=0.707, mscale_all_dim=1.0))
    },
    "nanochat": (
        transformers.NanoChatConfig(
            **SIZES,
            num_key_value_heads=2,
            intermediate_size=256,
            final_logit_softcapping=15.0,
            pad_token_id=None,  # its embedding would get no gradient
        ),
        dict(
            SIZES,
            num_key_value_heads=2,
            intermediate_size=256,
            final_logit_softcapping=15.0,
            rope_reverse=True,
            qk_norm="after_rope",
            norm_weight=False,
            embedding_norm=True,
            hidden_act="relu2",
            gated_mlp=False,
        ),
        lambda state: rename(state, NANOCHAT_IN_TREE),
    ),
}


@pytest.fixture(params=CASES)
def pair(request):
    their_config, fields, convert = CASES[request.param]
    theirs = randomize(transformers.AutoModelForCausalLM.from_config(their_config))
    fields = dict(fields)
    fields.setdefault("rms_norm_eps", getattr(their_config, "rms_norm_eps", 1e-6))
    ours = load_all(TesseraForCausalLM(TesseraConfig(**fields)), convert(theirs.state_dict()))
    return theirs, ours


def batch(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal(pair):
    theirs, ours = pair
    expected = theirs(batch()).logits
    assert expected.std() > 0.05, "logits too flat to tell models apart"
    torch.testing.assert_close(ours(batch()).logits, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_logits_equal_token_by_token(pair):
    theirs, ours = pair
    expected, cache, logits = theirs(batch()).logits, None, []
    for t in range(batch().shape[1]):
        out = ours(batch()[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=TOLERANCE, rtol=0)


def test_loss_and_gradient_of_the_embedding_equal(pair):
    theirs, ours = pair
    results = []
    for model in (theirs, ours):
        loss = model(batch(), labels=batch(), use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), model.get_input_embeddings().weight.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 40])
def test_dynamic_scaling_equals_llama_past_its_longest_context(step):
    """Whole rows and token by token differ with this scaling; so each is compared with the same of theirs."""
    sizes = {
        **SIZES,
        "max_position_embeddings": 16,
        "intermediate_size": 96,
        "rope_parameters": dict(DYNAMIC),
    }
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    ours = load_all(TesseraForCausalLM(TesseraConfig(**sizes)), theirs.state_dict())
    results = []
    for model in (theirs, ours):
        cache, logits = None, []
        for part in batch().split(step, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=0)


def test_load_balancing_loss_equals_qwen3_moe():
    their_config, fields, _ = CASES["qwen3-moe-raw"]
    their_config = copy.deepcopy(their_config)
    their_config.router_aux_loss_coef = 0.1
    theirs = randomize(transformers.Qwen3MoeForCausalLM(their_config))
    config = TesseraConfig(**fields, rms_norm_eps=1e-6, router_aux_loss_coef=0.1)
    ours = load_all(TesseraForCausalLM(config), theirs.state_dict())
    mask = torch.ones_like(batch())
    mask[0, 30:] = 0
    labels = batch().masked_fill(mask == 0, -100)
    outputs = [
        model(batch(), attention_mask=mask, labels=labels, output_router_logits=True)
        for model in (theirs, ours)
    ]
    torch.testing.assert_close(outputs[1].aux_loss, outputs[0].aux_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, atol=1e-5, rtol=0)
    assert outputs[1].aux_loss > 1


def test_initial_spread_of_each_matrix_equals_gpt2():
    config = transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=6, n_head=4, n_positions=256)
    theirs = split_gpt2(transformers.GPT2LMHeadModel(config).state_dict())
    ours = TesseraForCausalLM(
        TesseraConfig.from_preset(
            "gpt2-124m",
            vocab_size=512,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=256,
        )
    ).state_dict()
    matrices = [name for name, tensor in ours.items() if tensor.ndim == 2]
    assert len(matrices) > 30
    for name in matrices:
        torch.testing.assert_close(ours[name].std(), theirs[name].std(), rtol=0.06, atol=0, msg=name)

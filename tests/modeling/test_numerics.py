"""Single tiles against formulas written out here, and the precision that each step is computed in."""

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from torch.nn import functional as F

from tessera import TesseraForCausalLM
from tessera.modeling.feed_forward import TesseraRouter, load_balancing_loss
from tessera.modeling.layers import TesseraRMSNorm, TesseraRotaryEmbedding


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_softcap_bends_the_scores(implementation):
    """One layer by hand: scores become cap * tanh(scores / cap) before the mask and the softmax."""
    model = tiny_model("llama-tiny", num_hidden_layers=1, attn_logit_softcapping=0.5, num_key_value_heads=4)
    model.set_attn_implementation(implementation)
    layer = model.model.layers[0].self_attn
    x = random(1, 6, 96)
    ones, zeros = torch.ones(1, 6, 12), torch.zeros(1, 6, 12)  # no rotation
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    out, _ = layer(x, (ones, zeros), mask)
    q, k, v = (p(x).view(6, 4, 24).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = 0.5 * torch.tanh(q @ k.mT / 24**0.5 / 0.5)
    weights = scores.masked_fill(~mask[0], -torch.inf).softmax(-1)
    expected = layer.o_proj((weights @ v).transpose(0, 1).reshape(1, 6, 96))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("site", ["attention_dropout", "embd_pdrop", "resid_pdrop"])
@pytest.mark.parametrize("name", ["gpt2-tiny", "bytegpt-tiny"])
def test_each_dropout_acts_while_training_and_only_then(name, site):
    model = tiny_model(name, **{site: 0.5})
    clean = tiny_model(name)(tokens(), use_cache=False).logits
    torch.testing.assert_close(model(tokens(), use_cache=False).logits, clean, atol=1e-6, rtol=1e-6)
    model.train()
    torch.manual_seed(0)
    first = model(tokens(), use_cache=False).logits
    second = model(tokens(), use_cache=False).logits
    assert (first - second).abs().max() > 1e-2
    assert (first - clean).abs().max() > 1e-2


def router(**fields) -> TesseraRouter:
    config = tiny_config("bytegpt-tiny", n_routed_experts=8, num_experts_per_tok=2, **fields)
    router = TesseraRouter(config)
    with torch.no_grad():
        router.weight.copy_(0.1 * random(8, config.hidden_size, seed=3))
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(random(8, seed=4))
    return router


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_group_limited_choice_equals_a_loop_over_tokens(scoring, bias):
    """Groups rank by their best expert, with the bias by their best two; weights ignore the bias."""
    gate = router(
        scoring_func=scoring,
        n_group=4,
        topk_group=2,
        router_correction_bias=bias,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    x = random(40, 96)
    logits, weights, indices = gate(x)
    torch.testing.assert_close(logits, x @ gate.weight.T)
    for token in range(40):
        scores = logits[token].softmax(-1) if scoring == "softmax" else logits[token].sigmoid()
        ranked = scores + gate.e_score_correction_bias if bias else scores
        groups = [ranked[2 * g : 2 * g + 2] for g in range(4)]
        worth = [float(group.sum()) if bias else float(group.max()) for group in groups]
        best_groups = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = [e for e in range(8) if e // 2 in best_groups]
        chosen = sorted(allowed, key=lambda e: -float(ranked[e]))[:2]
        assert set(indices[token].tolist()) == set(chosen)
        total = sum(float(scores[e]) for e in chosen)
        for slot in range(2):
            expected = 2.5 * float(scores[indices[token, slot]]) / total
            assert weights[token, slot].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_balance_loss_of_sigmoid_scores_normalises_them_first():
    gate = router(scoring_func="sigmoid")
    logits = random(30, 8, seed=5)
    share, probability = torch.zeros(8), torch.zeros(8)
    for row in logits:
        scores = row.sigmoid()
        probability += scores / scores.sum() / 30
        for expert in scores.topk(2).indices:
            share[expert] += 1 / 30
    expected = 8 * (share * probability).sum()
    torch.testing.assert_close(load_balancing_loss([gate], (logits,)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_norm_of_bf16_is_that_of_fp32_rounded_once():
    x = (50 * random(64, 256)).bfloat16()
    norm = TesseraRMSNorm(256, weight=False)
    expected = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert (norm(x) == expected).float().mean() > 0.999


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "bytegpt-tiny"])
def test_rotary_angles_of_far_positions_survive_bf16(name):
    """bf16 knows no odd number above 256: angles computed in it would be wrong from there on."""
    rotary = TesseraRotaryEmbedding(tiny_config(name))
    positions = torch.tensor([[257, 1001, 4095]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.bfloat16), positions)
    exact = rotary(torch.zeros(1, dtype=torch.float64), positions)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(cos.double(), exact[0], atol=0.004, rtol=0.004)
    torch.testing.assert_close(sin.double(), exact[1], atol=0.004, rtol=0.004)


@torch.no_grad()
def test_capped_logits_are_fp32_and_under_the_cap():
    model = tiny_model("nanochat-tiny").to(torch.bfloat16)
    logits = model(tokens()).logits
    assert logits.dtype == torch.float32
    raw = F.linear(model.model(tokens()).last_hidden_state, model.lm_head.weight).float()
    torch.testing.assert_close(logits, 15 * torch.tanh(raw / 15), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "bytegpt-tiny", "gpt2-tiny", "verse-tiny"])
def test_bf16_stays_near_fp32(name):
    exact = tiny_model(name)
    rough = TesseraForCausalLM._from_config(exact.config, dtype=torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    error = (rough.eval()(tokens()).logits.float() - exact(tokens()).logits).abs()
    assert error.median() < 0.02 * exact(tokens()).logits.std()


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_under_autocast_the_residual_stream_of_fp32_weights_is_bf16(name):
    model = tiny_model(name).train()
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, labels=ids, output_hidden_states=True)
    # The last is that after the final norm, whose weight is fp32.
    assert {x.dtype for x in out.hidden_states[:-1]} == {torch.bfloat16}
    torch.testing.assert_close(out.loss, expected, rtol=0.02, atol=0)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)

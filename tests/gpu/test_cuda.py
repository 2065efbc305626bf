"""Every dialect on a CUDA GPU: the answers of the CPU, in the precision that training uses there."""

import json

import pytest
import torch
from helpers.models import DIALECTS, EVERY_MODEL, tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SPARSE = [name for name in EVERY_MODEL if tiny_config(name).n_routed_experts]


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def full_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_logits_on_the_gpu_equal_the_cpu(name):
    model = tiny_model(name)
    expected = model(tokens(), use_cache=False).logits
    model.cuda()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits = model(tokens().cuda(), use_cache=False).logits.cpu()
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_cached_equals_uncached_in_bf16(name):
    model = tiny_model(name, output_router_logits=False).to("cuda", torch.bfloat16)
    whole = model(tokens().cuda(), use_cache=False).logits.float()
    cache, logits = None, []
    for chunk in tokens().cuda().split([9, 1, 1, 6, 7], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits.float())
    error = (torch.cat(logits, 1) - whole).abs()
    # A router may turn on the last bit of bf16, so a few positions of a sparse model may differ more.
    assert error.median() < 0.02 * whole.std()
    if name not in SPARSE:
        assert error.max() < 0.3 * whole.std()


@pytest.mark.parametrize("name", SPARSE)
def test_experts_agree_on_the_gpu_with_gradients(name):
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = tiny_model(name).cuda()
        model.set_experts_implementation(implementation)
        out = model(tokens().cuda(), labels=tokens().cuda(), use_cache=False)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(results[2], results[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", DIALECTS)
def test_generation_on_the_gpu_equals_the_cpu(name):
    model = tiny_model(name)
    kwargs = {
        "attention_mask": torch.ones(2, 24),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = model.generate(tokens(), **kwargs)
    model.cuda()
    kwargs["attention_mask"] = kwargs["attention_mask"].cuda()
    assert torch.equal(model.generate(tokens().cuda(), **kwargs).cpu(), expected)


@pytest.mark.parametrize("name", DIALECTS)
def test_pretraining_runs_in_bf16_and_learns(name, tmp_path):
    from tessera.training.pretrain import PretrainArguments, pretrain

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 800)
    args = PretrainArguments(
        config=name, data_file=str(text), save_path=str(tmp_path / "run"), steps=60, sequence_length=128
    )
    result = pretrain(args)
    assert result.after.bits_per_byte < 0.25 * result.before.bits_per_byte
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record.get("loss", 0) < 10 for record in records)

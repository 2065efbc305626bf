"""What only a GPU has: block masks with compiled kernels, captured decoding, and no T x T mask anywhere."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def tokens(rows: int = 2, length: int = 200) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(1)).cuda()


def documents(rows: int = 2, length: int = 200) -> torch.Tensor:
    return torch.cat([torch.arange(70), torch.arange(length - 70)]).repeat(rows, 1).cuda()


def step(forward, model, **arguments):
    model.zero_grad()
    ids = tokens()
    loss = forward(input_ids=ids, labels=ids, **arguments).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name", ["llama-tiny", "nanochat-tiny", "latent-sliding-lowrank-sigmoid", "moe-qknorm-softcap"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_rows_with_windows_train_without_a_written_out_mask(name, compiled, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(name, max_position_embeddings=256, layer_types="SL", sliding_window=33).cuda().train()
    # Older libraries cannot trace their stand-in for grouped products of fp32 backwards.
    model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("eager")
    expected = step(model, model, position_ids=documents())
    model.set_attn_implementation("sdpa")
    kernel, given = F.scaled_dot_product_attention, []

    def spy(*args, attn_mask=None, **kwargs):
        given.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    if not compiled:
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    loss, gradients = step(forward, model, position_ids=documents())
    assert all(mask is None for mask in given)
    torch.testing.assert_close(loss, expected[0], rtol=1e-3, atol=1e-3)
    for key, wanted in expected[1].items():
        # Flex attention multiplies fp32 in tf32.
        assert (gradients[key] - wanted).norm() <= 1e-2 * wanted.norm() + 1e-6, key


def test_a_padded_batch_trains_as_its_rows_do():
    model = tiny_model("llama-tiny", max_position_embeddings=256).cuda().train()
    ids = tokens()
    labels, mask = ids.clone(), torch.ones_like(ids)
    # The first token of a row has nothing before it that could predict it.
    labels[0, :41], mask[0, :40] = -100, 0
    arguments = {"input_ids": ids, "labels": labels, "attention_mask": mask, "num_items_in_batch": 300}
    together = model(**arguments).loss
    alone = sum(
        model(input_ids=row, labels=row, num_items_in_batch=300).loss for row in (ids[:1, 40:], ids[1:])
    )
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["llama-tiny", "bytegpt-tiny", "gpt2-tiny"])
def test_captured_decoding_writes_what_a_growing_cache_does(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(name).cuda()
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, max_new_tokens=40, **arguments)
    for _ in range(2):
        assert torch.equal(
            model.generate(ids, max_new_tokens=40, cache_implementation="static", **arguments), expected
        )
    end = int(expected[1, 20])
    ended = model.generate(ids, max_new_tokens=40, eos_token_id=end, **arguments)
    static = model.generate(
        ids, max_new_tokens=40, eos_token_id=end, cache_implementation="static", **arguments
    )
    assert torch.equal(static, ended)
    sampled = {"attention_mask": mask, "do_sample": True, "pad_token_id": 0, "max_new_tokens": 60}
    first = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        first.append(model.generate(ids, cache_implementation="static", **sampled))
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    # A replayed graph draws new numbers at every step.
    assert len(set(first[0][0, 20:].tolist())) > 3


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_without_logits_needs_a_fraction_of_their_memory(compiled):
    model = tiny_model("llama-tiny", vocab_size=32768, max_position_embeddings=2048).cuda().bfloat16().train()
    ids = torch.randint(0, 32768, (16, 2048), device="cuda")
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def peak(skip: bool) -> int:
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forward(input_ids=ids, labels=ids, skip_logits=skip).loss.backward()
            model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    whole = peak(False)
    assert whole > ids.numel() * 32768 * 2 and peak(True) < whole / 3

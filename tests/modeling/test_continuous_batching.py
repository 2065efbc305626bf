"""`generate_batch`: many requests over pages give what `generate` gives, and a failed one is not missed."""

from dataclasses import fields

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_model
from transformers import CompileConfig, GenerationConfig, GenerationMixin
from transformers.generation import ContinuousBatchingConfig

from tessera.modeling.continuous_batching import BatchGenerationError, experts_can_be_captured, paged_update

NEW = 6
# Presets away from EVERY_MODEL in what continuous batching has to keep for smear.
SMEARED = {
    "smear-without-windows": {"layer_types": "L"},
    "smear-learned": {"position_embedding_type": "learned", "rope_parameters": None},
    "smear-latent": {
        "attention_type": "latent",
        "qk_norm": None,
        "qk_norm_scale": 1.0,
        "value_embedding_interval": None,
        "head_dim": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
}


def model_of(name: str):
    return tiny_model("nanochat-tiny", **SMEARED[name]) if name in SMEARED else tiny_model(name)


def prompts() -> list[list[int]]:
    """Different lengths, longer than a batch and than a page, two with one beginning."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (7, 1, 15, 3)]
    return [*rows, rows[2][:9] + [1, 2], rows[2][:9] + [3]]


def pages(**kwargs) -> ContinuousBatchingConfig:
    """Pages of 4 tokens, room for about three of the prompts, 12 tokens a step."""
    if "page_size" in {field.name for field in fields(ContinuousBatchingConfig)}:
        size = {"page_size": 4, "num_blocks": 14}
    else:
        # transformers 5.17 calls a page a block, and gives one to each group of layers of a kind.
        size = {"block_size": 4, "num_blocks": 30}
    return ContinuousBatchingConfig(**{**size, "max_batch_tokens": 12, **kwargs})


def settings(**kwargs) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **kwargs}
    )


def generate_alone(model, rows: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return out[:, longest:].tolist()


def generate_batch(model, rows: list[list[int]], config: GenerationConfig | None = None, **kwargs) -> dict:
    config = settings() if config is None else config
    kwargs.setdefault("continuous_batching_config", pages())
    return model.generate_batch(inputs=rows, generation_config=config, **kwargs)


def texts(outputs: dict) -> list[list[int]]:
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("name", [*EVERY_MODEL, *SMEARED])
def test_continuous_batching_equals_generate(name):
    model = model_of(name)
    assert texts(generate_batch(model, prompts())) == generate_alone(model, prompts())


@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "moe-qknorm-softcap"])
def test_written_out_attention_over_pages_equals_generate(name):
    model = model_of(name)
    expected = generate_alone(model, prompts())
    model.set_attn_implementation("eager")
    assert texts(generate_batch(model, prompts())) == expected


@pytest.mark.parametrize("name", ["nanochat-tiny", "smear-without-windows"])
def test_sequences_forked_from_one_prompt_keep_its_last_token(name):
    model = model_of(name)
    rows = prompts()[:3]
    # The best of one is greedy; the library wants sampling for several sequences of a prompt.
    outputs = generate_batch(model, rows, settings(do_sample=True, top_k=1, num_return_sequences=2))
    expected = dict(
        zip([name for name in outputs if "#" not in name], generate_alone(model, rows), strict=True)
    )
    for name, output in outputs.items():
        assert output.generated_tokens == expected[name.split("__child#")[0]]


@pytest.mark.parametrize("name", ["nanochat-tiny", "smear-without-windows", "bytegpt-tiny"])
def test_padded_batches_equal_generate(name, monkeypatch):
    """Compiled steps are padded to few sizes; the padding is what is tried here, not the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = model_of(name)
    padded = pages(
        varlen_compile_config=CompileConfig(), q_padding_interval_size=8, kv_padding_interval_size=16
    )
    outputs = generate_batch(model, prompts(), continuous_batching_config=padded)
    assert texts(outputs) == generate_alone(model, prompts())


@pytest.mark.parametrize("name", ["llama-tiny", "smear-without-windows"])
def test_a_prefix_in_the_pages_is_not_computed_again(name):
    model = model_of(name)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    row = prompts()[2]
    try:
        first = texts(generate_batch(model, [row], persistent_manager=True))
        fresh = sum(lengths)
        lengths.clear()
        again = texts(generate_batch(model, [row, row[:9]], persistent_manager=True))
    finally:
        model.destroy_cached_continuous_batching_manager()
    # Whole pages of 4 are taken over: 12 of 15 tokens, 8 of 9. The last new token is never an input.
    assert fresh == 15 + NEW - 1
    assert sum(lengths) == (3 + NEW - 1) + (1 + NEW - 1)
    assert first == generate_alone(model, [row])
    assert again == generate_alone(model, [row, row[:9]])


def test_a_cpu_gets_pages_for_a_few_prompts_and_not_for_all_its_memory():
    model, seen = tiny_model("nanochat-tiny"), []
    hook = model.model.register_forward_pre_hook(
        lambda _, inputs, kwargs: seen.append(kwargs["cache"]), with_kwargs=True
    )
    outputs = model.generate_batch(prompts() * 3, settings())
    hook.remove()
    assert texts(outputs) == generate_alone(model, prompts()) * 3
    assert {(cache.max_batch_tokens, cache.num_blocks <= 16 * 5) for cache in seen} == {(1024, True)}


def test_requests_that_fail_are_named_with_the_reason_and_the_others_kept():
    rows = [prompts()[1], prompts()[2]]
    with pytest.raises(BatchGenerationError) as caught:
        # Two pages: enough for the short prompt, never for the long one.
        generate_batch(
            tiny_model("gpt2-tiny"),
            rows,
            settings(max_new_tokens=2),
            continuous_batching_config=pages(num_blocks=2),
        )
    error = caught.value
    failed = [name for name, output in error.outputs.items() if output.error is not None]
    assert failed and failed[-1] == list(error.outputs)[-1]
    assert f"{len(failed)} of 2 requests did not finish ({', '.join(failed)}): No requests can be" in str(
        error
    )


def test_pages_read_by_index_refuse_a_block_table():
    with pytest.raises(ValueError, match="set max_blocks_per_request=0"):
        paged_update(None, torch.ones(1), torch.ones(1), 0, {"block_table": torch.ones(1)})


def test_requests_without_an_answer_are_an_error(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate_batch", lambda *_, **__: {})
    with pytest.raises(BatchGenerationError, match=r"2 of 2 requests did not finish \(2 without an answer\)"):
        generate_batch(tiny_model("llama-tiny"), prompts()[:2])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([], "every prompt needs at least one token; empty: 1"),
        ([5, 256], "prompts with ids outside the vocabulary of 256: 1"),
        ([7] * 26, "with max_new_tokens=6 these prompts run past the 30 learned positions: 1"),
    ],
)
def test_prompts_that_would_fail_in_the_middle_are_refused_at_once(row, sentence):
    model = tiny_model("gpt2-tiny", max_position_embeddings=30)
    with pytest.raises(ValueError, match=sentence):
        generate_batch(model, [[1, 2], row])
    assert len(texts(generate_batch(model, [[1, 2], [7] * 25]))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", [*EVERY_MODEL, *SMEARED])
@pytest.mark.parametrize("graphs", [False, True])
def test_continuous_batching_on_a_gpu_equals_generate(name, graphs):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_of(name)
    expected = generate_alone(model, prompts())
    outputs = generate_batch(
        model.cuda(),
        prompts(),
        continuous_batching_config=pages(use_cuda_graph=graphs, use_async_batching=graphs),
    )
    assert texts(outputs) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_sparse_models_in_bf16_answer_from_cuda_graphs():
    model = model_of("bytegpt-tiny").cuda().to(torch.bfloat16)
    assert experts_can_be_captured(model)
    outputs = generate_batch(
        model, prompts(), continuous_batching_config=pages(use_cuda_graph=True, use_async_batching=True)
    )
    assert [len(text) for text in texts(outputs)] == [NEW] * len(prompts())


def test_experts_are_captured_where_their_products_are_one_kernel():
    sparse, dense = model_of("bytegpt-tiny"), model_of("llama-tiny")
    assert experts_can_be_captured(dense) and not experts_can_be_captured(sparse)
    assert experts_can_be_captured(sparse.to(torch.bfloat16))
    sparse.set_experts_implementation("eager")
    assert not experts_can_be_captured(sparse)
    sparse.float().set_experts_implementation("batched_mm")
    assert experts_can_be_captured(sparse)

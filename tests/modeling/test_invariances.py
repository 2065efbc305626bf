"""What must not change a model's answer, for every dialect and for mixtures of their tiles."""

import pytest
import torch
from helpers.models import EVERY_MODEL, tiny_config, tiny_model
from helpers.weights import randomize
from transformers import DynamicCache, StaticCache

from tessera import TesseraForCausalLM

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
LATENT = [name for name in EVERY_MODEL if tiny_config(name).attention_type == "latent"]
SPARSE = [name for name in EVERY_MODEL if tiny_config(name).n_routed_experts]


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_chunks(model, ids, chunks, cache=None, **kwargs):
    logits = []
    for chunk in ids.split(chunks, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_and_chunked_equal_uncached(name, implementation):
    model, ids = tiny_model(name), tokens()
    model.set_attn_implementation(implementation)
    expected = model(ids, use_cache=False).logits
    for chunks in ([1] * 24, [9, 1, 1, 6, 7], [24], [23, 1], [2] * 12):
        torch.testing.assert_close(in_chunks(model, ids, chunks), expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_other_caches_equal_uncached(name):
    model, ids = tiny_model(name), tokens()
    expected = model(ids, use_cache=False).logits
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=30)):
        logits = in_chunks(model, ids, [6, 1, 1, 5, 11], cache)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("with_positions", [True, False])
def test_left_padded_batch_equals_single_rows(name, implementation, with_positions):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    rows = [tokens(1, length, seed=length) for length in (24, 17, 5)]
    ids = torch.zeros(3, 24, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 24 - row.shape[1] :], mask[i, 24 - row.shape[1] :] = row, 1
    given = {}
    if with_positions:
        given["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    whole = model(ids, attention_mask=mask, use_cache=False, **given).logits
    cache, chunked = None, []
    for start, stop in ((0, 20), (20, 21), (21, 24)):
        positions = {key: value[:, start:stop] for key, value in given.items()}
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        cache = out.past_key_values
        chunked.append(out.logits)
    for i, row in enumerate(rows):
        alone = model(row, use_cache=False).logits[0]
        torch.testing.assert_close(whole[i, 24 - row.shape[1] :], alone, **TOLERANCE)
        torch.testing.assert_close(torch.cat(chunked, 1)[i, 24 - row.shape[1] :], alone, **TOLERANCE)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_eager_equals_sdpa_with_gradients(name):
    results = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(name)
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        out = model(tokens(), labels=tokens(), use_cache=False)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_absorbed_equals_naive_with_gradients(name, implementation):
    results = []
    for mode in ("naive", "absorb"):
        model = tiny_model(name)
        model.set_attn_implementation(implementation)
        model.config.latent_attention_mode = mode
        layers = [layer.self_attn for layer in model.model.layers]
        assert all(layer.absorbs(24, 24, None) == (mode == "absorb") for layer in layers)
        out = model(tokens(), labels=tokens(), use_cache=False)
        out.loss.backward()
        decoded = in_chunks(model, tokens(), [11, 1, 1, 11])
        results.append([out.logits.detach(), decoded, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_absorbs_when_decoding_and_expands_a_prompt(name):
    layer = tiny_model(name).model.layers[0].self_attn
    assert layer.absorbs(1, 500, None)
    assert not layer.absorbs(500, 500, None)
    layer.kv_b_proj = torch.nn.Sequential(layer.kv_b_proj)
    assert not layer.absorbs(1, 500, None), "an adapter around the expansion must not be bypassed"


@torch.no_grad()
@pytest.mark.parametrize("name", LATENT)
def test_latent_cache_holds_the_latent_and_the_rotated_key_and_nothing_more(name):
    model = tiny_model(name)
    cache = model(tokens(), use_cache=True).past_key_values
    sizes = [layer.keys.shape[1] * layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers]
    assert (
        sizes == [model.config.kv_lora_rank + model.config.qk_rope_head_dim] * model.config.num_hidden_layers
    )


@pytest.mark.parametrize("name", SPARSE)
def test_experts_eager_equal_batched_equal_grouped_with_gradients(name):
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = tiny_model(name)
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        out = model(tokens(), labels=tokens(), use_cache=False)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    torch.testing.assert_close(results[2], results[0], **TOLERANCE)


def test_experts_are_grouped_by_default():
    assert tiny_model(SPARSE[0]).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(name, **({"router_aux_loss_coef": 0.1} if name in SPARSE else {})).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_future_token_changes_nothing_before_it(name):
    model, ids = tiny_model(name), tokens()
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 250
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :15], before[:, :15], atol=1e-5, rtol=0)
    assert (after[:, 15:] - before[:, 15:]).abs().max() > 1e-3


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("call", ["plain", "default cache", "empty cache", "padding mask", "training"])
def test_packed_documents_equal_documents_alone(name, implementation, call):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    documents = [tokens(1, length, seed=length) for length in (10, 3, 11)]
    kwargs = {"position_ids": packed_positions(10, 3, 11), "use_cache": False}
    if call == "default cache":
        del kwargs["use_cache"]
    elif call == "empty cache":
        kwargs.update(past_key_values=DynamicCache(config=model.config), use_cache=True)
    elif call == "padding mask":
        kwargs["attention_mask"] = torch.ones(1, 24, dtype=torch.long)
    elif call == "training":
        model.train()
    packed = model(torch.cat(documents, 1), **kwargs).logits
    alone = torch.cat([model(document, use_cache=False).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_neighbour_in_a_packed_row_changes_nothing(name):
    model, ids = tiny_model(name), tokens(1)
    changed = ids.clone()
    changed[:, :10] = (changed[:, :10] + 1) % 250
    positions = packed_positions(10, 14)
    before = model(ids, position_ids=positions, use_cache=False).logits
    after = model(changed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(after[:, 10:], before[:, 10:], atol=1e-5, rtol=0)
    assert (after[:, :10] - before[:, :10]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_save_and_load_gives_the_same_model(name, dtype, tmp_path):
    model = randomize(TesseraForCausalLM._from_config(tiny_config(name), dtype=dtype))
    model.save_pretrained(tmp_path)
    loaded, info = TesseraForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems
    theirs = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert theirs[key].dtype == tensor.dtype, key
        assert torch.equal(theirs[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_accumulated_micro_batches_give_the_loss_and_gradient_of_the_whole(name):
    """Token-normalised, though one micro-batch has far fewer counted tokens than the other."""
    coef = {"router_aux_loss_coef": 0.0} if name in SPARSE else {}
    ids, labels = tokens(4), tokens(4).clone()
    labels[2:, 3:] = -100
    count = (labels[:, 1:] != -100).sum()
    whole, parts = tiny_model(name, **coef), tiny_model(name, **coef)
    loss = whole(ids, labels=labels, use_cache=False).loss
    loss.backward()
    total = 0
    for rows in (slice(0, 2), slice(2, 4)):
        part = parts(ids[rows], labels=labels[rows], num_items_in_batch=count, use_cache=False).loss
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), **TOLERANCE)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TOLERANCE)


def test_balance_loss_keeps_its_weight_under_accumulation():
    model = tiny_model(SPARSE[0], router_aux_loss_coef=1.0).train()
    ids = tokens(4)
    aux = [model(ids[rows], labels=ids[rows]).aux_loss for rows in (slice(0, 2), slice(2, 4))]
    count = 4 * 23
    losses = [
        model(ids[rows], labels=ids[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 2), slice(2, 4))
    ]
    model.eval()
    plain = model(ids, labels=ids).loss
    torch.testing.assert_close(sum(losses), plain + sum(aux) / 2, **TOLERANCE)


@torch.no_grad()
def test_router_stays_in_fp32_under_autocast():
    model = tiny_model(SPARSE[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens(), output_router_logits=True).router_logits
    assert all(layer.dtype == torch.float32 for layer in logits)


@torch.no_grad()
def test_padded_vocabulary_is_cut_from_logits():
    model = tiny_model("nanochat-tiny", vocab_size=250, padded_vocab_size=256)
    assert model.lm_head.weight.shape[0] == 256
    assert model(tokens()).logits.shape[-1] == 250


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tiny", "nanochat-tiny", "gpt2-tiny"])
def test_resized_vocabulary_keeps_old_tokens_and_takes_new_ones(name):
    model, ids = tiny_model(name), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(260)
    after = model(torch.cat([ids, torch.full((2, 1), 259)], 1)).logits
    assert after.shape[-1] == 260
    torch.testing.assert_close(after[:, :-1, :256], before, **TOLERANCE)


@torch.no_grad()
def test_recorded_states_have_the_layers_of_the_model():
    model = tiny_model("bytegpt-tiny")
    model.set_attn_implementation("eager")
    out = model(tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    depth = model.config.num_hidden_layers
    assert len(out.hidden_states) == depth + 1
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 24, 24)] * depth
    assert len(out.router_logits) == model.config.mlp_layer_types.count("sparse")


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_cropped_cache_continues_as_if_the_tokens_had_not_come(name):
    model, ids = tiny_model(name), tokens()
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(torch.cat([ids[:, :12], ids[:, :6]], 1), past_key_values=cache, use_cache=True)
    cache.crop(-6)
    logits = model(ids[:, 12:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected[:, 12:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.parametrize("positions", ["counted", "by place"])
def test_a_masked_token_in_the_middle_does_not_cut_a_row_in_two(name, positions):
    model, ids = tiny_model(name), tokens(1, 12)
    mask = torch.ones_like(ids)
    mask[:, 5] = 0
    counted = (mask.cumsum(-1) - 1) if positions == "counted" else torch.arange(12).unsqueeze(0)
    out = model(ids, attention_mask=mask, position_ids=counted, use_cache=False).logits
    cached = model(
        ids, attention_mask=mask, position_ids=counted, past_key_values=DynamicCache(config=model.config)
    ).logits
    keep = mask.bool()
    torch.testing.assert_close(out[keep], cached[keep], **TOLERANCE)

"""The table of docs/generation.md, cell by cell: yes equals greedy, a number is refused with its sentence."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import DIALECTS, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache
from transformers.generation import ContinuousBatchingConfig

from tessera import TesseraForCausalLM

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
NEW = 12
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def table() -> dict[str, list[str]]:
    """Cells by way, in the order of `DIALECTS`."""
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0][1:]] == [name.split("-")[0].rstrip("2") for name in DIALECTS]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


REASONS = dict(re.findall(r"^(\d)\. `(.+?)`", PAGE, flags=re.MULTILINE))


def prompt() -> torch.Tensor:
    return torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(3))


def generate(model: TesseraForCausalLM, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """New tokens [B, NEW] after the prompt."""
    ids = prompt() if ids is None else ids
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, max_new_tokens=NEW, **kwargs)[:, ids.shape[1] :]


def compiled(model: TesseraForCausalLM) -> torch.Tensor:
    """Greedy from a static cache with a compiled step; a second prompt must add no program."""
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    how = {"cache_implementation": "static", "compile_config": config}
    out = generate(model, **how)
    # The prompt is longer than the windows: one program for the first full window, one for any other.
    windows = "sliding_attention" in model.config.layer_types
    assert counters["stats"]["unique_graphs"] == (2 if windows else 1)
    other = prompt().flip(1)
    assert torch.equal(generate(model, other, **how), generate(model, other))
    assert counters["stats"]["unique_graphs"] == (2 if windows else 1)
    return out


def in_two_turns(model: TesseraForCausalLM) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    first = model.generate(prompt()[:, :5], past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.get_seq_length() == 5 and first.shape == (1, 6)
    return generate(model, past_key_values=cache)


def from_embeddings(model: TesseraForCausalLM) -> torch.Tensor:
    embeds = model.get_input_embeddings()(prompt())
    return model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW, pad_token_id=0)


def quantized(model: TesseraForCausalLM) -> torch.Tensor:
    if OLD:
        pytest.skip("transformers 5.17 has no backend without a package")
    return generate(model, cache_implementation="quantized", cache_config={"backend": "fp8"})


def in_pages(model: TesseraForCausalLM) -> torch.Tensor:
    config = model.generation_config
    config.update(do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(prompt().tolist(), max_new_tokens=NEW, continuous_batching_config=pages)
    return torch.tensor([output.generated_tokens for output in outputs.values()])


WAYS = {
    '`cache_implementation="static"`': lambda model: generate(model, cache_implementation="static"),
    '`cache_implementation="static"`, compiled': compiled,
    '`cache_implementation="quantized"`': quantized,
    "`prefill_chunk_size`": lambda model: generate(model, prefill_chunk_size=4),
    "`past_key_values` kept between turns": in_two_turns,
    "`inputs_embeds`": from_embeddings,
    "`assistant_model`": lambda model: generate(model, assistant_model=tiny_model("llama-tiny", seed=5)),
    "`prompt_lookup_num_tokens`": lambda model: generate(model, prompt_lookup_num_tokens=3),
    "`num_beams`": lambda model: generate(model, num_beams=3),
    "`generate_batch`": in_pages,
}


def test_every_way_of_the_table_is_tried():
    assert list(table()) == list(WAYS)
    assert set(REASONS) == {cell for row in table().values() for cell in row} - {"yes"}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_table_of_ways_to_generate_holds(way, name):
    # Two layers of the dialect's kinds, so that compiling takes no longer than it must.
    depth = {"num_hidden_layers": 2} if "compiled" in way else {}
    model = tiny_model(name, **depth)
    cell = table()[way][DIALECTS.index(name)]
    if cell != "yes":
        with pytest.raises(ValueError, match=re.escape(REASONS[cell])):
            WAYS[way](model)
        return
    out = WAYS[way](model)
    if way == '`cache_implementation="quantized"`':
        # Rounded keys and values change the text sooner or later; the first token is from the prompt alone.
        assert out.shape == (1, NEW)
        assert torch.equal(out[:, :1], generate(model)[:, :1])
    else:
        expected = generate(model, num_beams=3, use_cache=False) if way == "`num_beams`" else generate(model)
        assert torch.equal(out, expected)


def test_the_examples_of_the_page_run():
    model = tiny_model("bytegpt-tiny")
    names = {
        "model": model,
        "torch": torch,
        "DynamicCache": DynamicCache,
        "turns": [prompt(), prompt().flip(1)],
    }
    examples = re.findall(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)
    for example in examples:
        exec(example, names)
    assert [len(text) for text in names["texts"]] == [20, 20]
    assert names["ids"].shape == (1, 2 * (9 + 20))

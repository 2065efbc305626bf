"""What conversion writes for a family is that family's: plain transformers loads it and knows no Tessera."""

import json

import pytest
import torch
from helpers.families import ids, logits, save_family
from helpers.models import tiny_model
from helpers.remote_code import without_tessera
from safetensors.torch import load_file

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.conversion.convert import convert
from tessera.conversion.families import FAMILIES
from tessera.modeling.loading import load_model

# The one that each family's model is made from.
SAMPLES = {
    "llama": "llama-biases-llama3-tied",
    "mistral": "mistral-window-tied",
    "qwen2": "qwen2-window-tied",
    "qwen3": "qwen3-window",
    "qwen3_moe": "qwen3_moe-step-window-tied",
    "mixtral": "mixtral",
    "gpt2": "gpt2",
    "deepseek_v2": "deepseek_v2-groups-yarn",
    "deepseek_v3": "deepseek_v3",
    "nanochat": "nanochat",
}
LOAD = """
import json, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
given, found, report = torch.tensor(json.loads(sys.argv[2])), {}, {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        found[folder.name] = model.eval()(given, use_cache=False).logits.contiguous()
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    report[folder.name] = [type(model).__name__, *(len(info[kind]) for kind in kinds)]
assert not any(name.startswith("tessera.") for name in sys.modules)
save_file(found, sys.argv[3])
print("report", json.dumps(report))
"""


@pytest.mark.distributed
def test_every_family_loads_in_a_process_without_tessera(tmp_path):
    expected = {}
    for family, sample in SAMPLES.items():
        save_family(sample, tmp_path / "theirs" / family)
        convert(tmp_path / "theirs" / family, tmp_path / "ours" / family)
        ours = load_model(tmp_path / "ours" / family)
        expected[family] = logits(ours)
        # As if trained here: nothing is left of where it came from.
        ours.config.converted_from = None
        ours.save_pretrained(tmp_path / "ours" / family)
        convert(tmp_path / "ours" / family, tmp_path / "out" / family, to=family)
    given = json.dumps(ids().tolist())
    printed = without_tessera(LOAD, tmp_path / "out", given, tmp_path / "found", home=tmp_path / "home")
    report = json.loads(printed.rpartition("report ")[2])
    assert set(report) == set(SAMPLES)
    for family, (kind, *problems) in report.items():
        assert (kind, problems) == (FAMILIES[family].architecture, [0, 0, 0])
    found = load_file(tmp_path / "found")
    for family, values in expected.items():
        torch.testing.assert_close(found[family], values, atol=1e-4, rtol=0, msg=family)


def test_pairs_of_halves_leave_latent_attention_as_pairs_of_neighbours(tmp_path):
    """DeepSeek-V2 has no others; the order of channels can be changed without changing a logit."""
    ours = tiny_model(
        "bytegpt-tiny",
        rope_interleave=False,
        mlp_layer_types="DSSS",
        q_lora_rank=16,
        attention_bias=True,
    )
    ours.save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "out", to="deepseek_v2")
    assert done.difference.is_small and done.difference.scale > 0.5
    changed = TesseraConfig.from_pretrained(tmp_path / "ours", rope_interleave=True)
    other = TesseraForCausalLM(changed)
    other.load_state_dict(ours.state_dict())
    vocab_size = changed.vocab_size
    difference = (logits(other, vocab_size) - logits(ours, vocab_size)).abs().max()
    assert difference > 0.01, "the order of channels must matter"

"""PEFT on each dialect: where adapters go, that all of them learn, come back and merge equal."""

import pytest
import torch
from datasets import Dataset
from helpers.models import DIALECTS
from helpers.trainers import QUIET, plain_chats, reference, stack_model
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

IDS = torch.arange(60).view(2, 30)
EXPERTS = {
    "bytegpt-tiny": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "nanochat-moe-smear-gqa": ["mlp.experts.up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
}


def adapted(model) -> set[str]:
    """Last names of what has an adapter."""
    return {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A" in name
    }


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("preset", DIALECTS)
def test_lora_without_targets_goes_to_queries_and_values(preset, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stack_model(tmp_path, preset)), LoraConfig())
    latent = model.config.attention_type == "latent"
    assert adapted(model) == ({"q_proj", "kv_a_proj_with_mqa"} if latent else {"q_proj", "v_proj"})


def test_a_method_that_is_not_lora_still_asks_for_targets(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stack_model(tmp_path, "llama-tiny"))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, IA3Config())


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        *((preset, {"target_modules": "all-linear"}) for preset in DIALECTS),
        *((preset, {"target_parameters": names}) for preset, names in EXPERTS.items()),
        ("nanochat-tiny", {"target_modules": ["value_embed", "embed_tokens"]}),
    ],
    ids=[*DIALECTS, *(f"experts of {preset}" for preset in EXPERTS), "value embeddings"],
)
def test_adapters_learn_come_back_and_merge_equal(preset, given, tmp_path):
    folder = stack_model(tmp_path / "model", preset)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, bf16=False, packing=True, **QUIET
    )
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **given)
    trainer = SFTTrainer(folder, args, train_dataset=Dataset.from_list(plain_chats(6)), peft_config=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name

    trainer.save_model(tmp_path / "adapter")
    trained = reference_of(trainer.model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    expected = logits(trained)
    assert torch.equal(logits(loaded), expected)
    assert (expected - logits(base)).abs().max() > 1e-2
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base) and merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def reference_of(model):
    """The adapted model without the forward that TRL put on its base."""
    model.get_base_model().__dict__.pop("forward", None)
    return reference(model)


@pytest.mark.parametrize(
    "names", [{"target_modules": ["kv_b_proj"]}, {"target_parameters": ["kv_b_proj.weight"]}]
)
def test_absorbed_decoding_sees_an_adapter_on_the_expansion(names, tmp_path):
    """Absorbed attention takes the weight of `kv_b_proj` itself, in which an adapter is not."""
    folder = stack_model(tmp_path, "bytegpt-tiny", latent_attention_mode="absorb")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = logits(base)
    attention = base.model.layers[0].self_attn
    assert attention.absorbs(1, 30, None)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **names)).eval()
    assert not attention.absorbs(1, 30, None)
    whole = logits(model)
    assert (whole - plain).abs().max() > 1e-2
    with torch.no_grad():
        start = model(IDS[:, :20], use_cache=True)
        rest = model(IDS[:, 20:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.absorbs(1, 30, None)
    torch.testing.assert_close(logits(merged), whole, rtol=1e-4, atol=1e-4)


def test_an_adapted_router_chooses_by_its_adapted_weight(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(stack_model(tmp_path, "bytegpt-tiny")).eval()
    model = get_peft_model(
        base, LoraConfig(r=4, init_lora_weights=False, target_parameters=["mlp.gate.weight"])
    )
    seen = []
    gate = base.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    model.eval()
    logits(model)
    weight = gate.get_base_layer().weight + gate.get_delta_weight("default")
    tokens, found = seen[0]
    torch.testing.assert_close(found, tokens @ weight.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, tokens @ gate.get_base_layer().weight.T, atol=1e-2)


@pytest.mark.parametrize("preset", ["bytegpt-tiny", "nanochat-tiny"])
def test_the_librarys_own_adapters_save_and_load(preset, tmp_path):
    """`add_adapter` and `load_adapter` are methods of every model of transformers."""
    folder = stack_model(tmp_path / "model", preset)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(folder).eval()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(fresh), logits(model))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder).eval()))

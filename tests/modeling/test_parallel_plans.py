"""The plans for transformers' distributed engine: each rule names something, and misfits are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import DIALECTS, EVERY_MODEL, tiny_config
from torch.distributed.tensor import Replicate, Shard
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from tessera import TesseraForCausalLM, TesseraForSequenceClassification, TesseraModel
from tessera.modeling.parallel_styles import gather_whole

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
HEADS = [TesseraForCausalLM, TesseraForSequenceClassification, TesseraModel]


def build(name: str, head: type = TesseraForCausalLM, **overrides):
    with torch.device("meta"):
        return head(tiny_config(name, **overrides))


def names_in(model) -> set[str]:
    named = [*model.named_modules(), *model.named_parameters(remove_duplicate=False)]
    return {replace_layer_number_by_wildcard(name) for name, _ in named}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_each_rule_names_something_in_the_model(name, head):
    model = build(name, head)
    for plan in (model._tp_plan, model._ep_plan, model._pp_plan, model._fsdp_plan):
        assert set(plan) <= names_in(model), set(plan) - names_in(model)
    assert model._tp_plan and model._fsdp_plan


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_each_style_is_one_of_the_engine(name):
    model = build(name)
    assert {*model._tp_plan.values(), *model._ep_plan.values()} <= set(ALL_PARALLEL_STYLES.keys())
    assert set(model._fsdp_plan.values()) <= {"free_full_weight", "keep_full_weight"}


def test_plans_follow_the_fields_and_are_not_saved():
    config = tiny_config("llama-tiny")
    assert "layers.*.self_attn.q_norm" not in config.base_model_tp_plan
    config.qk_norm = "before_rope"
    assert "layers.*.self_attn.q_norm" in config.base_model_tp_plan
    assert config.base_model_ep_plan is None
    assert not [key for key in config.to_dict() if "plan" in key]


def test_a_plan_of_ones_own_is_not_a_field():
    with pytest.raises(ValueError, match="base_model_tp_plan follows from the other fields"):
        tiny_config("llama-tiny").base_model_tp_plan = {"layers.*.mlp.up_proj": "colwise"}


def test_only_dialects_whose_layers_need_nothing_but_hidden_states_have_a_pipeline_plan():
    with_plan = [name for name in DIALECTS if tiny_config(name).base_model_pp_plan]
    assert with_plan == [name for name in DIALECTS if name != "nanochat-tiny"]


@pytest.mark.parametrize(
    "name, fields, sizes, sentence",
    [
        ("llama-tiny", {}, {"tp_size": 3}, r"num_attention_heads \(4\) does not divide into tp_size=3"),
        ("llama-tiny", {}, {"tp_size": 4}, r"num_key_value_heads \(2\) does not divide into tp_size=4"),
        (
            "bytegpt-tiny",
            {"moe_intermediate_size": 40},
            {"tp_size": 16},
            r"num_attention_heads \(4\) does not divide into tp_size=16",
        ),
        (
            "bytegpt-tiny",
            {"moe_intermediate_size": 40, "num_attention_heads": 16, "num_key_value_heads": 16},
            {"tp_size": 16},
            r"moe_intermediate_size \(40\) does not divide into tp_size=16",
        ),
        ("llama-tiny", {}, {"pp_size": 5}, r"num_hidden_layers \(4\) is fewer than pp_size=5"),
        ("nanochat-tiny", {}, {"pp_size": 2}, r"pp_size=2 cannot be had with residual_scalars"),
        (
            "gpt2-tiny",
            {"vocab_size": 254},
            {"tp_size": 2, "fsdp_size": 2},
            r"padded_vocab_size \(254\) of a tied embedding does not divide into tp_size \* fsdp_size = 4",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_field_and_size(name, fields, sizes, sentence):
    model = build(name, **fields)
    with pytest.raises(ValueError, match=sentence):
        TesseraForCausalLM.maybe_distribute_model(model, DistributedConfig(**sizes), None)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("llama-tiny", r"ep_size=3 needs experts to split, but n_routed_experts is 0"),
        ("bytegpt-tiny", r"n_routed_experts \(4\) does not divide into ep_size=3"),
    ],
)
def test_experts_that_cannot_be_split_are_refused(name, sentence):
    new = "ep_size" in DistributedConfig.__dataclass_fields__
    sizes = {"fsdp_size": 3, "ep_size": 3} if new else {"tp_size": 3, "enable_expert_parallel": True}
    with pytest.raises(ValueError, match=sentence):
        TesseraForCausalLM.maybe_distribute_model(build(name), DistributedConfig(**sizes), None)


def test_a_plan_given_to_the_engine_is_the_users_own():
    """Three ranks do not divide four heads, but nothing of the attention is split here."""
    model = build("llama-tiny")
    sizes = DistributedConfig(tp_size=3, tp_plan={"lm_head": "colwise_gather_output"})
    assert TesseraForCausalLM.maybe_distribute_model(model, sizes, None) is model


def test_a_stage_of_a_pipeline_is_not_saved_as_a_model(tmp_path):
    model = TesseraForCausalLM(tiny_config("llama-tiny"))
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match="load the model without pp_size to save it"):
        model.save_pretrained(tmp_path)


def test_the_table_of_the_docs_says_which_dialects_have_a_plan():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[3:8]] for cells in (x.split("|") for x in lines)
    }
    for row, plan in (
        ("tensors", "base_model_tp_plan"),
        ("experts", "base_model_ep_plan"),
        ("data (FSDP2)", "base_model_fsdp_plan"),
        ("layers (pipeline)", "base_model_pp_plan"),
    ):
        assert [cell == "yes" for cell in rows[row]] == [
            bool(getattr(tiny_config(name), plan)) for name in DIALECTS
        ]


@pytest.mark.parametrize("placements", [(Replicate(), Shard(0)), (Shard(0),)])
def test_what_cannot_be_gathered_stops_with_the_reason_of_torch(placements):
    def full_tensor():
        raise ValueError("torch's reason")

    with pytest.raises(ValueError, match="torch's reason"):
        gather_whole(SimpleNamespace(placements=placements, full_tensor=full_tensor))

"""Graphs by a short name."""

import peft
import pytest
from support.models import LAYERS, tiny_bart, tiny_gpt2, tiny_llama, tiny_t5

import reftheads as rh


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bart])
def test_all_linear_adapts_the_modules_that_peft_adapts(make):
    ours = rh.InterventionModel(make(), rh.preset("lora4:all-linear", make()))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    adapted = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {planned.address.module for planned in ours.plan().nodes} == adapted
    assert trained(ours) == trained(theirs)


def test_lora_alone_means_queries_and_values_of_every_block():
    graph = rh.preset("lora8", tiny_llama())
    sites = {(node.site.layer, node.site.component) for node in graph}
    assert sites == {(layer, part) for layer in range(LAYERS) for part in ("query_output", "value_output")}
    assert {node.intervention for node in graph} == {rh.LoRA(rank=8, alpha=16)}


def test_components_and_positions_can_be_named():
    graph = rh.preset("lora2:mlp_output+key_output", tiny_gpt2())
    assert [str(node.site) for node in graph] == [
        f"{component}[{layer}]" for layer in range(LAYERS) for component in ("mlp_output", "key_output")
    ]
    assert {str(node.positions) for node in rh.preset("loreft4", tiny_gpt2())} == {"f7+l7"}
    assert {str(node.positions) for node in rh.preset("loreft4:l1", tiny_gpt2())} == {"l1"}


def test_both_stacks_of_an_encoder_decoder_get_nodes():
    assert {node.site.stack for node in rh.preset("loreft2:l1", tiny_t5())} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", ["lora", "lora0", "lora8:", "reft4", "8", "lora8:everything", "loreft4:somewhere"])
def test_a_name_that_cannot_be_read_is_refused(name):
    with pytest.raises(ValueError, match=r"lora8|component of a block|cannot read positions"):
        rh.preset(name, tiny_llama())

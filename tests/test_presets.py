"""Graphs by a short name."""

import peft
import pytest
from support.models import LAYERS, tiny_bart, tiny_gpt2, tiny_llama, tiny_t5

import reftheads as rh
from reftheads.fewshot import fine_tuning_model, parameters_to_fine_tune


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


def test_the_lora_of_cs330_leaves_the_attention_output_alone_and_has_a_factor_of_one():
    graph = rh.preset("lora4:cs330", tiny_gpt2())
    modules = [f"h.{layer}.{part}" for layer in range(LAYERS) for part in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]
    assert [node.site.component for node in graph] == [f"transformer.{module}" for module in modules]
    assert {node.intervention for node in graph} == {rh.LoRA(rank=4)} and rh.LoRA(rank=4).scaling == 1
    paths = [str(node.site.component) for node in rh.preset("lora4:cs330", tiny_llama())]
    assert [path.rsplit(".", 1)[1] for path in paths] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ] * LAYERS


NAMES = (
    "lora4", "lora4:all-linear", "lora4:query_output+mlp_output", "lora4:cs330", "loreft4", "loreft4:l1",
    "loreft4:f1+l1", "loreft4:all",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bart])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_the_same_as_a_preset_and_as_a_mode_of_fine_tuning(name, make):
    model = fine_tuning_model(make(), name)
    assert model.plan().graph == rh.preset(name, make())
    nodes = {p for node in model.plan().graph for p in model.node(node.name).parameters()}
    assert set(parameters_to_fine_tune(model, name)) == nodes == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["lora4:everything", "lora4:f1+l1", "loreft4:all-linear", "lora04", "loreft"])
def test_a_name_that_is_no_preset_is_no_mode_either(name):
    message = "component of a block|cannot read positions|cannot read preset|unknown mode"
    for use in (lambda base: rh.preset(name, base), lambda base: fine_tuning_model(base, name)):
        with pytest.raises(ValueError, match=message):
            use(tiny_llama())


def test_both_stacks_of_an_encoder_decoder_get_nodes():
    assert {node.site.stack for node in rh.preset("loreft2:l1", tiny_t5())} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", ["lora", "lora0", "lora8:", "reft4", "8", "lora8:everything", "loreft4:somewhere"])
def test_a_name_that_cannot_be_read_is_refused(name):
    with pytest.raises(ValueError, match=r"lora8|component of a block|cannot read positions"):
        rh.preset(name, tiny_llama())

"""Modes of fine-tuning: which weights each trains, and LoRA of every kind."""

import pytest
import torch
import transformers as tf
from support.models import randomise, recurrent_lfm2, tiny_bart, tiny_bert, tiny_llama

import reftheads as rh
import reftheads.fewshot as fs
from reftheads.interop.peft_lora import merged

SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1}


def gpt2(layers: int) -> tf.GPT2LMHeadModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=layers, n_head=2, **SMALL))


HEAD = rh.Node(rh.LinearHead(3, target="label"), layer=-1, positions="f1", name="head")


def test_the_modes_select_as_many_tensors_as_the_course_says():
    assert len(fs.parameters_to_fine_tune(tiny_bert(tf.BertLMHeadModel, is_decoder=True), "all")) == 42  # bert-tiny
    medium = gpt2(24)  # the depth of gpt2-medium
    for mode in ("first", "middle", "last"):
        assert len(fs.parameters_to_fine_tune(medium, mode)) == 24
    assert len(fs.parameters_to_fine_tune(fs.fine_tuning_model(medium, "lora4:cs330"), "lora4")) == 144


def names(model: torch.nn.Module, mode: str) -> list[str]:
    chosen = set(fs.parameters_to_fine_tune(model, mode))
    return [name for name, p in model.named_parameters() if p in chosen]


@pytest.mark.parametrize(
    "mode, blocks",
    [("first", {0, 1}), ("last", {4, 5}), ("middle", {2, 3}), ("last:3", {3, 4, 5}), ("middle:4", {1, 2, 3, 4})],
)
def test_a_mode_of_blocks_selects_whole_blocks(mode, blocks):
    base = gpt2(6)
    chosen = names(base, mode)
    assert {int(name.split(".")[2]) for name in chosen} == blocks
    assert len(chosen) == 12 * len(blocks)
    assert all(p.requires_grad for p in base.parameters())


def test_blocks_are_found_in_encoders_and_in_both_stacks():
    assert {name.split(".")[3] for name in names(tiny_bert(), "last:1")} == {"1"}
    two = names(tiny_bart(), "last:1")
    assert any("encoder" in name for name in two) and any("decoder" in name for name in two)


def test_biases_and_output_layers():
    assert all(name.endswith("bias") for name in names(gpt2(2), "bitfit"))
    assert len(names(gpt2(2), "bitfit")) == 2 * 6 + 1
    assert names(tiny_bert(), "head") == ["classifier.weight", "classifier.bias"]
    assert names(tiny_llama(), "head") == ["lm_head.weight"]


@pytest.mark.parametrize("make", [lambda: gpt2(2), tiny_bert, tiny_llama], ids=["gpt2", "bert", "llama"])
@pytest.mark.parametrize("mode", ["all", "first:1", "lora2", "lora2:cs330", "loreft2", "probe", "loreft2:all"])
def test_what_a_mode_does_not_train_is_frozen_and_the_head_is_trained_in_all(make, mode):
    model = fs.fine_tuning_model(make(), mode, HEAD)
    chosen = set(fs.parameters_to_fine_tune(model, mode))
    assert {p for p in model.parameters() if p.requires_grad} == chosen
    assert set(model.node("head").parameters()) <= chosen
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "label": torch.tensor([1])}
    for _ in range(2):  # the first moves B of LoRA, the second A
        model(**batch).loss.backward()
        with torch.no_grad():
            for p in chosen:
                p -= 0.1 * p.grad if p.grad is not None else 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= {name for name, p in model.named_parameters() if p in chosen}


def test_lora_begins_at_the_base_exactly_and_its_first_gradient_flows():
    base, ids = gpt2(2).eval(), torch.tensor([[5, 6, 7]])
    expected = base(ids).logits.detach()
    model = fs.fine_tuning_model(base, "lora2:cs330").eval()
    logits = model(ids).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    of = {name: p.grad.abs().sum() for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad > 0 for name, grad in of.items() if name.endswith("B")) and len(of) == 12


@pytest.mark.parametrize(
    "mode, message",
    [
        ("lst", "unknown mode 'lst': use all, first, middle"),
        ("lora", "unknown mode"),
        ("first:9", "'first:9' asks for more blocks than there are, 2"),
        ("head", "tied to its embeddings"),
        ("lora4", "no such nodes. Build the model by"),
        ("probe", "it has no heads"),
    ],
)
def test_modes_that_are_not_known_or_select_nothing_are_errors(mode, message):
    with pytest.raises(ValueError, match=message):
        fs.parameters_to_fine_tune(gpt2(2), mode)


def test_quantised_weights_are_not_trained_and_what_stands_beside_them_is():
    base = tiny_llama()
    projection = base.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    for mode in ("all", "last:2", "middle"):
        with pytest.raises(ValueError, match=f"mode '{mode}' selects quantised weights, which cannot be trained"):
            fs.parameters_to_fine_tune(base, mode)
    assert fs.parameters_to_fine_tune(base, "last:1") == list(base.model.layers[2].parameters())
    model = fs.fine_tuning_model(base, "loreft2", HEAD)
    assert not any(p.requires_grad for p in base.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.node("head").parameters())


def test_blocks_without_attention_get_lora_too_and_biases_count_under_whatever_name():
    base = recurrent_lfm2()
    model = fs.fine_tuning_model(base, "lora2:cs330")
    beside = {str(node.name) for node in model.tuner.layer.plans["default"].graph.nodes}
    assert "lora_model_layers_0_conv_in_proj" in beside and "lora_model_layers_1_self_attn_out_proj" not in beside
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    deberta = tf.DebertaModel(tf.DebertaConfig(**shape, vocab_size=40))
    names = {name for name, p in deberta.named_parameters() if p in set(fs.parameters_to_fine_tune(deberta, "bitfit"))}
    assert names == {name for name, _ in deberta.named_parameters() if name.endswith("bias")} and any(
        name.endswith("q_bias") for name in names
    )


def test_no_biases_are_an_error():
    with pytest.raises(ValueError, match="'bitfit' selects nothing"):
        fs.parameters_to_fine_tune(tiny_llama(), "bitfit")


# --- LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gpt2(2), tiny_llama], ids=["Conv1D", "Linear"])
def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(make):
    model = fs.fine_tuning_model(make(), "lora3:cs330").double().eval()
    randomise(model)
    base, ids = model.get_base_model(), torch.tensor([[5, 6, 7, 8]])
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    expected = model(ids).logits
    with merged(model):
        torch.testing.assert_close(base(ids).logits, expected, atol=1e-10, rtol=0)
        assert not torch.equal(base(ids).logits, model.get_base_model()(ids * 0 + 9).logits)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert torch.equal(model(ids).logits, expected)


def test_merging_that_fails_leaves_the_weights():
    model = fs.fine_tuning_model(gpt2(2), "lora3:cs330")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), merged(model):
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lora_costs_what_the_formula_says():
    model = fs.fine_tuning_model(gpt2(1), "lora2:cs330")
    lines = fs.lora_table(model).columns
    assert fs.lora_ratio(2, 16, 48) == 2 * (16 + 48) / (16 * 48)
    assert list(lines[5].cells)[0] == f"{2 * (16 + 48) / (16 * 48):.2%}"  # c_attn
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert list(lines[4].cells)[-1] == f"{total:,}" and list(lines[6].cells)[-1] == f"{4 * total / 1024:.1f}"
    with pytest.raises(ValueError, match="1 or more"):
        fs.lora_ratio(0, 4, 4)

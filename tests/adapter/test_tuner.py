"""The PEFT method: whatever loads, switches or combines PEFT adapters does so with graphs, to the same logits."""

import json
import os

import peft
import pytest
import torch
import transformers as tf
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from support.models import WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama, tiny_t5

import reftheads as rh
from reftheads.adapter.config import _add_peft_type

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

IDS = random_ids()
LABELS = IDS.masked_fill(torch.arange(IDS.shape[1]) < 4, -100)  # a prompt of four tokens, an answer of three
MASK = torch.ones_like(IDS)


def reft(layer=1, name="edit", rank=2, positions="l2"):
    return rh.InterventionGraph(rh.Node(rh.LoReFT(rank=rank), layer, positions=positions, name=name))


def everything():
    """One node of every kind that keeps something: shared, constant, derived, LoRA, head, gated."""
    generator = torch.Generator().manual_seed(5)
    return rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), layer=0, positions="f2+l2", name="a", share="both"),
        rh.Node(rh.LoReFT(rank=2), layer=1, positions="f2+l2", name="b", share="both"),
        rh.Node(rh.Steering(vector=torch.randn(WIDTH, generator=generator), scale=0.5), layer=0, name="steer"),
        rh.Node(rh.Replace(torch.randn(WIDTH, generator=generator)), layer=1, positions="f1", name="put"),
        rh.Node(rh.LoRA(rank=2, alpha=4), layer=2, component="query_output", name="lora"),
        rh.Node(rh.LinearHead(outputs=1, loss="mse", target="y"), layer=1, positions="l1", name="probe"),
        rh.Node(rh.Gated(rh.NoDiReFT(rank=1)), layer=2, positions="all", name="gated", source="probe"),
        rh.Node(rh.ScaleAndBias(dtype="bfloat16"), layer=2, component="mlp_output", name="red"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a base model and of an adapter with random weights, and what the two say to `IDS`."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    model = rh.InterventionModel(base_of(folder), everything())
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()(IDS)


def base_of(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder / "base")


# --- one adapter, every way to have it ----------------------------------------------------------------------------


def test_the_model_is_what_get_peft_model_makes():
    first, second = tiny_llama(), tiny_llama()
    torch.manual_seed(7)
    ours = rh.InterventionModel(first, everything())
    torch.manual_seed(7)
    pefts = peft.get_peft_model(second, rh.InterventionConfig(graph=everything()))
    assert isinstance(ours, peft.PeftModel) and isinstance(pefts, peft.PeftModel)
    assert type(ours.base_model) is type(pefts.base_model)
    assert list(ours.state_dict()) == list(pefts.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), pefts.state_dict().values(), strict=True))
    assert torch.equal(ours(IDS).logits, pefts(IDS).logits)


WAYS = {
    "InterventionModel": lambda base, path, folder: rh.InterventionModel.from_pretrained(base, path),
    "InterventionModel, low memory": lambda base, path, folder: rh.InterventionModel.from_pretrained(
        base, path, low_cpu_mem_usage=True
    ),
    "InterventionModel, another name": lambda base, path, folder: rh.InterventionModel.from_pretrained(base, path, "x"),
    "PeftModel": lambda base, path, folder: peft.PeftModel.from_pretrained(base, path),
    "PeftModel, low memory": lambda base, path, folder: peft.PeftModel.from_pretrained(
        base, path, low_cpu_mem_usage=True
    ),
    "PeftModel, another name": lambda base, path, folder: peft.PeftModel.from_pretrained(base, path, adapter_name="x"),
    "AutoPeftModel": lambda base, path, folder: peft.AutoPeftModel.from_pretrained(path),
    "AutoPeftModelForCausalLM": lambda base, path, folder: peft.AutoPeftModelForCausalLM.from_pretrained(path),
    "load_adapter of transformers": lambda base, path, folder: base.load_adapter(path) and base,
    "load_adapter of transformers, another name": lambda base, path, folder: (
        base.load_adapter(path, adapter_name="x") and base
    ),
    "a second adapter": lambda base, path, folder: _second(base, path),
    "a second adapter, low memory": lambda base, path, folder: _second(base, path, low_cpu_mem_usage=True),
}


def _second(base, path, **options):
    model = rh.InterventionModel(base, reft(2))
    randomise(model, 9)
    model.load_adapter(path, "second", **options)
    model.set_adapter("second")
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_gives_the_same_logits(saved, way):
    folder, out = saved
    model = WAYS[way](base_of(folder), str(folder / "adapter"), folder)
    again = model(IDS)
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.predictions["probe"], out.predictions["probe"])
    assert not model.training


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(saved):
    folder, _ = saved
    frozen = rh.InterventionModel.from_pretrained(base_of(folder), folder / "adapter")
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = rh.InterventionModel.from_pretrained(base_of(folder), folder / "adapter", is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, _ in trained.named_parameters() if ".rh_nodes." in n
    }


def test_the_folder_is_three_files_that_any_peft_reader_knows(saved):
    adapter = saved[0] / "adapter"
    assert sorted(os.listdir(adapter)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card and "import reftheads as rh" in card and "LoReFT(rank=2) share=both" in card
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "REFTHEADS" and config["base_model_name_or_path"] == str(saved[0] / "base")
    assert rh.InterventionGraph.from_dict(config["graph"]) == everything()
    assert type(peft.PeftConfig.from_pretrained(adapter)) is rh.InterventionConfig


def test_the_checkpoint_names_no_adapter_and_holds_each_shared_tensor_once(saved):
    tensors = load_file(saved[0] / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.interventions.rh_nodes.") for name in tensors}
    assert names == {
        "both.M", "both.W", "both.b", "steer.v", "put.a", "lora.A", "lora.B", "probe.W", "probe.b",
        "gated.P", "gated.W", "gated.b", "red.s", "red.b",
    }  # fmt: skip
    assert tensors["base_model.model.interventions.rh_nodes.red.s"].dtype is torch.bfloat16


def test_sharing_survives_loading(saved):
    model = rh.InterventionModel.from_pretrained(base_of(saved[0]), saved[0] / "adapter")
    assert model.node("a") is model.node("b")


def test_add_adapter_of_transformers_trains_the_same_graph():
    base, wrapped = tiny_llama(), tiny_llama()
    torch.manual_seed(3)
    base.add_adapter(rh.InterventionConfig(graph=reft()))
    torch.manual_seed(3)
    model = rh.InterventionModel(wrapped, reft())
    assert torch.equal(base(IDS).logits, model(IDS).logits)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        f"interventions.rh_nodes.default.edit.{letter}" for letter in "MWb"
    }
    plain = tiny_llama()(IDS).logits
    base.disable_adapters()
    assert torch.equal(base(IDS).logits, plain)
    base.enable_adapters()
    assert not torch.equal(base(IDS).logits, plain)


@pytest.mark.parametrize("make, lm", [(tiny_gpt2, True), (tiny_t5, False)])
def test_other_architectures_load_as_well(tmp_path, make, lm):
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=2), [0, -1], "all")
    given = {"input_ids": IDS} if lm else {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    model = rh.InterventionModel(make(), graph)
    randomise(model)
    model.save_pretrained(tmp_path)
    for loaded in (rh.InterventionModel.from_pretrained(make(), tmp_path), _transformers(make(), tmp_path)):
        assert torch.equal(loaded(**given).logits, model(**given).logits)


def _transformers(base, path):
    base.load_adapter(str(path))
    return base


def test_a_task_type_gives_the_peft_class_of_the_task(tmp_path, saved):
    config = rh.InterventionConfig(graph=reft(), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_of(saved[0]), config)
    assert type(model) is peft.PeftModelForCausalLM
    randomise(model)
    model.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


# --- several adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def three():
    """Three adapters with different graphs, named after each other's nodes, and what each one says alone."""
    model = rh.InterventionModel(tiny_llama(), reft(0, "b"))
    model.add_adapter("b", reft(1, "default"))
    model.add_adapter("M", reft(2, "W", rank=3))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rh_nodes." in name:
                parameter.normal_()
    alone = {}
    for name in ("b", "M", "default"):
        model.set_adapter(name)
        alone[name] = model(IDS).logits
    return model, alone | {"__base__": tiny_llama()(IDS).logits}


def test_an_added_adapter_waits_until_it_is_set():
    model = rh.InterventionModel(tiny_llama(), reft())
    before = model(IDS).logits
    model.add_adapter("second", rh.InterventionConfig(graph=reft(2)))
    assert torch.equal(model(IDS).logits, before) and model.active_adapters == ["default"]
    model.set_adapter("second")
    assert not torch.equal(model(IDS).logits, before)
    assert all(".second." in n for n, p in model.named_parameters() if p.requires_grad)


def test_switching_back_and_forth_is_exact(three):
    model, alone = three
    for name in ("M", "default", "b", "default"):
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, alone[name])
        assert {n.split(".")[4] for n, p in model.named_parameters() if p.requires_grad} == {name}


def test_two_adapters_at_once_are_the_sum_of_their_graphs(three):
    model, _ = three
    model.set_adapter(["b", "M"])
    one = rh.InterventionModel(tiny_llama(), reft(1, "first") + reft(2, "second", rank=3))
    one.node("first").load_state_dict(model.node("default", "b").state_dict())
    one.node("second").load_state_dict(model.node("W", "M").state_dict())
    assert torch.equal(model(IDS).logits, one(IDS).logits)
    assert {n.split(".")[4] for n, p in model.named_parameters() if p.requires_grad} == {"b", "M"}


@pytest.mark.parametrize("names", [["b", "M"], ["__base__", "default"], ["M", "M"], ["__base__", "__base__"]])
def test_each_row_goes_through_its_own_adapter(three, names):
    model, alone = three
    rows = model(IDS, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(rows[row], alone[name][row], rtol=0, atol=1e-6)
    assert torch.equal(model(IDS).logits, alone["default"])  # and the choice ends with the call


def test_generate_takes_an_adapter_a_row(three):
    model, _ = three
    options = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    rows = model.generate(IDS, adapter_names=["b", "__base__"], **options)
    model.set_adapter("b")
    assert torch.equal(rows[0], model.generate(IDS, **options)[0])
    with model.disable_adapter():
        assert torch.equal(rows[1], model.generate(IDS, **options)[1])


def test_deleting_an_adapter_leaves_the_others_as_they_were(three):
    model, alone = three
    model.set_adapter(["b", "M"])
    model.delete_adapter("b")
    assert model.active_adapters == ["M"] and torch.equal(model(IDS).logits, alone["M"])
    assert not any(".rh_nodes.b." in n for n, _ in model.named_parameters())
    model.delete_adapter("M")
    assert torch.equal(model(IDS).logits, alone["default"])
    model.add_adapter("b", reft(2))
    model.set_adapter("b")
    assert model(IDS).logits.isfinite().all()


def test_each_adapter_is_saved_whole_though_its_nodes_bear_the_others_names(three, tmp_path):
    model, alone = three
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["M", "b"]
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "b", "anything")
    again.load_adapter(tmp_path, "other", subfolder="M")
    for name, saved_as in (("default", "default"), ("anything", "b"), ("other", "M")):
        again.set_adapter(name)
        assert torch.equal(again(IDS).logits, alone[saved_as])


def test_one_of_several_can_be_saved(three, tmp_path):
    model, alone = three
    model.save_pretrained(tmp_path, selected_adapters=["M"])
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "M")
    assert torch.equal(again(IDS).logits, alone["M"])


def test_weights_are_loaded_over_those_of_an_adapter_that_is_there(three, tmp_path):
    model, alone = three
    model.save_pretrained(tmp_path)
    randomise(model, 11)
    assert not torch.equal(model(IDS).logits, alone["default"])
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS).logits, alone["default"])


@pytest.mark.parametrize("wrap", [peft.get_peft_model, rh.InterventionModel])
def test_embeddings_that_peft_saves_beside_the_nodes_are_loaded_too(tmp_path, wrap):
    model = wrap(tiny_llama(), rh.InterventionConfig(graph=reft()))
    randomise(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


# --- what trainers rely on ------------------------------------------------------------------------------------------


def test_a_reference_adapter_is_copied_by_replacing_its_name_in_parameter_names():
    """As TRL does it for DPO and GRPO: every parameter of `default` must have one of `ref` under that rule."""
    model = rh.InterventionModel(tiny_llama(), everything())
    randomise(model)
    model.add_adapter("ref", everything())
    parameters = dict(model.named_parameters())
    ours = [name for name in parameters if ".default." in name]
    assert len(ours) == 12
    with torch.no_grad():
        for name in ours:
            parameters[name.replace(".default.", ".ref.")].copy_(parameters[name])
    out = model(IDS).logits
    model.set_adapter("ref")
    assert torch.equal(model(IDS).logits, out)


def test_only_nodes_get_gradients_and_only_nodes_are_counted(capsys):
    model = rh.InterventionModel(tiny_llama(), reft(rank=2))
    model(IDS, labels=LABELS).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"base_model.model.interventions.rh_nodes.default.edit.{letter}" for letter in "MWb"}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * WIDTH * 2 + 2
    assert total == sum(p.numel() for p in tiny_llama().parameters()) + trainable
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


def test_gradients_accumulate_as_over_one_batch():
    model = rh.InterventionModel(tiny_llama(), reft())
    model(IDS, labels=LABELS).loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(whole) == 3 and all(grad.any() for grad in whole.values())
    model.zero_grad()
    for row, labels in zip(IDS, LABELS, strict=True):
        (model(row[None], labels=labels[None]).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-7)


def test_whoever_asks_every_module_for_its_weight_gets_an_answer():
    model = rh.InterventionModel(tiny_llama(), reft())
    assert not hasattr(model.base_model.layer, "weight") and not hasattr(model.base_model.layer, "bias")
    for module in model.modules():
        getattr(module, "weight", None)


def test_the_graph_follows_the_mode_of_the_base_model():
    assert not rh.InterventionModel(tiny_llama(), reft()).base_model.layer.training
    assert rh.InterventionModel(tiny_llama().train(), reft()).base_model.layer.training


# --- registration ---------------------------------------------------------------------------------------------------


def test_the_type_is_registered_once():
    assert PeftType("REFTHEADS") is PeftType["REFTHEADS"] is PeftType.REFTHEADS is _add_peft_type("REFTHEADS")
    assert [t for t in PeftType if t.value == "REFTHEADS"] == [PeftType.REFTHEADS]
    assert json.dumps(PeftType.REFTHEADS) == '"REFTHEADS"' and "REFTHEADS" in list(PeftType)
    assert PeftType("LORA") is PeftType.LORA


def test_a_configuration_needs_a_graph():
    for given in (None, "lora", 3):
        with pytest.raises(ValueError, match=r"InterventionConfig needs graph=InterventionGraph\(…\), got"):
            rh.InterventionConfig(graph=given)
    with pytest.raises(ValueError, match="cannot read a graph"):
        rh.InterventionConfig(graph={"nodes": 3})
    assert rh.InterventionConfig(graph=reft().to_dict()).graph == reft()


def test_edits_cannot_be_merged_and_the_message_says_what_can():
    model = rh.InterventionModel(tiny_llama(), reft())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into weights. LoRA nodes can: "):
            merge()
    assert model(IDS).logits.isfinite().all()

"""Nodes and interventions: what they accept, and how they are written down."""

import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support.models import WIDTH, random_ids, tiny_llama
from torch import nn

import reftheads as rh
from reftheads.graph import Constant, Edit, Head, Intervention, Reader, Shape
from reftheads.graph.intervention import read_dtype


@dataclass(frozen=True)
class Amplify(Edit):
    """h ↦ h · (1 + strength · g), with a learned g for every feature."""

    strength: float = 1.0

    def parameters(self, shape):
        return {"g": nn.Parameter(torch.zeros(shape.width))}

    def edit(self, p, h, context):
        return h * (1 + self.strength * p["g"])


def test_a_type_of_ones_own_is_one_small_class(tmp_path):
    graph = rh.InterventionGraph(rh.Node(Amplify(strength=2.0), layer=1, name="mine"))
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    base, ids = tiny_llama(), random_ids()
    plain = base(ids).logits
    model = rh.InterventionModel(base, graph)
    assert torch.equal(model(ids).logits, plain)
    model.node("mine").assign(g=torch.full((WIDTH,), 0.5))
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)

    doubled = tiny_llama()
    doubled.model.layers[1].register_forward_hook(lambda module, args, h: h * 2)
    torch.testing.assert_close(again(ids).logits, doubled(ids).logits)


def test_a_type_that_is_not_imported_is_named_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        rh.Node.from_dict({"type": "Elsewhere", "layer": 0})
    assert "unknown type of node 'Elsewhere'" in str(error.value)
    assert "LoReFT" in str(error.value) and "import the module that defines it first" in str(error.value)


@pytest.mark.parametrize("given", [None, "LoReFT", 3, nn.Linear(2, 2)])
def test_a_node_needs_an_intervention(given):
    with pytest.raises(ValueError, match=r"a node needs an intervention such as LoReFT\(rank=4\), got"):
        rh.Node(given, layer=0)


def test_a_class_in_place_of_an_intervention_is_told_to_get_its_parentheses():
    with pytest.raises(ValueError, match="add parentheses to make one"):
        rh.Node(rh.LoReFT, layer=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a.b", "rh_a", "farh_a", "items", "training", "forward", 3])
@pytest.mark.parametrize("label", ["name", "share"])
def test_a_name_that_cannot_be_kept_in_a_checkpoint_is_refused(label, name):
    with pytest.raises(ValueError, match=f"{label} {name!r} cannot be used: take a word"):
        rh.Node(rh.LoReFT(rank=1), layer=0, **{label: name})


def test_a_gated_edit_needs_a_source():
    with pytest.raises(ValueError, match="Gated reads another node: name it with source=…"):
        rh.Node(rh.Gated(rh.LoReFT(rank=1)), layer=0)


def test_a_source_that_nobody_would_look_at_is_refused():
    with pytest.raises(ValueError, match="LoReFT reads no other node, got source='probe': leave it out, wrap an edit"):
        rh.Node(rh.LoReFT(rank=1), layer=0, source="probe")


def test_a_type_of_ones_own_may_read_a_source_or_do_without():
    @dataclass(frozen=True)
    class Nudge(Edit):
        reads_source = True

        def parameters(self, shape):
            return {}

        def edit(self, p, h, context):
            return h if context.source is None else h + context.source

    def logits(source):
        probe = rh.Node(rh.LinearHead(outputs=1), layer=0, positions="l1", name="probe")
        nudge = rh.Node(Nudge(), layer=1, positions="l1", source=source)
        torch.manual_seed(0)
        return rh.InterventionModel(tiny_llama(), rh.InterventionGraph(probe, nudge))(random_ids()).logits

    plain = tiny_llama()(random_ids()).logits
    assert torch.equal(logits(None), plain)
    assert not torch.equal(logits("probe")[:, -1], plain[:, -1])


def test_made_up_names_say_type_and_site():
    def name(intervention, *args, **kwargs):
        return rh.Node(intervention, *args, **kwargs).default_name()

    assert name(rh.LoReFT(rank=1), 3) == "loreft_3"
    assert name(rh.LoReFT(rank=1), 3, "query_output", head=2) == "loreft_3_query_output_head2"
    assert name(rh.LinearHead(outputs=2), -1, stack="encoder") == "linearhead_encoder_-1"
    assert name(rh.Collect(), component="final_norm_output") == "collect_final_norm_output"
    assert name(rh.Collect(), component="model.layers.0.mlp") == "collect_model_layers_0_mlp"


def test_defaults_are_left_out_of_the_written_node():
    assert rh.Node(rh.LoReFT(rank=4), layer=8, name="a").to_dict() == {
        "name": "a", "type": "LoReFT", "options": {"rank": 4}, "layer": 8, "positions": "all",
    }  # fmt: skip


def test_positions_by_a_function_cannot_be_written():
    node = rh.Node(rh.LoReFT(rank=1), layer=0, positions=lambda tokens: tokens.in_prompt, name="a")
    with pytest.raises(ValueError, match=r"cannot be saved: use a rule in words or Positions.where\(token_ids=…\)"):
        node.to_dict()


def test_a_constant_is_a_copy_of_what_was_given():
    given = torch.ones(3, requires_grad=True)
    constant = Constant(given)
    with torch.no_grad():
        given.zero_()
    assert constant.value.tolist() == [1, 1, 1] and not constant.value.requires_grad
    assert constant == Constant([5.0, 6.0, 7.0]) and hash(constant) == hash(Constant([5.0, 6.0, 7.0]))
    assert constant != Constant([1.0]) and constant != given
    assert repr(constant) == "Constant(3)" and repr(Constant(1.0)) == "Constant(scalar)"


@pytest.mark.parametrize("name", ["int8", "float33", "nn", 32, torch.int8])
def test_a_dtype_is_a_float_type_or_its_name(name):
    with pytest.raises(ValueError, match="dtype must be the name of a torch float type such as 'float32'"):
        read_dtype(name)
    assert read_dtype("bfloat16") is torch.bfloat16 and read_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [partial(rh.LoReFT, 4), partial(rh.LoRA, 4), rh.ScaleAndBias, partial(rh.LinearHead, 2)],
)
def test_a_type_of_torch_is_kept_by_its_name(make):
    intervention = make(dtype=torch.bfloat16)
    assert intervention == make(dtype="bfloat16") and intervention.dtype == "bfloat16"
    graph = rh.InterventionGraph(rh.Node(intervention, layer=0, name="a"))
    assert rh.InterventionGraph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert next(iter(intervention.parameters(Shape(8, 8)).values())).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="or the type itself, got torch.int8"):
        make(dtype=torch.int8)


def test_the_abstract_kinds_cannot_be_made():
    for kind in (Intervention, Edit, Reader, Head):
        with pytest.raises(TypeError, match="abstract"):
            kind()  # type: ignore[abstract]

"""Steering, replacing, ablating, gating and collecting, against hooks of the test's own."""

import pytest
import torch
from support.models import LAYERS, WIDTH, random_ids, randomise, tiny_llama, weighted
from torch import Tensor

import reftheads as rh

LAYER = 1
EXACT = {"atol": 1e-10, "rtol": 0}
VECTOR = torch.linspace(-1, 1, WIDTH)


def one_node(intervention, positions="2:5") -> rh.InterventionModel:
    graph = rh.InterventionGraph(rh.Node(intervention, LAYER, positions=positions, name="n"))
    return rh.InterventionModel(tiny_llama(), graph).eval()


def states(model, ids: Tensor, layer: int = LAYER) -> Tensor:
    """What leaves a block of a base model."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda m, args, out: seen.append(out))
    model(ids)
    handle.remove()
    return seen[0]


def hooked_logits(edit, ids: Tensor) -> Tensor:
    base = tiny_llama().double()

    def hook(module, args, h):
        return torch.cat([h[:, :2], edit(h[:, 2:5]), h[:, 5:]], dim=1)

    base.model.layers[LAYER].register_forward_hook(hook)
    return base(ids).logits


@pytest.mark.parametrize(
    "intervention, edit",
    [
        (rh.Steering(vector=VECTOR, scale=2.5), lambda h: h + 2.5 * VECTOR.double()),
        (rh.Steering(vector=VECTOR.tolist()), lambda h: h + VECTOR),
        (rh.Steering(vector=VECTOR, scale=-1.0, trainable=True), lambda h: h - VECTOR),
        (rh.Replace(VECTOR), lambda h: VECTOR.to(h).expand_as(h)),
        (rh.Ablate(), torch.zeros_like),
        (rh.Ablate(mean=VECTOR), lambda h: VECTOR.to(h).expand_as(h)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_logits_are_those_of_the_written_out_formula(intervention, edit):
    ids = random_ids()
    model = one_node(intervention).double()
    oracle = hooked_logits(edit, ids)
    torch.testing.assert_close(model(ids).logits, oracle, **EXACT)


def test_a_learned_direction_starts_at_zero_and_gets_scale_times_the_sum_of_the_gradients():
    ids = random_ids()
    model = one_node(rh.Steering(scale=3.0)).double()
    base = tiny_llama().double()
    torch.testing.assert_close(model(ids).logits, base(ids).logits, **EXACT)
    model(ids, labels=ids, prompt_mask=torch.ones_like(ids)).loss.backward()
    seen = []

    def hook(module, args, h):
        seen.append(h)
        h.retain_grad()

    base.model.layers[LAYER].register_forward_hook(hook)
    base(ids, labels=ids).loss.backward()
    gradient = dict(model.node("n").named_parameters())["v"].grad
    torch.testing.assert_close(gradient, 3.0 * seen[0].grad[:, 2:5].sum((0, 1)), **EXACT)


@pytest.mark.parametrize(
    "intervention, count",
    [
        (rh.Steering(), WIDTH),
        (rh.Steering(vector=VECTOR), 0),
        (rh.Steering(vector=VECTOR, trainable=True), WIDTH),
        (rh.Replace(VECTOR), 0),
        (rh.Ablate(), 0),
    ],
    ids=str,
)
def test_only_what_is_learned_is_trainable_and_given_numbers_are_saved(intervention, count, tmp_path):
    model = one_node(intervention)
    assert model.get_nb_trainable_parameters()[0] == count
    randomise(model)
    ids = random_ids()
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_nodes_made_from_one_vector_are_trained_apart():
    vector = VECTOR.clone()
    graph = rh.InterventionGraph.over(rh.Steering(vector=vector, trainable=True), range(LAYERS), name="n")
    model = rh.InterventionModel(tiny_llama(), graph)
    with torch.no_grad():
        dict(model.node("n_0").named_parameters())["v"].zero_()
    assert torch.equal(model.node("n_1").v, VECTOR)
    assert torch.equal(vector, VECTOR)


@pytest.mark.parametrize("make", [rh.Replace, lambda v: rh.Steering(vector=v), lambda v: rh.Ablate(mean=v)])
def test_a_vector_of_another_width_is_refused(make):
    with pytest.raises(ValueError, match=rf"must have shape \({WIDTH},\)"):
        one_node(make(torch.zeros(WIDTH + 1)))


# --- collecting ---


@pytest.mark.parametrize("positions, columns", [("all", slice(0, 7)), ("2:5", slice(2, 5)), ("l2", slice(5, 7))])
def test_collect_returns_the_activation_and_changes_nothing(positions, columns):
    ids = random_ids()
    model = one_node(rh.Collect(), positions)
    out = model(ids)
    base = tiny_llama()
    assert torch.equal(out.logits, base(ids).logits)
    assert torch.equal(out.collected["n"], states(base, ids)[:, columns])
    assert not out.collected["n"].requires_grad


def test_one_collected_token_a_row_has_no_dimension_of_slots():
    ids = random_ids()
    out = one_node(rh.Collect(), "l1")(ids)
    assert torch.equal(out.collected["n"], states(tiny_llama(), ids)[:, -1])


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_flow_through_what_was_collected_only_if_wanted(detach):
    graph = rh.InterventionGraph(
        rh.Node(rh.Steering(), 0, name="low"), rh.Node(rh.Collect(detach=detach), 2, name="high")
    )
    model = rh.InterventionModel(tiny_llama(), graph).eval()
    assert model(random_ids()).collected["high"].requires_grad == (not detach)


def test_what_was_collected_is_the_mean_to_ablate_with():
    ids = random_ids()
    mean = one_node(rh.Collect())(ids).collected["n"].mean((0, 1))
    edited = one_node(rh.Ablate(mean=mean), "all")(ids)
    assert torch.isfinite(edited.logits).all()
    out = rh.InterventionModel(
        tiny_llama(),
        rh.InterventionGraph(rh.Node(rh.Ablate(mean=mean), LAYER), rh.Node(rh.Collect(), LAYER, name="after")),
    ).eval()(ids)
    assert torch.equal(out.collected["after"], mean.expand(2, 7, WIDTH))


# --- gating ---


def gated(inner, head=None, reader_positions="l1", head_positions="l1", **site) -> rh.InterventionModel:
    graph = rh.InterventionGraph(
        rh.Node(head or rh.LinearHead(outputs=1), 0, positions=head_positions, name="probe"),
        rh.Node(rh.Gated(inner), 2, positions=reader_positions, name="n", source="probe", **site),
    )
    return rh.InterventionModel(tiny_llama(), graph).eval()


@pytest.mark.parametrize("head_positions, reader_positions", [("l1", "l1"), ("l1", "all"), ("all", "all")])
def test_a_gated_edit_goes_as_far_as_the_probe_lets_it_and_gradients_reach_both(head_positions, reader_positions):
    ids = random_ids()
    model = gated(rh.NoDiReFT(rank=2), None, reader_positions, head_positions).double()
    randomise(model)
    probe, edit = ({k: v.detach().clone().requires_grad_() for k, v in model.node(n).named_parameters()} for n in
                   ("probe", "n"))  # fmt: skip
    base = tiny_llama().double().requires_grad_(False)
    scores = []

    def read(module, args, h):
        at = h[:, -1:] if head_positions == "l1" else h
        scores.append(at @ probe["W"].T + probe["b"])

    def write(module, args, h):
        at = h[:, -1:] if reader_positions == "l1" else h
        new = at + torch.sigmoid(scores[0]) * ((at @ edit["W"].T + edit["b"]) @ edit["P"])
        return torch.cat([h[:, : h.shape[1] - at.shape[1]], new], dim=1)

    base.model.layers[0].register_forward_hook(read)
    base.model.layers[2].register_forward_hook(write)
    ours, oracle = model(ids), base(ids)
    torch.testing.assert_close(ours.logits, oracle.logits, **EXACT)
    torch.testing.assert_close(ours.predictions["probe"].reshape(scores[0].shape), scores[0], **EXACT)
    for logits in (ours.logits, oracle.logits):
        weighted(logits).backward()
    for name, leaves in (("probe", probe), ("n", edit)):
        for key, parameter in model.node(name).named_parameters():
            assert leaves[key].grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, leaves[key].grad, **EXACT)


@pytest.mark.parametrize("score, acts", [(100.0, True), (-200.0, False)])
def test_a_gate_is_open_or_shut_at_the_extremes(score, acts):
    ids = random_ids()
    model = gated(rh.Steering(vector=VECTOR))
    model.node("probe").assign(W=torch.zeros(1, WIDTH), b=torch.tensor([score]))
    edited = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(edited[:, -1], base[:, -1]) != acts


def test_a_gated_edit_is_saved_and_loaded(tmp_path):
    ids = random_ids()
    model = gated(rh.LoReFT(rank=2))
    randomise(model)
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.plan().graph == model.plan().graph
    assert torch.equal(again.node("n").R, model.node("n").R)


def test_lora_can_be_gated_where_the_module_is_linear_and_nowhere_else():
    ids = random_ids()
    model = gated(rh.LoRA(rank=2), component="query_output")
    randomise(model)
    with model.disable_adapter():
        base = model(ids).logits
    assert not torch.equal(model(ids).logits, base)
    with pytest.raises(ValueError, match="linear module"):
        gated(rh.LoRA(rank=2))


def test_a_gate_needs_a_source_with_one_output():
    with pytest.raises(ValueError, match="source"):
        rh.Node(rh.Gated(rh.Steering()), 1)
    with pytest.raises(ValueError, match="'n' reads 'probe', which has outputs=3: name a source with outputs=1"):
        gated(rh.Steering(), rh.LinearHead(outputs=3))
    with pytest.raises(ValueError, match="its source has 16 outputs"):
        gated(rh.Steering(), rh.Collect())(random_ids())


@pytest.mark.parametrize("inner", [rh.LinearHead(outputs=1), rh.Collect(), rh.LoReFT, None])
def test_only_an_edit_can_be_gated(inner):
    with pytest.raises(ValueError, match=r"Gated needs an edit such as LoReFT\(rank=4\), got"):
        rh.Gated(inner)

"""The ReFT family and scale-and-bias against their formulas, written out in hooks of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import WIDTH, random_ids, randomise, tiny_llama, weighted
from support.paths import ROOT
from torch import Tensor, nn

import reftheads as rh
from reftheads.graph import Context, Edit
from reftheads.graph.intervention import Shape
from reftheads.interventions.reft import orthonormalise
from reftheads.runtime.node_module import NodeModule

LAYER = 1
EXACT = {"atol": 1e-10, "rtol": 0}
ORTHONORMAL = [rh.LoReFT, rh.DiReFT, rh.ConsReFT, rh.LobiReFT]
READING = [rh.LoReFT, rh.NoReFT, rh.DiReFT, rh.NoDiReFT]


def qr_rows(m: Tensor) -> Tensor:
    """The rows of R are those of M after Gram-Schmidt: another algorithm than the library's."""
    q, r = torch.linalg.qr(m.mT)
    return (q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]).mT


# --- the equations of the paper, one by one ---


def loreft(h, p, act):
    R = qr_rows(p["M"])
    return h + (act(h @ p["W"].T + p.get("b", 0)) - h @ R.T) @ R


def noreft(h, p, act):
    return h + (act(h @ p["W"].T + p.get("b", 0)) - h @ p["P"].T) @ p["P"]


def direft(h, p, act):
    return h + act(h @ p["W"].T + p.get("b", 0)) @ qr_rows(p["M"])


def nodireft(h, p, act):
    return h + act(h @ p["W"].T + p.get("b", 0)) @ p["P"]


def consreft(h, p, act):
    R = qr_rows(p["M"])
    return h + (p["b"] - h @ R.T) @ R


def lobireft(h, p, act):
    return h + p["b"] @ qr_rows(p["M"])


def scale_and_bias(h, p, act):
    return h * p["s"] + p["b"]


FORMULAS = {
    rh.LoReFT: loreft, rh.NoReFT: noreft, rh.DiReFT: direft, rh.NoDiReFT: nodireft,
    rh.ConsReFT: consreft, rh.LobiReFT: lobireft,
}  # fmt: skip


@dataclass
class Result:
    logits: Tensor
    gradients: dict[str, Tensor]


def edited_by_reftheads(model: rh.InterventionModel, ids: Tensor) -> Result:
    logits = model(ids).logits
    weighted(logits).backward()
    gradients = {name: parameter.grad for name, parameter in model.node("n").named_parameters()}
    return Result(logits.detach(), gradients)  # type: ignore[arg-type]


def edited_by_hook(parameters: dict[str, Tensor], edit: Callable, ids: Tensor, columns: slice) -> Result:
    """The same base model, edited at the chosen columns by a hook that knows nothing of the library."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    base = tiny_llama().double().requires_grad_(False)

    def hook(module, args, output):
        before, middle, after = output[:, : columns.start], output[:, columns], output[:, columns.stop :]
        return torch.cat([before, edit(middle, leaves), after], dim=1)

    base.model.layers[LAYER].register_forward_hook(hook)
    logits = base(ids).logits
    weighted(logits).backward()
    return Result(logits.detach(), {name: leaf.grad for name, leaf in leaves.items()})  # type: ignore[misc]


def assert_same(ours: Result, oracle: Result) -> None:
    torch.testing.assert_close(ours.logits, oracle.logits, **EXACT)
    assert ours.gradients.keys() == oracle.gradients.keys()
    for name, gradient in oracle.gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours.gradients[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def one_node(intervention, positions="all", **where) -> rh.InterventionModel:
    graph = rh.InterventionGraph(rh.Node(intervention, LAYER, positions=positions, name="n", **where))
    return rh.InterventionModel(tiny_llama(), graph).eval()


CASES = [kind(rank=3) for kind in FORMULAS]
CASES += [kind(rank=3, bias=False) for kind in READING]
CASES += [kind(rank=3, act_fn=act) for kind in READING for act in ("relu", "tanh")]
CASES += [rh.LoReFT(rank=1), rh.LoReFT(rank=WIDTH)]


@pytest.mark.parametrize("positions, columns", [("all", slice(0, 7)), ("2:5", slice(2, 5))])
@pytest.mark.parametrize("intervention", CASES, ids=str)
def test_logits_and_gradients_are_those_of_the_written_out_formula(intervention, positions, columns):
    model = one_node(intervention, positions).double()
    randomise(model)
    ids = random_ids()
    act = {None: lambda x: x, "relu": torch.relu, "tanh": torch.tanh}[intervention.act_fn]
    formula = FORMULAS[type(intervention)]
    oracle = edited_by_hook(model.node("n").stored(), lambda h, p: formula(h, p, act), ids, columns)
    assert_same(edited_by_reftheads(model, ids), oracle)


def test_scale_and_bias_is_its_formula_and_starts_as_the_identity():
    model = one_node(rh.ScaleAndBias(), "2:5")
    ids = random_ids()
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base)
    model.double()
    randomise(model)
    oracle = edited_by_hook(model.node("n").stored(), lambda h, p: scale_and_bias(h, p, None), ids, slice(2, 5))
    assert_same(edited_by_reftheads(model, ids), oracle)


# --- options ---


@pytest.mark.parametrize("kind", [rh.LoReFT, rh.NoReFT, rh.DiReFT, rh.NoDiReFT, rh.LobiReFT])
def test_init_identity_changes_nothing(kind):
    model = one_node(kind(rank=3, init="identity"))
    ids = random_ids()
    edited = model(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(edited, model(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_identity_changes_nothing_when_many_nodes_are_derived_together(dtype):
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=4, init="identity", dtype=dtype), range(3))
    model = rh.InterventionModel(tiny_llama().to(getattr(torch, dtype)), graph).eval()
    ids = random_ids()
    edited = model(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(edited, model(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", READING)
def test_a_graph_that_starts_as_the_identity_still_learns(kind):
    model = one_node(kind(rank=3, init="identity"))
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in model.node("n").parameters())


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_parameters_and_edit_have_the_dtype_that_the_node_names(kind):
    node = one_node(kind(rank=3, dtype="bfloat16")).node("n")
    assert {parameter.dtype for parameter in node.parameters()} == {torch.bfloat16}
    model = one_node(kind(rank=3, dtype="bfloat16"))
    seen = []
    model.base_model.model.model.layers[LAYER + 1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ids = random_ids()
    model(ids)
    with model.disable_adapter():
        model(ids)
    edited, h = seen
    p = {name: value.detach() for name, value in model.node("n").stored().items()}
    oracle = FORMULAS[kind](h.double(), {n: v.double() for n, v in p.items()}, lambda x: x)
    assert edited.dtype == torch.float32
    assert torch.equal(edited, edited.bfloat16().float())
    torch.testing.assert_close(edited, oracle.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_dropout_acts_on_the_edited_states_in_training_and_never_in_eval(kind):
    torch.manual_seed(0)
    intervention, plain = kind(rank=3, dropout=0.5), kind(rank=3)
    node = NodeModule(intervention, Shape(WIDTH))
    h = torch.randn(2, 5, WIDTH)
    p = {**node.stored(), **intervention.derive(node.stored())}
    undropped = plain.edit(p, h, Context(training=True))
    assert torch.equal(intervention.edit(p, h, Context(training=False)), undropped)
    torch.manual_seed(7)
    dropped = intervention.edit(p, h, Context(training=True))
    torch.manual_seed(7)
    assert torch.equal(dropped, F.dropout(undropped, 0.5, training=True))


def test_a_model_in_training_mode_drops_and_in_eval_mode_does_not():
    model = one_node(rh.LoReFT(rank=3, dropout=0.5))
    ids = random_ids()
    still = model(ids).logits
    assert torch.equal(still, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(still, model(ids).logits)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rh.LoReFT(rank=0), "positive integer"),
        (lambda: rh.LoReFT(rank=2.5), "positive integer"),
        (lambda: rh.LoReFT(rank=2, act_fn="nonsense"), "unknown act_fn"),
        (lambda: rh.LoReFT(rank=2, init="zeros"), "init must be"),
        (lambda: rh.LoReFT(rank=2, dropout=1.0), "dropout must be"),
        (lambda: rh.LoReFT(rank=2, dtype="int8"), "float type"),
        (lambda: rh.ConsReFT(rank=2, act_fn="relu"), "leave act_fn and bias out"),
        (lambda: rh.LobiReFT(rank=2, bias=False), "leave act_fn and bias out"),
        (lambda: rh.ConsReFT(rank=2, init="identity"), "never the identity"),
        (lambda: rh.LoReFT(rank=2, init="identity", act_fn="relu"), "never the identity"),
        (lambda: one_node(rh.LoReFT(rank=WIDTH + 1)), f"rank {WIDTH + 1} is over the width {WIDTH}"),
        (lambda: rh.Node(rh.LoReFT, 1), "add parentheses"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- shared and tied parameters ---


def test_nodes_that_share_use_one_module_whose_gradient_is_the_sum():
    ids = random_ids()

    def graph(**share):
        return rh.InterventionGraph(
            rh.Node(rh.LoReFT(rank=2), 0, positions="f2", name="low", **share),
            rh.Node(rh.LoReFT(rank=2), 2, positions="l2", name="high", **share),
        )

    shared = rh.InterventionModel(tiny_llama(), graph(share="both")).double().eval()
    randomise(shared)
    apart = rh.InterventionModel(tiny_llama(), graph()).double().eval()
    assert shared.node("low") is shared.node("high")
    assert apart.node("low") is not apart.node("high")
    for name in ("low", "high"):
        apart.node(name).load_state_dict(shared.node(name).state_dict())
    logits = shared(ids).logits
    torch.testing.assert_close(logits, apart(ids).logits, **EXACT)
    weighted(logits).backward()
    weighted(apart(ids).logits).backward()
    for name, parameter in shared.node("low").named_parameters():
        parts = [dict(apart.node(node).named_parameters())[name].grad for node in ("low", "high")]
        torch.testing.assert_close(parameter.grad, parts[0] + parts[1], **EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_prefix_and_suffix_use_one_set_of_parameters_if_tied_and_two_if_not(tied):
    graph = rh.InterventionGraph.over(rh.LoReFT(rank=2), [LAYER], positions="f2+l3", tied=tied, name="n")
    assert len(graph) == (1 if tied else 2)
    model = rh.InterventionModel(tiny_llama(), graph).double().eval()
    randomise(model)
    ids = random_ids(tokens=9)
    first, last = (model.node(graph.names[0]).stored(), model.node(graph.names[-1]).stored())
    assert torch.equal(first["W"], last["W"]) == tied
    base = tiny_llama().double()

    def hook(module, args, h):
        identity = lambda x: x  # noqa: E731
        return torch.cat([loreft(h[:, :2], first, identity), h[:, 2:6], loreft(h[:, 6:], last, identity)], dim=1)

    base.model.layers[LAYER].register_forward_hook(hook)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, **EXACT)


# --- orthonormality ---


def deviation(r: Tensor) -> float:
    return (r @ r.mT - torch.eye(r.shape[-2], dtype=r.dtype)).abs().max().item()


@settings(max_examples=50, deadline=None)
@given(
    rank=st.integers(1, 8), extra=st.integers(0, 60), exponent=st.integers(-12, 12), seed=st.integers(0, 2**31),
    batch=st.sampled_from([(), (3,)]),
)  # fmt: skip
def test_orthonormalise_is_gram_schmidt_whatever_the_scale(rank, extra, exponent, seed, batch):
    m = torch.randn(*batch, rank, rank + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r = orthonormalise(m)
    conditioned = torch.linalg.cond(m).max() < 1e4
    if conditioned:
        torch.testing.assert_close(r, qr_rows(m), atol=1e-7, rtol=0)
        assert deviation(r) < 1e-7
        torch.testing.assert_close(orthonormalise(m * 10.0**exponent), r, atol=1e-7, rtol=0)
        torch.testing.assert_close(orthonormalise(r), r, atol=1e-10, rtol=0)


def test_the_gradient_through_orthonormalise_is_the_derivative():
    m = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormalise, m)


def train(node: NodeModule, steps: int, seed: int = 0) -> None:
    """Turns one set of states into another, as a regression would, with plain AdamW."""
    generator = torch.Generator().manual_seed(seed)
    h, target = (torch.randn(16, node.shape.width, generator=generator) for _ in range(2))
    optimiser = torch.optim.AdamW(node.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        out = node(None, h[None].to(node.dtype), Context()).float()
        (out - target).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("kind", ORTHONORMAL)
def test_rows_stay_orthonormal_over_1000_steps_of_adamw_with_weight_decay(kind, width):
    torch.manual_seed(0)
    node = NodeModule(kind(rank=8), Shape(width))
    before = node.R
    train(node, 1000)
    assert node.R.dtype == torch.float32
    assert deviation(node.R) < 1e-5
    assert (node.R - before).abs().max() > 0.01  # it did turn


def test_rows_stay_orthonormal_when_trained_on_after_save_and_load(tmp_path):
    torch.manual_seed(0)
    model = one_node(rh.LoReFT(rank=8))
    train(model.node("n"), 300)
    trained = model.node("n").R
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert torch.equal(again.node("n").R, trained)
    train(again.node("n"), 300, seed=1)
    assert deviation(again.node("n").R) < 1e-5


@pytest.mark.parametrize("how", ["dtype of the node", "model.to"])
def test_rows_are_orthonormal_in_float32_where_parameters_are_bfloat16(how):
    torch.manual_seed(0)
    model = one_node(rh.LoReFT(rank=8, dtype="bfloat16" if how == "dtype of the node" else "float32"))
    if how == "model.to":
        model.to(torch.bfloat16)
    node = model.node("n")
    train(node, 200)
    assert {parameter.dtype for parameter in node.parameters()} == {torch.bfloat16}
    assert node.R.dtype == torch.float32
    assert deviation(node.R) < 1e-5
    assert torch.isfinite(model(random_ids()).logits).all()


def test_autocast_touches_neither_the_rotation_nor_the_edit():
    ids = random_ids()
    model = one_node(rh.LoReFT(rank=8))
    randomise(model)
    seen = []
    model.get_base_model().model.layers[LAYER].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.get_base_model().model.layers[LAYER + 1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
        with model.disable_adapter():
            model(ids)
    edited, plain = seen[1], seen[3]
    p = {name: value.double() for name, value in model.node("n").stored().items()}
    torch.testing.assert_close(edited.double(), loreft(plain.double(), p, lambda x: x), atol=1e-4, rtol=0)


def test_weight_decay_alone_leaves_the_rotation_as_it_is():
    torch.manual_seed(0)
    node = NodeModule(rh.LoReFT(rank=4), Shape(64))
    before = node.R
    with torch.no_grad():
        dict(node.named_parameters())["M"].mul_(1e-6)
    torch.testing.assert_close(node.R, before, atol=1e-6, rtol=0)


def test_no_more_than_a_thin_matrix_is_stored():
    assert {name: tuple(t.shape) for name, t in NodeModule(rh.LoReFT(rank=4), Shape(64)).state_dict().items()} == {
        "M": (4, 64), "W": (4, 64), "b": (4,),
    }  # fmt: skip


# --- the letters of the paper ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_letters_are_read_and_assigned(dtype):
    node = one_node(rh.LoReFT(rank=2)).to(dtype).node("n")
    r = torch.eye(WIDTH)[:2]
    node.assign(R=r, W=torch.ones(2, WIDTH), b=torch.tensor([1.0, 2.0]))
    assert torch.equal(node.R, r.to(dtype))
    h = torch.randn(1, 3, WIDTH, dtype=dtype)
    expected = h.clone()
    expected[..., :2] = h.sum(-1, keepdim=True) + torch.tensor([1.0, 2.0], dtype=dtype)
    torch.testing.assert_close(node(None, h, Context()), expected)


@pytest.mark.parametrize(
    "letters, message",
    [
        ({"R": torch.ones(2, WIDTH)}, "orthonormal rows"),
        ({"R": torch.eye(WIDTH)[:3]}, "must have shape"),
        ({"Q": torch.eye(WIDTH)[:2]}, "no parameter 'Q'"),
    ],
)
def test_letters_that_do_not_fit_are_refused_and_change_nothing(letters, message):
    node = one_node(rh.LoReFT(rank=2)).node("n")
    before = {name: value.clone() for name, value in node.stored().items()}
    with pytest.raises(ValueError, match=message):
        node.assign(**letters)
    assert all(torch.equal(value, before[name]) for name, value in node.stored().items())


# --- pyreft and pyvene with the same weights ---


def pyreft_twin(intervention, p: dict[str, Tensor]) -> nn.Module:
    """pyreft's intervention of the same name, given the same weights."""
    interventions = pytest.importorskip("pyreft.interventions")
    kind = type(intervention)
    name = {rh.LoReFT: "Loreft", rh.NoReFT: "Noreft", rh.DiReFT: "Direft", rh.NoDiReFT: "Nodireft"}.get(kind)
    name = (name or {rh.ConsReFT: "Consreft", rh.LobiReFT: "Lobireft"}[kind]) + "Intervention"
    twin = getattr(interventions, name)(
        embed_dim=WIDTH, low_rank_dimension=intervention.rank, dtype=torch.float64,
        act_fn=intervention.act_fn, add_bias=False,
    ).double()  # fmt: skip
    with torch.no_grad():
        if intervention.orthonormal:
            twin.rotate_layer.weight = orthonormalise(p["M"]).T
        else:
            twin.proj_layer.weight.copy_(p["P"])
        if intervention.reads:
            twin.learned_source.weight.copy_(p["W"])
            twin.learned_source.bias.copy_(p["b"])
        else:
            twin.learned_source.copy_(p["b"])
    return twin


@pytest.mark.parametrize(
    "intervention", [k(rank=3) for k in FORMULAS] + [k(rank=3, act_fn="relu") for k in READING], ids=str
)
def test_edits_are_those_of_the_interventions_of_pyreft(intervention):
    torch.manual_seed(0)
    node = NodeModule(intervention, Shape(WIDTH)).double()
    h = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    twin = pyreft_twin(intervention, {name: value.detach() for name, value in node.stored().items()})
    torch.testing.assert_close(node(None, h, Context()), twin(h), **EXACT)


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_whole_forward_pass_is_that_of_pyreft(kind):
    pyreft = pytest.importorskip("pyreft")
    layers, columns = (0, 2), [0, 1, 5, 6]
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over(kind(rank=3), layers, "f2+l2", name="n"))
    model.double().eval()
    randomise(model)
    twins = [pyreft_twin(kind(rank=3), model.node(f"n_{layer}").stored()) for layer in layers]
    base = tiny_llama().double()
    config = pyreft.ReftConfig(
        representations=[
            {"layer": layer, "component": "block_output", "low_rank_dimension": 3, "intervention": twin}
            for layer, twin in zip(layers, twins, strict=True)
        ]
    )
    ids = random_ids()
    locations = [[columns] * len(ids)] * len(layers)
    _, out = pyreft.get_reft_model(base, config)(
        {"input_ids": ids}, unit_locations={"sources->base": (None, locations)}
    )
    torch.testing.assert_close(model(ids).logits, out.logits, **EXACT)


# --- a type of one's own ---


def documented_type() -> type[Edit]:
    """The example in docs/nodes.md, under a name that no other test uses."""
    text = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
    code = text[text.index("@dataclass") : text.index("\n\n\nbase, ")].replace("Amplify", "Documented")
    names = {"__name__": __name__, "dataclass": dataclass, "Edit": Edit, "nn": nn, "torch": torch}
    exec(code, names)
    return names["Documented"]  # type: ignore[return-value]


def test_a_type_of_ones_own_is_trained_saved_and_loaded_as_in_the_documentation(tmp_path):
    Documented = documented_type()
    ids = random_ids()
    model = one_node(Documented(strength=0.5), "2:5").double()
    randomise(model)
    oracle = edited_by_hook(model.node("n").stored(), lambda h, p: h * (1 + 0.5 * p["g"]), ids, slice(2, 5))
    ours = edited_by_reftheads(model, ids)
    assert_same(ours, oracle)
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama().double(), tmp_path).double()
    assert again.plan().graph == model.plan().graph
    torch.testing.assert_close(again(ids).logits, ours.logits, **EXACT)
    assert "Documented(strength=0.5)" in str(again.plan().graph)


def test_a_type_that_no_imported_module_defines_is_named_in_the_error(tmp_path):
    data = {"nodes": [{"name": "n", "type": "Nowhere", "layer": 1}]}
    with pytest.raises(ValueError, match="'Nowhere'.*import the module that defines it"):
        rh.InterventionGraph.from_dict(data)

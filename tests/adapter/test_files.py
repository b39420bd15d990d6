"""Files that are not trusted: an adapter is loaded as it was saved, or refused before anything is changed."""

import json
import multiprocessing
import os
import signal
import time
import warnings
from random import Random

import peft
import pytest
import torch
from safetensors import safe_open
from support.files import change_config, change_weights, damaged_copy
from support.models import VOCAB, WIDTH, random_ids, randomise, tiny_llama, tiny_t5

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

IDS = random_ids()
NODES = "base_model.model.interventions.rh_nodes."


def reft(layer=1, name="edit", rank=2, **options):
    return rh.InterventionGraph(rh.Node(rh.LoReFT(rank=rank, **options), layer, positions="l1", name=name))


def everything():
    """A graph with all that a configuration can hold: options of every type, a source, constants, token ids."""
    return rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2, dropout=0.1), 1, positions="l1", name="edit"),
        rh.Node(rh.LoRA(rank=2, alpha=4), 0, component="query_output", name="lora"),
        rh.Node(rh.Steering(torch.ones(WIDTH), scale=0.5), 0, positions="f2+l2", name="steer"),
        rh.Node(rh.LinearHead(1, target="y", loss="bce"), 0, positions="l1", name="probe"),
        rh.Node(rh.Gated(rh.LoReFT(rank=1)), 2, positions="l1", source="probe", name="gated"),
        rh.Node(
            rh.MLPHead(3, target="z", hidden=4, class_weights=(1.0, 2.0, 3.0)),
            -1,
            positions=rh.Positions.where([4, 7]),
            name="mlp",
        ),
        rh.Node(rh.Collect(), layer=1, component="head_output", head=1, name="seen"),
    )


def trained(graph=None, base=None):
    model = rh.InterventionModel(base or tiny_llama(), graph or reft())
    randomise(model)
    return model


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def state(model):
    """Whatever a load that fails could change."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return (
        [(n, type(m), m.training, [list(getattr(m, k).values()) for k in kinds]) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.detach().clone().tolist()) for n, p in model.named_parameters()],
        [(n, repr(c)) for n, c in getattr(model, "peft_config", {}).items()],
        list(getattr(model, "active_adapters", [])) if isinstance(model, peft.PeftModel) else None,
    )


def refused(folder, *words):
    """Loading raises a `ValueError` with all the words, onto a base model and beside an adapter; nothing changes."""
    base, model = tiny_llama(), trained(reft(2, "other"))
    model.add_adapter("second", reft(0, "third"))
    loads = (
        (base, lambda: rh.InterventionModel.from_pretrained(base, folder)),
        (model, lambda: model.load_adapter(folder, "new")),
    )
    for target, load in loads:
        before = state(target)
        with pytest.raises(ValueError) as error:
            load()
        missing = [word for word in words if word not in str(error.value)]
        assert not missing, f"{missing} not in: {error.value}"
        assert type(error.value) is ValueError and len(str(error.value)) < 3000
        assert state(target) == before


# --- names of adapters ----------------------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "a/b", "../up", "/absolute", "a\\b", "nul\0", "a\nb", "\x7f", " a", "a ", "x" * 256, "é" * 128,
    "CON", "lpt1", "__base__", "a:b", "a*", "a?", 'a"', "<a>", "a|b", "rh_x", "items", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_that_no_folder_or_module_can_have_is_refused_wherever_it_is_given(name, folder):
    config = rh.InterventionConfig(graph=reft())
    base, model = tiny_llama(), trained()
    acts = (
        (base, lambda: rh.InterventionModel(base, reft(), adapter_name=name)),
        (base, lambda: rh.InterventionModel.from_pretrained(base, folder, adapter_name=name)),
        (base, lambda: peft.get_peft_model(base, config, adapter_name=name)),
        (base, lambda: peft.PeftModel.from_pretrained(base, folder, adapter_name=name)),
        (base, lambda: peft.inject_adapter_in_model(config, base, adapter_name=name)),
        (model, lambda: model.add_adapter(name, reft(2))),
        (model, lambda: model.load_adapter(folder, name)),
    )
    before = sorted(folder.parent.rglob("*"))
    for target, act in acts:
        there = state(target)
        with pytest.raises(ValueError, match="adapter name .* cannot be used"):
            act()
        assert state(target) == there
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", [3, None, b"a", ["a"]])
def test_a_name_that_is_no_word_is_refused(name, folder):
    model = trained()
    for act in (
        lambda: rh.InterventionModel(tiny_llama(), reft(), adapter_name=name),
        lambda: rh.InterventionModel.from_pretrained(tiny_llama(), folder, adapter_name=name),
        lambda: model.add_adapter(name, reft(2)),
        lambda: model.load_adapter(folder, name),
    ):
        with pytest.raises(ValueError, match="adapter name .* cannot be used"):
            act()


@pytest.mark.parametrize(
    "name", ["emoji", "a-b_c", "größe", "🦩", "x" * 255, "lr=3e-4,seed=1", "my adapter", "default"]
)
def test_a_name_that_a_folder_can_have_is_saved_and_loaded(name, tmp_path):
    model = rh.InterventionModel(tiny_llama(), reft(), adapter_name=name)
    randomise(model)
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path / (name if name != "default" else ""), name)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


# --- tensors that are none of the adapter's -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.interventions.nothing",
        "base_model.model.model.interventions.rh_nodes.edit.W",
        "nothing",
        "",
    ],
)
def test_a_tensor_that_would_overwrite_the_base_model_is_refused_by_its_name(folder, name):
    tensors = tiny_llama().state_dict()
    value = tensors.get(name.removeprefix("base_model.model."), torch.ones(2)) + 1
    change_weights(folder, lambda t: t.update({name: value}))
    refused(folder, "would overwrite", repr(name.removeprefix("base_model.model.")))
    base = tiny_llama()
    with pytest.raises(ValueError, match="would overwrite"):
        peft.PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(base.state_dict()[n], tensor) for n, tensor in tensors.items())


def test_an_announced_tensor_that_is_no_embedding_is_refused_too(folder):
    name = "model.norm.weight"
    change_weights(folder, lambda t: t.update({f"base_model.model.{name}": torch.ones(WIDTH)}))
    change_config(folder, lambda c: c.update(embeddings=[name]))
    refused(folder, "would overwrite", repr(name))


FAULTS = {
    "two of one name": (
        lambda t: t.update({NODES.removeprefix("base_model.model.") + "edit.W": torch.ones(2, WIDTH)}),
        ("two tensors 'interventions.rh_nodes.edit.W'",),
    ),
    "integers": (
        lambda t: t.update({NODES + "edit.b": torch.ones(2).int()}),
        ("'edit.b' holds torch.int32", "float32"),
    ),
    "booleans": (lambda t: t.update({NODES + "edit.b": torch.ones(2).bool()}), ("'edit.b' holds torch.bool",)),
    "bytes": (lambda t: t.update({NODES + "edit.b": torch.ones(2).byte()}), ("'edit.b' holds torch.uint8",)),
    "complex": (lambda t: t.update({NODES + "edit.b": torch.ones(2) + 1j}), ("'edit.b' holds torch.complex64",)),
    "a scalar": (lambda t: t.update({NODES + "edit.b": torch.ones(())}), ("'edit.b' has shape ()",)),
    "a singular M": (
        lambda t: t.update({NODES + "edit.M": torch.ones(2, WIDTH)}),
        ("node 'edit'", "M of a LoReFT must have 2 rows that are independent"),
    ),
    "an M of zeros": (lambda t: t[NODES + "edit.M"].zero_(), ("rows that are independent",)),
    "an M that is not finite": (lambda t: t[NODES + "edit.M"][0].fill_(float("nan")), ("rows that are independent",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_nothing_can_be_computed_with_are_refused(folder, fault):
    change, words = FAULTS[fault]
    change_weights(folder, change)
    refused(folder, *words)
    with pytest.raises(ValueError):
        peft.PeftModel.from_pretrained(tiny_llama(), folder)


def test_weights_of_another_precision_are_loaded(folder):
    want = {name: tensor.bfloat16() for name, tensor in trained().node("edit").stored().items()}
    change_weights(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    node = rh.InterventionModel.from_pretrained(tiny_llama(), folder).node("edit")
    assert all(torch.equal(tensor, want[name].float()) for name, tensor in node.stored().items())


def test_weights_of_a_training_that_diverged_are_loaded_with_a_warning(folder):
    change_weights(folder, lambda t: t[NODES + "edit.W"].fill_(float("inf")))
    with pytest.warns(UserWarning, match="node 'edit' has parameters that are not finite: its training diverged"):
        rh.InterventionModel.from_pretrained(tiny_llama(), folder)


@pytest.mark.parametrize("kind", [rh.LoReFT, rh.DiReFT, rh.ConsReFT, rh.LobiReFT])
def test_a_matrix_without_a_rotation_is_not_assigned_either(kind):
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(rh.Node(kind(rank=2), 1, name="edit")))
    node = model.node("edit")
    before = {name: tensor.clone() for name, tensor in node.stored().items()}
    flat = torch.ones(2, WIDTH)
    for letters in (
        {"M": flat},
        {"R": flat},
        {"M": flat * 0},
        {"M": flat * float("nan")},
        {"b": [1.0, 2.0], "M": flat},
    ):
        with pytest.raises(ValueError, match="rows that are independent|needs orthonormal rows"):
            node.assign(**letters)
        assert all(torch.equal(tensor, before[name]) for name, tensor in node.stored().items())
    gated = rh.Node(rh.Gated(kind(rank=2)), 1, source="probe", positions="l1", name="edit")
    probe = rh.Node(rh.LinearHead(1, "y", loss="bce"), 0, positions="l1", name="probe")
    with pytest.raises(ValueError, match="rows that are independent"):
        rh.InterventionModel(tiny_llama(), rh.InterventionGraph(probe, gated)).node("edit").assign(M=flat)


# --- configurations -------------------------------------------------------------------------------------------------


def node(**fields):
    return lambda config: config["graph"]["nodes"][0].update(fields)


def options(**fields):
    return lambda config: config["graph"]["nodes"][0]["options"].update(fields)


CONFIGS = {
    "a rank of words": (options(rank="2"), ("rank of LoReFT must be int, got '2'",)),
    "a rank of true": (options(rank=True), ("rank of LoReFT must be int, got True",)),
    "a rank of 1.0": (options(rank=1.0), ("rank of LoReFT must be int, got 1.0",)),
    "a rank of none": (options(rank=None), ("rank of LoReFT must be int, got None",)),
    "a huge rank": (options(rank=10**10), ("rank 10000000000 is over the width 16",)),
    "a rank that is no number of any machine": (options(rank=10**30), ("rank of LoReFT must be int",)),
    "a list for a number": (options(dropout=[0.1]), ("dropout of LoReFT must be float, got [0.1]",)),
    "nan for a number": (options(dropout=float("nan")), ("dropout of LoReFT must be float, got nan",)),
    "a number for a flag": (options(bias=1), ("bias of LoReFT must be bool, got 1",)),
    "a number for a name": (options(act_fn=3), ("act_fn of LoReFT must be str | None, got 3",)),
    "an unknown word": (options(init="zero"), ("init of LoReFT must be", "got 'zero'")),
    "a dtype of integers": (options(dtype="int64"), ("dtype must be the name of a torch float type", "'int64'")),
    "a dtype that is something else in torch": (options(dtype="nn"), ("dtype must be", "'nn'")),
    "an unknown option": (options(rnk=2), ("LoReFT has no option 'rnk': it has rank, act_fn",)),
    "no option": (lambda c: c["graph"]["nodes"][0].pop("options"), ("LoReFT needs the option 'rank'",)),
    "options that are no object": (node(options=[1]), ("the options of LoReFT must be an object, got [1]",)),
    "a type of no words": (node(type=["LoReFT"]), ("unknown type of node ['LoReFT']",)),
    "an abstract type": (node(type="MappingHead", options={"outputs": 2}), ("unknown type of node 'MappingHead'",)),
    "no type": (lambda c: c["graph"]["nodes"][0].pop("type"), ("it needs a 'type'",)),
    "a layer of words": (node(layer="1"), ("needs a layer: an integer, got '1'",)),
    "a layer of true": (node(layer=True), ("needs a layer: an integer, got True",)),
    "a huge layer": (node(layer=10**30), ("out of range",)),
    "a head of words": (node(head="1", component="query_output"), ("head must be an integer, or None", "got '1'")),
    "a component of no words": (node(component=["block_output"]), ("unknown component ['block_output']",)),
    "a path of dots": (node(component="..", layer=None), ()),
    "a source of no words": (node(source=["a"]), ("source ['a'] cannot be used",)),
    "an unknown field": (node(colour="red"), ("it has no 'colour', but type, options, layer",)),
    "a name that is a path": (node(name="a.b"), ("name 'a.b' cannot be used",)),
    "a name of control characters": (node(name="a\0"), ("cannot be used",)),
    "a million terms": (node(positions="+".join(["0"] * 10**6)), ("at most 1000 terms, got 1,000,000",)),
    "two indices": (node(positions="0 1"), ("cannot read positions '0 1'",)),
    "a foreign digit": (node(positions="f١"), ("cannot read positions 'f١'",)),
    "a foreign index": (node(positions="１"), ("cannot read positions",)),
    "an underscore": (node(positions="1_0"), ("cannot read positions '1_0'",)),
    "a huge index": (node(positions="9" * 5000), ("cannot read positions '999",)),
    "token ids of words": (node(positions={"token_ids": ["7"]}), ("token_ids must be whole numbers", "'7'")),
    "token ids in a word": (node(positions={"token_ids": "79"}), ("token_ids must be a list", "'79'")),
    "token ids of true": (node(positions={"token_ids": [True]}), ("token_ids must be whole numbers", "True")),
    "no graph": (lambda c: c.update(graph=None), ("needs graph=InterventionGraph(…), got None",)),
    "no nodes": (lambda c: c.update(graph={"nodes": []}), ("needs at least one node",)),
    "nodes that are no list": (lambda c: c.update(graph={"nodes": {"a": 1}}), ("it needs a list under 'nodes'",)),
    "no type of adapter": (lambda c: c.pop("peft_type"), ("has the peft_type None",)),
    "an unknown type of adapter": (lambda c: c.update(peft_type="MINE"), ("has the peft_type 'MINE'",)),
    "a type of adapter of no words": (lambda c: c.update(peft_type=["LORA"]), ("has the peft_type ['LORA']",)),
    "modules to save": (lambda c: c.update(modules_to_save=["lm_head"]), ("no modules_to_save", "use a head")),
    "an inference mode of words": (lambda c: c.update(inference_mode="yes"), ("inference_mode in", "must be bool")),
    "a base model of no words": (lambda c: c.update(base_model_name_or_path=[1]), ("base_model_name_or_path in",)),
    "an unknown task": (lambda c: c.update(task_type="COOKING"), ("Invalid task type: 'COOKING'",)),
    "embeddings that are not there": (
        lambda c: c.update(embeddings=["lm_head.weight"]),
        ("announces 'lm_head.weight'", "does not hold it"),
    ),
    "gates within gates": (
        lambda c: c["graph"]["nodes"].__setitem__(0, _nested(300)),
        ("nested more than 32 deep",),
    ),
}


def _nested(depth):
    inner = {"type": "LoReFT", "options": {"rank": 2}}
    for _ in range(depth):
        inner = {"type": "Gated", "options": {"inner": inner}}
    return {**inner, "layer": 1, "positions": "l1", "name": "edit"}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_says_nonsense_is_refused(folder, case):
    change, words = CONFIGS[case]
    change_weights(folder)  # else the hash of the graph would tell alone
    change_config(folder, change)
    refused(folder, *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", ("holds [1], which is no object",)),
        ("null", ("holds None, which is no object",)),
        ('"graph"', ("which is no object",)),
        ("[" * 100_000 + "]" * 100_000, ("is damaged",)),
        ('{"a":' * 900 + "1" + "}" * 900, ("nested more than 32 deep",)),
        ('{"graph": 1, "graph": 2}', ("is damaged (a name twice in one object)",)),
        ("", ("is damaged",)),
        ("\0", ("is damaged",)),
        ("\udcff", ("is damaged",)),
        ('{"x": ' + "9" * 5000 + "}", ("is damaged",)),
        (" " * (2**26 + 1), ("a configuration has at most 67,108,864",)),
    ],
    ids=range(11),
)
def test_a_file_that_holds_no_configuration_is_refused(folder, text, words):
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, *words)


@pytest.mark.parametrize("outputs", [10**10, 10**18])
@pytest.mark.parametrize("alone", [True, False], ids=["a configuration alone", "with weights"])
@pytest.mark.parametrize(
    "head", [{"type": "LinearHead"}, {"type": "MLPHead", "hidden": 2}, {"type": "MLPHead", "outputs": 2}], ids=str
)
def test_sizes_that_no_memory_could_hold_are_refused_before_it_is_asked_for(folder, head, outputs, alone):
    kind, sizes = head["type"], {k: v for k, v in head.items() if k != "type"}
    sizes = {"outputs": outputs, **({"hidden": outputs} if "outputs" in sizes else {}), **sizes}
    change_weights(folder)
    change_config(
        folder, lambda c: c["graph"]["nodes"].append({"type": kind, "options": sizes, "layer": 1, "name": "big"})
    )
    if not alone:
        return refused(folder)
    base = tiny_llama()
    before = state(base)
    config = rh.InterventionConfig.from_pretrained(folder)
    for wrap in (rh.InterventionModel, peft.get_peft_model):
        with pytest.raises(ValueError, match="GB of memory are free|overflowed"):
            wrap(base, config)
    assert state(base) == before


@pytest.mark.parametrize("shape", [[10**10], [2**20, 2**19], [-1], ["16"], 16, [1.5], [True], [10**30], [1] * 9])
def test_a_constant_of_a_huge_or_impossible_shape_takes_no_memory(folder, shape):
    change_weights(folder)
    fields = {"type": "Steering", "options": {"vector": {"constant": shape}}, "layer": 1, "name": "big"}
    change_config(folder, lambda c: c["graph"]["nodes"].append(fields))
    refused(folder)


def test_a_number_of_layers_that_takes_forever_to_make_is_refused():
    with pytest.raises(ValueError, match="layers of MLPHead must be at most 1000, got 1,000,000,000"):
        rh.MLPHead(2, hidden=4, layers=10**9)


def test_a_node_of_ones_own_that_looks_at_its_first_numbers_is_made_and_loaded(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Balanced(rh.graph.Edit):
        scale: "float | Unknown" = 1.0  # noqa: F821, an annotation that nobody can look up

        def parameters(self, shape):
            v = torch.randn(shape.width)
            return {"v": torch.nn.Parameter(v / v.norm().item())}

        def edit(self, p, h, context):
            return h + self.scale * p["v"]

    graph = rh.InterventionGraph(rh.Node(Balanced(2), 1, name="own"))
    torch.manual_seed(3)
    model = rh.InterventionModel(tiny_llama(), graph)
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


# --- checksums and mixtures -----------------------------------------------------------------------------------------


def test_weights_carry_a_checksum_and_the_hash_of_their_graph_and_equal_adapters_equal_bytes(folder, tmp_path):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "reftheads checksum", "reftheads graph"}
    for i in range(3):
        trained().save_pretrained(tmp_path / str(i))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / str(i) / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("wrap", [rh.InterventionModel, peft.get_peft_model])
def test_every_bit_that_flips_is_noticed(tmp_path, wrap):
    model = wrap(tiny_llama(), rh.InterventionConfig(graph=reft()))
    randomise(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content, random = path.read_bytes(), Random(0)
    begin = 8 + int.from_bytes(content[:8], "little")
    for at in random.sample(range(begin, len(content)), 60):
        damaged = bytearray(content)
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: its checksum is not that of its tensors"):
            rh.InterventionConfig.from_pretrained(tmp_path)
    for load in (
        lambda: rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path),
        lambda: peft.PeftModel.from_pretrained(tiny_llama(), tmp_path),
        lambda: trained().load_adapter(tmp_path, "new"),
        lambda: trained().load_adapter(tmp_path, "default"),
    ):
        with pytest.raises(ValueError, match="is damaged: its checksum is not that of its tensors"):
            load()


def test_weights_without_metadata_load_as_before(folder):
    want = rh.InterventionModel.from_pretrained(tiny_llama(), folder)(IDS).logits
    change_weights(folder)
    assert torch.equal(rh.InterventionModel.from_pretrained(tiny_llama(), folder)(IDS).logits, want)


def test_a_graph_that_was_saved_with_other_weights_is_refused(tmp_path):
    trained(reft(1)).save_pretrained(tmp_path / "a")
    trained(reft(2)).save_pretrained(tmp_path / "b")  # whose tensors have the same names and shapes
    os.replace(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    refused(tmp_path / "a", "is a mixture with the adapter_config.json beside it", "saved with another graph")
    with pytest.raises(ValueError, match="is a mixture"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    # what the code says is meant, whatever lies beside
    model = trained(reft(2))
    model.load_adapter(tmp_path / "a", "default")


def test_a_configuration_of_another_graph_saved_over_an_adapter_is_a_mixture(folder):
    rh.InterventionConfig(graph=reft(2)).save_pretrained(folder)
    refused(folder, "is a mixture")
    rh.InterventionConfig(graph=reft(1), inference_mode=True).save_pretrained(folder)
    assert rh.InterventionModel.from_pretrained(tiny_llama(), folder).plan().graph == reft(1)


def test_a_configuration_saved_alone_lies_beside_no_weights(tmp_path):
    rh.InterventionConfig(graph=reft()).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["adapter_config.json"]
    assert rh.InterventionConfig.from_pretrained(tmp_path).graph == reft()


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


def _save_both_forever(target, ready):
    models = [rh.InterventionModel(tiny_llama(), reft(layer, rank=8)) for layer in (1, 2)]
    for value, model in enumerate(models):
        with torch.no_grad():
            for name in "Wb":
                getattr(model.node("edit"), name).fill_(value + 1.0)
    ready.set()
    while True:
        for model in models:
            model.save_pretrained(target)


def _save_until_a_move(target, moves):
    replace, moved = os.replace, []

    def counted(*paths):
        if len(moved) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(paths)
        replace(*paths)

    os.replace = counted
    trained(reft(2)).save_pretrained(target)


@needs_fork
def test_a_kill_before_any_of_the_moves_leaves_one_of_the_adapters_or_an_error(tmp_path):
    outcomes = []
    for moves in range(5):
        trained(reft(1)).save_pretrained(tmp_path / str(moves))
        process = multiprocessing.get_context("fork").Process(
            target=_save_until_a_move, args=(tmp_path / str(moves), moves)
        )
        process.start()
        process.join()
        try:
            model = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path / str(moves))
        except ValueError as error:
            assert "is a mixture" in str(error)
            outcomes.append("mixture")
        else:
            outcomes.append(model.plan().graph["edit"].site.layer)
    # the seal, the weights, the card and the configuration, in that order or with the last two exchanged
    assert outcomes in ([1, 1, "mixture", "mixture", 2], [1, 1, "mixture", 2, 2])


@needs_fork
@pytest.mark.slow
def test_a_kill_while_another_graph_is_saved_over_an_adapter_never_leaves_a_silent_mixture(tmp_path):
    target, context, random = tmp_path / "adapter", multiprocessing.get_context("fork"), Random(0)
    outcomes = []
    for _ in range(int(os.environ.get("REFTHEADS_KILLS", 20))):
        ready = context.Event()
        process = context.Process(target=_save_both_forever, args=(target, ready))
        process.start()
        ready.wait()
        while not (target / "adapter_config.json").exists():
            time.sleep(0.001)
        time.sleep(0.3 * random.random())
        process.kill()
        process.join()
        try:
            model = rh.InterventionModel.from_pretrained(tiny_llama(), target)
        except ValueError as error:
            assert "is a mixture" in str(error)
            outcomes.append("mixture")
        else:
            [layer] = [node.site.layer for node in model.plan().graph]
            assert {v for name in "Wb" for v in getattr(model.node("edit"), name).unique().tolist()} == {float(layer)}
            outcomes.append(layer)
    assert {1, 2} <= set(outcomes)
    trained(reft(1, rank=8)).save_pretrained(target)
    rh.InterventionModel.from_pretrained(tiny_llama(), target)
    assert not [path for path in tmp_path.rglob("*") if ".saving-" in path.name]
    print(*(f"{outcomes.count(outcome)} × {outcome}" for outcome in (1, 2, "mixture")), sep=", ")


# --- embeddings, and what else of the base model is trained ----------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    """A base model that knows the folder from which it came."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return lambda: type(tiny_llama()).from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("wrap", [rh.InterventionModel, peft.get_peft_model])
def test_embeddings_that_were_resized_are_saved_and_come_back(tmp_path, named, wrap):
    base = named()
    base.resize_token_embeddings(VOCAB + 3)
    model = wrap(base, rh.InterventionConfig(graph=reft()))
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["embeddings"] == ["lm_head.weight", "model.embed_tokens.weight"]
    for load in (rh.InterventionModel.from_pretrained, peft.PeftModel.from_pretrained):
        fresh = named()
        fresh.resize_token_embeddings(VOCAB + 3)
        ids = torch.tensor([[5, VOCAB + 2, 7]])
        assert torch.equal(load(fresh, tmp_path / "a").eval()(ids).logits, model.eval()(ids).logits)
    refused_base = named()
    with pytest.raises(ValueError, match=rf"call resize_token_embeddings\({VOCAB + 3}\) of the base model first"):
        rh.InterventionModel.from_pretrained(refused_base, tmp_path / "a")
    assert not hasattr(refused_base, "interventions")


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5, lambda: tiny_llama(tie_word_embeddings=True)])
def test_embeddings_that_are_trained_are_saved_and_come_back(tmp_path, make):
    model = trained(base=make())
    table = model.get_base_model().get_input_embeddings().weight
    table.requires_grad_(True)
    with torch.no_grad():
        table.mul_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(make(), tmp_path)
    given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if make is tiny_t5 else {})
    assert torch.equal(again(**given).logits, model(**given).logits)
    over = trained(base=make())
    over.load_adapter(tmp_path, "default")  # as a Trainer does to go on
    assert torch.equal(over(**given).logits, model(**given).logits)


def test_a_load_that_fails_late_leaves_the_model_as_it_was(folder, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", full)
    base, model = tiny_llama(), trained(reft(2, "other"))
    model.add_adapter("second", reft(0, "third"))
    model.set_adapter(["second", "default"])
    for target, load in (
        (base, lambda: rh.InterventionModel.from_pretrained(base, folder)),
        (model, lambda: model.load_adapter(folder, "new")),
    ):
        before = state(target)
        with pytest.raises(MemoryError):
            load()
        assert state(target) == before


def test_an_adapter_of_the_hub_is_checked_too(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo, name, **_: (folder / name).exists())
    fetch = lambda repo, name, **_: str(folder / name)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    for module in ("peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", fetch)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda **_: True)
    loads = (rh.InterventionModel.from_pretrained, peft.PeftModel.from_pretrained)
    want = rh.InterventionModel.from_pretrained(tiny_llama(), folder)(IDS).logits
    assert all(torch.equal(load(tiny_llama(), "me/emoji").eval()(IDS).logits, want) for load in loads)
    change_config(folder, lambda c: c["graph"]["nodes"][0].update(layer=2))
    for load in loads:
        with pytest.raises(ValueError, match="is a mixture"):
            load(tiny_llama(), "me/emoji")


def test_embeddings_that_are_left_out_are_said_to_be(tmp_path, named):
    base = named()
    base.resize_token_embeddings(VOCAB + 3)
    model = trained(base=base)
    with pytest.warns(UserWarning, match="trained or resized, .*embed_tokens.* the adapter does not hold"):
        model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["embeddings"] is None


def test_what_else_of_the_base_model_is_trained_is_said_not_to_be_saved(tmp_path):
    model = trained()
    model.get_base_model().model.norm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"model.norm.weight among them.*get_base_model\(\).save_pretrained"):
        model.save_pretrained(tmp_path)


def test_an_adapter_that_is_added_leaves_what_of_the_base_model_is_trained():
    model = trained()
    weight = model.get_base_model().model.norm.weight.requires_grad_(True)
    model.add_adapter("second", reft(2))
    assert weight.requires_grad


def test_a_checkpoint_with_a_trained_base_model_says_where_it_is(folder):
    tiny_llama().save_pretrained(folder / "base")
    with pytest.warns(UserWarning, match="weights of the base model too, which were trained with the adapter"):
        rh.InterventionModel.from_pretrained(tiny_llama(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rh.InterventionModel.from_pretrained(type(tiny_llama()).from_pretrained(folder / "base"), folder)


def test_modules_to_save_and_weighted_adapters_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"no modules_to_save, got \['lm_head'\]: use a head, such as LinearHead"):
        rh.InterventionConfig(graph=reft(), modules_to_save=["lm_head"])
    for wrap in (rh.InterventionModel, peft.get_peft_model):
        model = wrap(tiny_llama(), rh.InterventionConfig(graph=reft()))
        with pytest.raises(ValueError, match=r"no linear function of its parameters.*set_adapter\(\[…\]\)"):
            model.add_weighted_adapter(["default"], [1.0], "mixed")


# --- random damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False], ids=["with checksums", "without"])
def test_random_damage_is_an_error_or_does_nothing(tmp_path, sealed):
    """With checksums a model that loads is the one that was saved; without them a number may have changed."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    base, random = tiny_llama(), Random(int(sealed))
    model = trained(everything(), base)
    model.save_pretrained(good)
    want, plan = model(IDS), model.plan()
    plain = model.unload()(IDS).logits
    bad.mkdir()
    if not sealed:
        change_weights(good)
    for _ in range(250):
        damaged_copy(good, bad, random)
        try:
            loaded = rh.InterventionModel.from_pretrained(base, bad)
        except ValueError as error:
            assert type(error) is ValueError and 10 < len(str(error)) < 3000
        else:
            out = loaded(IDS)
            if sealed:
                assert loaded.plan().graph == plan.graph and torch.equal(out.logits, want.logits)
                assert all(torch.equal(out.predictions[name], want.predictions[name]) for name in want.predictions)
            loaded.unload()
        assert not hasattr(base, "interventions") and not hasattr(base, "peft_config")
    assert torch.equal(base(IDS).logits, plain)

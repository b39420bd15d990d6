"""Bad input: an error that says what was given, what is allowed and what to do, and a model as it was before."""

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LAYERS, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama

import reftheads as rh
from reftheads.runtime import compile_graph

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

IDS = random_ids()
REFT = rh.LoReFT(rank=2)


def graph(*args, intervention=REFT, **kwargs):
    return rh.InterventionGraph(rh.Node(intervention, *args, name=kwargs.pop("name", "edit"), **kwargs))


def traces(model):
    """Whatever wrapping a model could leave behind, and what it says."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return (
        [(n, type(m), m.training, [list(getattr(m, k).values()) for k in kinds]) for n, m in model.named_modules()],
        [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        set(vars(model)),
        model(IDS).logits.tolist(),
    )


def refused(model, act, *words):
    """`act` raises a `ValueError` with all the words, and leaves `model` as it was."""
    before = traces(model)
    with pytest.raises(ValueError) as error:
        act()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert traces(model) == before
    return str(error.value)


# --- what a graph cannot say ---------------------------------------------------------------------------------------


def test_an_unknown_component():
    with pytest.raises(ValueError) as error:
        graph(0, "block_outputs")
    assert all(w in str(error.value) for w in ("'block_outputs'", "block_output,", "mlp_activation", "dotted path"))


@pytest.mark.parametrize(
    "rule", ["x3", "f", "l-1", "f7+", "", "all3", "1:2:3", "f7,l7", "first", 1.5, None, ["l1"], {}]
)
def test_positions_that_cannot_be_read(rule):
    with pytest.raises(ValueError) as error:
        graph(0, positions=rule)
    assert "cannot read positions" in str(error.value) and "use f3, l1, f7+l7, all, prompt" in str(error.value)


def test_a_list_of_positions_is_told_to_be_a_sum():
    with pytest.raises(ValueError, match=r"cannot read positions \[0, 1\]: use .* or a sum such as 0\+1"):
        graph(0, positions=[0, 1])


def test_no_token_ids():
    with pytest.raises(ValueError, match="needs at least one token id, got none"):
        rh.Positions.where([])


def test_a_name_twice():
    nodes = [rh.Node(REFT, layer=i, name="emoji") for i in (0, 1)]
    with pytest.raises(ValueError, match="the graph has the name 'emoji' twice: every node needs its own"):
        rh.InterventionGraph(*nodes)


def test_a_cycle():
    nodes = [rh.Node(rh.Gated(REFT), 0, positions="l1", name=a, source=b) for a, b in ("ab", "bc", "ca")]
    with pytest.raises(ValueError, match="the sources form a cycle: a ← b ← c ← a"):
        rh.InterventionGraph(*nodes)


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output", "embedding_output"])
def test_a_head_index_where_there_are_no_heads(component):
    layer = None if component == "embedding_output" else 0
    with pytest.raises(
        ValueError, match=f"'{component}' has no attention heads: head=1 goes with query_output, key_output"
    ):
        graph(layer, component, head=1)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "4", None])
@pytest.mark.parametrize("kind", [rh.LoReFT, rh.NoDiReFT, rh.LobiReFT, rh.LoRA])
def test_a_rank_that_is_no_positive_integer(kind, rank):
    with pytest.raises(ValueError, match=f"rank of {kind.__name__} must be a positive integer, got {rank!r}"):
        kind(rank=rank)


# --- what a model does not have -------------------------------------------------------------------------------------

UNFIT = {
    "a layer above": (lambda: graph(LAYERS), ("layer 3 is out of range", "this llama has layers 0 to 2")),
    "a layer below": (lambda: graph(-4), ("layer -4 is out of range", "layers 0 to 2 (or -3 to -1)")),
    "a head": (
        lambda: graph(0, "query_output", head=4),
        ("head 4 is out of range", "query_output of this llama has heads 0 to 3"),
    ),
    "a key head": (lambda: graph(0, "key_output", head=2), ("head 2 is out of range", "heads 0 to 1")),
    "a stack": (lambda: graph(0, stack="encoder"), ("this llama has no encoder", "leave stack out")),
    "a path": (
        lambda: graph(component="model.layers.0.mpl"),
        ("no module 'model.layers.0.mpl'", "did you mean 'model.layers.0.mlp'"),
    ),
    "a list": (lambda: graph(component="model.layers"), ("is a list of modules", "name one of its members")),
    "a rank over the width": (
        lambda: graph(0, intervention=rh.LoReFT(rank=WIDTH + 1)),
        ("rank 17", "over the width 16", "'edit'"),
    ),
    "a rank over the width of a head": (
        lambda: graph(0, "query_output", head=0, intervention=rh.LoReFT(rank=5)),
        ("rank 5", "over the width 4", "'edit'"),
    ),
    "a rank of LoRA over the widths": (
        lambda: graph(0, "key_output", intervention=rh.LoRA(rank=9)),
        ("rank 9", "16 → 8", "'edit'"),
    ),
    "a vector of another width": (
        lambda: graph(0, intervention=rh.Steering(torch.ones(5))),
        ("steering vector", "(16,)", "got (5,)", "'edit'"),
    ),
    "LoRA without linear": (
        lambda: graph(0, intervention=rh.LoRA(rank=2)),
        ("LoRA acts on the output of a linear module", "query_output"),
    ),
    "the second of two nodes": (
        lambda: graph(0) + graph(1, intervention=rh.LoReFT(rank=99), name="late"),
        ("rank 99", "'late'"),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_alone(case):
    make, words = UNFIT[case]
    base = tiny_llama()
    refused(base, lambda: rh.InterventionModel(base, make()), *words)
    refused(base, lambda: peft.get_peft_model(base, rh.InterventionConfig(graph=make())), *words)
    if words[0].split()[0] not in ("rank", "steering"):  # those show when parameters are made
        refused(base, lambda: compile_graph(make(), base), *words)


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_does_not_fit_leaves_the_others_alone(case):
    make, words = UNFIT[case]
    model = rh.InterventionModel(tiny_llama(), graph(1))
    randomise(model)
    refused(model, lambda: model.add_adapter("second", make()), *words)
    assert list(model.peft_config) == ["default"] and list(model.tuner.layer.plans) == ["default"]
    model.add_adapter("second", graph(2))


def test_what_is_no_graph():
    base = tiny_llama()
    for given in (None, "loreft", [rh.Node(REFT, layer=0)], peft.LoraConfig(target_modules=["q_proj"])):
        refused(base, lambda given=given: rh.InterventionModel(base, given), "needs an InterventionGraph or", "got")


@pytest.mark.parametrize("name", ["a.b", "rh_x", "", "items"])
def test_an_adapter_name_that_cannot_be_kept(name):
    base = tiny_llama()
    refused(base, lambda: rh.InterventionModel(base, graph(0), name), "adapter name", "cannot be used")


# --- what a checkpoint cannot be -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = rh.InterventionModel(tiny_llama(), graph(1))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def cut(folder: Path, length: int) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])


def rewrite(folder: Path, change) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)


def configure(folder: Path, change) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


NODES = "base_model.model.interventions.rh_nodes."
DAMAGE = {
    "truncated": (
        lambda f: cut(f, 200),
        ("adapter_model.safetensors is truncated or damaged", "save or copy it again"),
    ),
    "truncated at the end": (lambda f: cut(f, -1), ("is truncated or damaged", "save or copy it again")),
    "empty": (lambda f: cut(f, 0), ("is truncated or damaged", "save or copy it again")),
    "garbage": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 999), ("is truncated or damaged",)),
    "a tensor missing": (
        lambda f: rewrite(f, lambda t: t.pop(NODES + "edit.W")),
        ("no weights for 'edit.W'", "does not fit"),
    ),
    "a tensor too many": (
        lambda f: rewrite(f, lambda t: t.update({NODES + "other.W": torch.ones(2)})),
        ("'other.W', which the graph does not have",),
    ),
    "a tensor of another shape": (
        lambda f: rewrite(f, lambda t: t.update({NODES + "edit.b": torch.ones(3)})),
        ("'edit.b' has shape (3,)", "needs (2,)"),
    ),
    "weights of something else": (
        lambda f: rewrite(f, lambda t: (t.clear(), t.update(lora_A=torch.ones(2)))),
        ("no weights for 'edit.M'",),
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ("holds no adapter_model.safetensors",)),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), ("Can't find 'adapter_config.json'",)),
    "a damaged configuration": (
        lambda f: (f / "adapter_config.json").write_text('{"graph": '),
        ("adapter_config.json", "damaged", "copy it again"),
    ),
    "no graph": (lambda f: configure(f, lambda c: c.pop("graph")), ("needs graph=InterventionGraph",)),
    "a graph of nonsense": (
        lambda f: configure(f, lambda c: c.update(graph=[1])),
        ("needs graph=InterventionGraph(…), got [1]",),
    ),
    "an unknown type of node": (
        lambda f: configure(f, lambda c: c["graph"]["nodes"][0].update(type="Mine")),
        ("unknown type of node 'Mine'", "import the module that defines it"),
    ),
    "another method": (
        lambda f: configure(f, lambda c: (c.clear(), c.update(peft_type="LORA", target_modules=["q_proj"]))),
        ("LORA adapter, not an intervention graph", "load it by peft"),
    ),
    "a pickle": (
        to_pickle,
        ("holds adapter_model.bin, a pickle", "convert it to adapter_model.safetensors", "save_file"),
    ),
    "nothing": (lambda f: shutil.rmtree(f), ("adapter_config.json",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_leaves_the_model_alone(folder, damage):
    spoil, words = DAMAGE[damage]
    spoil(folder)
    base = tiny_llama()
    refused(base, lambda: rh.InterventionModel.from_pretrained(base, folder), *words)
    model = rh.InterventionModel(tiny_llama(), graph(2))
    randomise(model)
    refused(model, lambda: model.load_adapter(folder, "second"), *words)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "damage", ["truncated", "a tensor missing", "a tensor of another shape", "a pickle", "no weights"]
)
def test_loading_over_an_adapter_leaves_it_alone_if_it_fails(folder, damage):
    DAMAGE[damage][0](folder)
    model = rh.InterventionModel(tiny_llama(), graph(1))
    randomise(model, 5)
    refused(model, lambda: model.load_adapter(folder, "default"), *DAMAGE[damage][1])


def test_weights_that_need_unpickling_are_never_unpickled(folder, monkeypatch):
    to_pickle(folder)
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    base, model = tiny_llama(), rh.InterventionModel(tiny_llama(), graph(1))
    for load in (
        lambda: rh.InterventionModel.from_pretrained(base, folder),
        lambda: rh.InterventionConfig.from_pretrained(folder),
        lambda: peft.PeftModel.from_pretrained(base, folder),
        lambda: peft.get_peft_model(tiny_llama(), model.peft_config["default"]).load_adapter(folder, "new"),
        lambda: model.load_adapter(folder, "new"),
        lambda: model.load_adapter(folder, "default"),
    ):
        with pytest.raises(ValueError, match="adapter_model.bin, a pickle, which could run any code: convert it"):
            load()
    with pytest.raises((ValueError, OSError), match="adapter_model"):
        tiny_llama().load_adapter(str(folder))


def test_a_pickle_beside_the_weights_does_no_harm(folder, monkeypatch):
    shutil.copy(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    for load in (rh.InterventionModel.from_pretrained, peft.PeftModel.from_pretrained):
        assert load(tiny_llama(), folder)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("cached", [True, False])
def test_a_pickle_on_the_hub_is_refused_too(monkeypatch, folder, cached):
    """Asked of the Hub, and offline of its cache."""
    files = {"adapter_model.bin", "adapter_config.json"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", cached)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo, name, **_: name in files)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, name, *_, **__: name if name in files else None
    )
    for module in ("peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda repo, name, **_: str(folder / name))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    for load in (rh.InterventionModel.from_pretrained, peft.PeftModel.from_pretrained):
        with pytest.raises(ValueError, match="me/emoji holds adapter_model.bin, a pickle"):
            load(tiny_llama(), "me/emoji")


@pytest.mark.parametrize(
    "other, words",
    [
        (
            lambda: tiny_llama(hidden_size=32),
            ("'edit.M' has shape (2, 16)", "needs (2, 32)", "the model that it was trained on"),
        ),
        (lambda: tiny_llama(num_hidden_layers=1), ("layer 1 is out of range", "layers 0 to 0")),
    ],
)
def test_an_adapter_of_another_model_is_refused(folder, other, words):
    base = other()
    refused(base, lambda: rh.InterventionModel.from_pretrained(base, folder), *words)


def test_an_adapter_whose_module_path_another_model_lacks_is_refused(tmp_path):
    model = rh.InterventionModel(tiny_llama(), graph(component="model.layers.1.mlp.gate_proj"))
    model.save_pretrained(tmp_path)
    base = tiny_gpt2()
    refused(base, lambda: rh.InterventionModel.from_pretrained(base, tmp_path), "this gpt2 has no module", "gate_proj")


def test_a_failed_load_gives_back_what_was_trainable(folder):
    cut(folder, 100)
    base = tiny_llama()
    base.model.layers[0].requires_grad_(False)
    before = copy.deepcopy([p.requires_grad for p in base.parameters()])
    with pytest.raises(ValueError):
        rh.InterventionModel.from_pretrained(base, folder)
    assert [p.requires_grad for p in base.parameters()] == before


def test_adapter_names_that_do_not_match_the_rows():
    model = rh.InterventionModel(tiny_llama(), graph(1))
    with pytest.raises(ValueError, match="adapter_names has 3 entries for 2 rows: give one a row"):
        model(IDS, adapter_names=["default"] * 3)
    assert model(IDS).logits.isfinite().all()

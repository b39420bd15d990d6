"""InterventionModel: access to nodes, exact reversal, saving that a kill cannot spoil, dtypes and quantised bases."""

import copy
import gc
import multiprocessing
import os
import time
import types
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import LAYERS, WIDTH, random_ids, randomise, tiny_llama, tiny_t5
from torch import nn

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

IDS = random_ids()
LABELS = IDS.masked_fill(torch.arange(IDS.shape[1]) < 4, -100)  # a prompt of four tokens, an answer of three
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def reft(layer=1, name="edit", rank=2, positions="l2"):
    return rh.InterventionGraph(rh.Node(rh.LoReFT(rank=rank), layer, positions=positions, name=name))


def trained(base=None, graph=None):
    """An intervention model whose edit is far from doing nothing."""
    model = rh.InterventionModel(base or tiny_llama(), graph or reft())
    randomise(model)
    return model


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {(n, k): list(getattr(m, k).values()) for n, m in model.named_modules() for k in kinds if getattr(m, k)}


# --- nodes and summary --------------------------------------------------------------------------------


def test_a_node_is_read_and_set_by_the_papers_letters():
    model = rh.InterventionModel(tiny_llama(), reft())
    node = model.node("edit")
    assert (node.R.shape, node.W.shape, node.b.shape) == ((2, WIDTH), (2, WIDTH), (2,))
    r = torch.eye(WIDTH)[:2]
    node.assign(R=r, W=torch.zeros(2, WIDTH), b=[3.0, -3.0])
    seen = {}
    model.get_base_model().model.layers[2].register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    model(IDS)
    assert torch.allclose(seen["h"][:, -2:, :2], torch.tensor([3.0, -3.0]), atol=1e-5)  # Rh = b in the subspace
    assert not torch.allclose(seen["h"][:, :-2, :2], torch.tensor([3.0, -3.0]), atol=1e-1)


def test_an_unknown_node_or_adapter_is_a_key_error_that_names_the_known():
    model = rh.InterventionModel(tiny_llama(), reft())
    with pytest.raises(KeyError, match="no node 'emoji' in this graph: it has edit"):
        model.node("emoji")
    for ask in (model.summary, model.plan, lambda adapter: model.node("edit", adapter)):
        with pytest.raises(KeyError, match="no adapter 'other': there are default"):
            ask("other")


def test_the_summary_has_a_line_a_node_and_a_total(capsys):
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), layer=-1, positions="l1", name="a", share="s"),
        rh.Node(rh.LoReFT(rank=2), layer=0, positions="f1", name="b", share="s"),
        rh.Node(rh.LoRA(rank=1), layer=1, component="key_output", name="c"),
        rh.Node(rh.Steering(torch.ones(WIDTH)), layer=0, name="d"),
    )
    model = rh.InterventionModel(tiny_llama(), graph)
    model.summary()
    header, *lines, total = capsys.readouterr().out.rstrip("\n").split("\n")
    assert header.split() == ["node", "what", "where", "module", "width", "positions", "parameters"]
    assert lines[0].split() == [
        "a",
        "LoReFT(rank=2)",
        f"block_output[{LAYERS - 1}]",
        "model.layers.2:output",
        "16",
        "l1",
        "66",
    ]
    assert lines[1].split()[-2:] == ["(shared)", "66"]
    assert "model.layers.1.self_attn.k_proj:output" in lines[2] and lines[2].split()[-3:] == ["8", "all", "24"]
    assert lines[3].split()[-1] == "0"
    assert total.split() == ["total", f"{66 + 24}"] == ["total", f"{model.get_nb_trainable_parameters()[0]}"]


# --- reversal --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_model_is_in_the_mode_of_its_base(training):
    base = tiny_llama().train(training)
    base.model.layers[0].train(not training)
    modes = [(module, module.training) for module in base.modules()]
    model = rh.InterventionModel(base, reft())
    assert model.training == model.tuner.training == model.node("edit").training == training
    assert all(module.training == mode for module, mode in modes)


def test_disable_adapter_is_the_base_bit_for_bit():
    plain = tiny_llama()
    model = trained()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
    assert not torch.equal(model(IDS).logits, plain(IDS).logits)


def test_unload_gives_the_base_back_with_nothing_left_on_it():
    base, plain = tiny_llama(), tiny_llama()
    attributes, modules = set(vars(base)), [n for n, _ in base.named_modules()]
    model = trained(base)
    model(IDS)
    model.generate(IDS, max_new_tokens=2)
    assert model.unload() is base
    assert torch.equal(base(IDS).logits, plain(IDS).logits)
    assert torch.equal(base.generate(IDS, max_new_tokens=4), plain.generate(IDS, max_new_tokens=4))
    assert hooks(base) == {} and set(vars(base)) == attributes and [n for n, _ in base.named_modules()] == modules
    assert torch.equal(trained(base)(IDS).logits, trained()(IDS).logits)  # and it can be wrapped again


def test_hooks_of_the_user_survive():
    base, calls = tiny_llama(), []
    base.model.layers[1].register_forward_hook(lambda *_: calls.append("after"))
    base.model.layers[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    mine = hooks(base)
    model = trained(base)
    model(IDS)
    model.base_model.layer  # noqa: B018
    late = base.model.layers[2].register_forward_hook(lambda *_: calls.append("late"))
    model(IDS)
    assert calls == ["before", "after", "before", "after", "late"]
    late.remove()
    model.unload()
    assert hooks(base) == mine


def test_two_wraps_of_one_model_are_refused_and_the_first_goes_on():
    base = tiny_llama()
    first = trained(base)
    out, config = first(IDS).logits, first.peft_config["default"]
    for wrap in (
        lambda: rh.InterventionModel(base, reft(2, "other")),
        lambda: peft.get_peft_model(base, rh.InterventionConfig(graph=reft(2, "other"))),
    ):
        with pytest.raises(
            ValueError, match="has an adapter 'default' already: call unload.*or take a fresh base model"
        ):
            wrap()
    with pytest.raises(ValueError, match="is a PeftModel already: add a graph to it by model.add_adapter"):
        rh.InterventionModel(first, reft())
    with pytest.raises(ValueError, match="has an adapter 'default' already: take another name, or delete it first"):
        first.add_adapter("default", reft())
    assert first.peft_config == {"default": config} and config.graph == reft()
    assert torch.equal(first(IDS).logits, out)


def test_the_last_adapter_cannot_be_deleted():
    model = trained()
    with pytest.raises(ValueError, match=r"'default' is the last adapter: unload\(\) gives the base model back"):
        model.delete_adapter("default")
    assert model(IDS).logits.isfinite().all()


def test_an_unknown_adapter_cannot_be_set():
    model = trained()
    for names in ("other", ["default", "other"], []):
        with pytest.raises(ValueError, match="unknown adapter .*: there are default"):
            model.set_adapter(names)
    with pytest.raises(ValueError, match="unknown adapter 'other' in adapter_names: there are default"):
        model(IDS, adapter_names=["other", "default"])


def test_a_deep_copy_is_a_model_of_its_own():
    model = trained()
    out = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, out)
    with torch.no_grad():
        twin.node("edit").W.zero_()
    assert not torch.equal(twin(IDS).logits, out) and torch.equal(model(IDS).logits, out)
    model.unload()
    assert not torch.equal(twin(IDS).logits, model.get_base_model()(IDS).logits)
    assert hooks(twin.get_base_model()) != {}


def test_a_model_that_nobody_needs_is_freed():
    base = tiny_llama()
    gone = weakref.ref(trained(base))
    gc.collect()
    assert gone() is None


def test_training_resumes_after_an_adapter_was_added(tmp_path):
    """Adding one freezes nothing that was being trained."""
    model = trained()
    model.train()
    model.add_adapter("later", reft(2))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.node("edit").W.clone()
    model(IDS, labels=LABELS).loss.backward()
    optimiser.step()
    assert not torch.equal(model.node("edit").W, before)
    assert all(p.grad is None for n, p in model.named_parameters() if ".later." in n)


# --- dtypes and quantised bases --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_nodes_keep_float32_in_a_base_of_any_dtype(dtype, tmp_path):
    model = rh.InterventionModel(tiny_llama(dtype=dtype).to(dtype), reft())
    randomise(model)
    assert {p.dtype for n, p in model.named_parameters() if "rh_nodes" in n} == {torch.float32}
    out = model(IDS, labels=LABELS)
    assert out.logits.dtype is dtype and out.logits.isfinite().all()
    out.loss.backward()
    assert model.node("edit").W.grad.dtype is torch.float32
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama().to(dtype), tmp_path)
    assert torch.equal(again(IDS, labels=LABELS).logits, out.logits)


def test_a_node_computes_in_the_dtype_that_it_names():
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2, dtype="bfloat16"), layer=1, name="edit"))
    model = rh.InterventionModel(tiny_llama(), graph)
    assert {p.dtype for n, p in model.named_parameters() if "rh_nodes" in n} == {torch.bfloat16}
    assert model.node("edit").R.dtype is torch.float32  # orthonormal to float32 all the same
    assert model(IDS).logits.dtype is torch.float32


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()])
def test_casting_the_whole_model_casts_the_nodes_too(cast):
    model = trained()
    dtype = cast(model).lm_head.weight.dtype
    assert {t.dtype for t in model.node("edit").stored().values()} == {dtype}
    out = model(IDS, labels=LABELS)
    assert out.logits.dtype is dtype and out.logits.isfinite().all()
    out.loss.backward()
    assert model.node("edit").W.grad.isfinite().all()


def test_a_change_of_dtype_at_load_is_kept(tmp_path):
    model = trained(graph=rh.InterventionGraph(rh.Node(rh.DiReFT(rank=2, dtype="bfloat16"), layer=1, name="edit")))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low)
        assert again.node("edit").W.dtype is torch.bfloat16
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert not any(t.is_meta for t in again.state_dict().values())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of width 64 on disk: bitsandbytes packs blocks of 64."""
    path = tmp_path_factory.mktemp("wide")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_generates_saves_and_loads(wide, bits, tmp_path):
    def quantised():
        config = tf.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        if bits == 4:
            config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return tf.AutoModelForCausalLM.from_pretrained(
            wide, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    graph = reft() + rh.InterventionGraph(
        rh.Node(rh.LoRA(rank=2), layer=2, component="query_output", name="lora"),
        rh.Node(rh.NoReFT(rank=2), layer=0, component="mlp_activation", positions="l1", name="mlp"),
    )
    tolerance = {8: 0, 4: 1e-2}[bits]  # on some CPUs 4-bit inference takes another path than training
    with torch.no_grad():
        plain = quantised()(IDS).logits
    base = quantised()
    assert type(base.model.layers[0].mlp.down_proj) is not nn.Linear
    model = trained(base, graph)
    assert model.plan()["mlp"].shape.width == 128 and model.plan()["lora"].shape.input_width == 64
    for _ in range(2):  # and again after an evaluation
        model.train()
        model.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        for name in ("edit", "lora", "mlp"):
            assert all(p.grad.isfinite().all() and p.grad.any() for p in model.node(name).parameters()), name
        model.eval()
        with torch.no_grad():
            out = model(IDS).logits
    new = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, eos_token_id=-1)
    assert new.shape == (2, IDS.shape[1] + 3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, out)  # saving changes nothing
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=tolerance)
        loaded = rh.InterventionModel.from_pretrained(quantised(), tmp_path)
        first = loaded(IDS).logits
        torch.testing.assert_close(first, out, rtol=0, atol=tolerance)
        loaded.load_adapter(tmp_path, "again")
        loaded.set_adapter("again")
        loaded.save_pretrained(tmp_path / "both")
        assert torch.equal(loaded(IDS).logits, first)
    assert not torch.allclose(out, plain, atol=0.1)


# --- saving --------------------------------------------------------------------------------


def test_saving_leaves_three_files_and_no_trace_beside_them(tmp_path):
    trained().save_pretrained(tmp_path / "new" / "adapter")
    assert sorted(os.listdir(tmp_path / "new" / "adapter")) == FILES
    assert os.listdir(tmp_path / "new") == ["adapter"]


def test_saving_again_keeps_what_else_lies_there_and_what_was_written_into_the_card(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "optimizer.pt").write_text("mine")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("# Model Card for Model ID", "# Speaks in emoji") + "\nThe end.\n")
    written = card.read_text()
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "optimizer.pt").read_text() == "mine"
    assert card.read_text() == written


def test_another_graph_saved_over_the_first_replaces_all_of_it(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "README.md").open("a").write("\nThe end.\n")
    other = trained(graph=reft(2, "other", rank=3))
    other.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.plan().graph == other.plan().graph and torch.equal(again(IDS).logits, other(IDS).logits)
    card = (tmp_path / "README.md").read_text()
    assert "block_output[2]" in card and "block_output[1]" not in card and card.endswith("The end.\n")


def test_a_relative_path_and_a_trailing_slash_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained()
    for path in ("plain", "slash/", "./deep/er"):
        model.save_pretrained(path)
        assert sorted(os.listdir(path)) == FILES


def test_what_cannot_be_saved_writes_nothing(tmp_path):
    model = rh.InterventionModel(tiny_llama(), reft(positions=lambda tokens: tokens.in_prompt))
    with pytest.raises(ValueError, match="positions given by the function .* cannot be saved"):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        trained().save_pretrained(tmp_path / "a", safe_serialization=False)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file: give a directory to save into"):
        trained().save_pretrained(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    model = trained()
    model.save_pretrained(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    randomise(model, 8)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exists", [True, False])
def test_what_killed_saves_left_is_removed_by_the_next_one(tmp_path, exists):
    target = tmp_path / "a"
    place = target if exists else tmp_path
    old, young, other = (place / name for name in (".a.saving-x", ".a.saving-y", ".b.saving-x"))
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("half")
    for folder in (old, other):
        os.utime(folder, (time.time() - 7200,) * 2)
    trained().save_pretrained(target)
    assert (old.exists(), young.exists(), other.exists()) == (False, False, True)


def test_a_link_to_a_folder_is_saved_into(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    trained().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path / "real")) == FILES


def _save_forever(target, ready):
    model = rh.InterventionModel(tiny_llama(), reft(rank=8))
    ready.set()
    while True:
        for value in (1.0, 2.0):
            with torch.no_grad():
                for name in "Wb":
                    getattr(model.node("edit"), name).fill_(value)
            model.save_pretrained(target)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_old_or_the_new_weights(tmp_path):
    target, context = tmp_path / "adapter", multiprocessing.get_context("fork")
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        ready = context.Event()
        process = context.Process(target=_save_forever, args=(target, ready))
        process.start()
        ready.wait()
        while not (target / "adapter_config.json").exists():
            time.sleep(0.001)
        time.sleep(0.3 * torch.rand((), generator=generator).item())
        process.kill()
        process.join()
        loaded = rh.InterventionModel.from_pretrained(tiny_llama(), target)
        values = {v for name in "Wb" for v in getattr(loaded.node("edit"), name).unique().tolist()}
        assert values in ({1.0}, {2.0})
        assert [name for name in sorted(os.listdir(target)) if ".saving-" not in name] == FILES
        seen |= values
    assert seen == {1.0, 2.0}


class Hub:
    """In place of `huggingface_hub.HfApi`: one repository, in memory."""

    uploads: list[dict[str, bytes]] = []
    card: Path | None = None

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **_):
        return types.SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, name, revision=None):
        return name == "README.md" and self.card is not None

    def hf_hub_download(self, repo_id, name, revision=None):
        return str(self.card)

    def upload_folder(self, *, repo_id, folder_path, **_):
        assert repo_id == "me/emoji"
        self.uploads.append({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})


def test_push_to_hub_uploads_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    model = trained()
    model.push_to_hub("me/emoji")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/emoji")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(files) == FILES and Hub.uploads == [files, files]


def test_push_to_hub_keeps_the_card_that_is_there(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Speaks in emoji\n")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    monkeypatch.setattr(Hub, "card", card)
    trained().push_to_hub("me/emoji")
    text = Hub.uploads[0]["README.md"].decode()
    assert "# Speaks in emoji" in text and "license: mit" in text and "import reftheads as rh" in text


_EDITS = st.one_of(
    st.builds(rh.LoReFT, rank=st.integers(1, 4), act_fn=st.sampled_from([None, "relu"]), bias=st.booleans()),
    st.builds(rh.NoDiReFT, rank=st.integers(1, 4), init=st.sampled_from(["orthogonal", "identity"])),
    st.builds(rh.ConsReFT, rank=st.integers(1, 4)),
    st.builds(rh.ScaleAndBias),
    st.builds(rh.Steering, st.integers(0, 9).map(lambda i: torch.full((WIDTH,), i / 9)), trainable=st.booleans()),
    st.builds(rh.Ablate),
    st.builds(rh.LinearHead, outputs=st.integers(2, 3)),
)
_NODES = st.builds(
    rh.Node,
    _EDITS,
    st.integers(-LAYERS, LAYERS - 1),
    st.sampled_from(["block_output", "block_input", "attention_output", "mlp_input", "mlp_output", "query_output"]),
    st.sampled_from(["l1", "f2+l2", "all", "prompt", "1:3"]),
)


@settings(max_examples=30, deadline=None)
@given(nodes=st.lists(_NODES, min_size=1, max_size=4))
def test_any_graph_says_the_same_after_saving_and_loading(tmp_path_factory, nodes):
    folder = tmp_path_factory.mktemp("any")
    model = trained(graph=rh.InterventionGraph(*nodes))
    model.save_pretrained(folder)
    again = rh.InterventionModel.from_pretrained(tiny_llama(), folder)
    out, loaded = model(IDS), again(IDS)
    assert torch.equal(out.logits, loaded.logits)
    assert again.plan().graph == model.plan().graph
    if (predictions := out.get("predictions")) is not None:
        assert all(torch.equal(value, loaded.predictions[name]) for name, value in predictions.items())
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, tiny_llama()(IDS).logits)


def test_an_encoder_decoder_saves_and_loads(tmp_path):
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), layer=0, positions="f1", stack="encoder", name="e"),
        rh.Node(rh.LoReFT(rank=2), layer=0, positions="all", stack="decoder", name="d"),
    )
    model = trained(tiny_t5(), graph)
    model.save_pretrained(tmp_path)
    again = rh.InterventionModel.from_pretrained(tiny_t5(), tmp_path)
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert torch.equal(again(**given).logits, model(**given).logits)

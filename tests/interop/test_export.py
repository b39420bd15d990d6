"""What leaves the graph: heads as plain modules or as classifiers of transformers, and a base saved by itself."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support.files import change_config, change_weights
from support.models import LAYERS, VOCAB, WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama
from torch import nn

import reftheads as rh
from reftheads.interop.sequence_classification import to_sequence_classification

LENGTHS = [7, 4, 1]
MASK = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])
IDS = torch.where(MASK.bool(), random_ids(3, 7), 0)


def with_nodes(base, *nodes: rh.Node) -> rh.InterventionModel:
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).eval()
    randomise(model)
    return model


def state(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- a head alone ---

HEADS = [
    rh.LinearHead(3, "y"),
    rh.LinearHead(3, "y", bias=False, activation="softmax"),
    rh.LinearHead(1, "y", "mse", activation="sigmoid", trainable=False),
    rh.MLPHead(3, "y", hidden=5, act_fn="relu", activation="softmax"),
    rh.MLPHead(2, "y", hidden=5, layers=3, act_fn="gelu_new", output_bias=False),
    rh.MLPHead(2, "y", hidden=4, act_fn="silu", weight="uncertainty"),
]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_head_alone_gives_the_heads_predictions_on_the_same_hidden_states(head):
    model = with_nodes(
        tiny_llama(), rh.Node(head, 1, positions="l2", name="head"), rh.Node(rh.Collect(), 1, positions="l2", name="h")
    )
    out = model(IDS, attention_mask=MASK)
    alone = rh.export_head(model, "head")
    assert {type(m).__module__.split(".")[0] for m in alone.modules()} == {"torch"}
    real = out.selected["head"]
    assert real.sum() == 5
    torch.testing.assert_close(alone(out.collected["h"])[real], out.predictions["head"][real], atol=1e-6, rtol=0)


def test_a_head_alone_takes_the_mean_that_the_head_makes():
    model = with_nodes(
        tiny_llama(),
        rh.Node(rh.MLPHead(2, "y", hidden=4, pool="mean"), 1, name="head"),
        rh.Node(rh.Collect(), 1, name="h"),
    )
    out = model(IDS, attention_mask=MASK)
    mean = torch.stack([h[:n].mean(0) for h, n in zip(out.collected["h"], LENGTHS, strict=True)])
    torch.testing.assert_close(rh.export_head(model, "head")(mean), out.predictions["head"], atol=1e-6, rtol=0)


def test_a_linear_head_is_one_linear_module_and_shares_nothing_with_the_model():
    model = with_nodes(tiny_llama(), rh.Node(rh.LinearHead(3, "y"), 1, name="head"))
    drawn = torch.get_rng_state()
    alone = rh.export_head(model, "head")
    assert type(alone) is nn.Linear and torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(alone.weight, model.node("head").W) and torch.equal(alone.bias, model.node("head").b)
    alone.weight.data.zero_()
    assert model.node("head").W.abs().sum() > 0


_READER = """
import json, sys, torch
from safetensors.torch import load_file
text = json.load(open("head.json"))
a, b, c = text["widths"]
module = torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Linear(b, c), torch.nn.Softmax(-1))
module.load_state_dict(load_file("head.safetensors"))
print(json.dumps(module(torch.linspace(-1, 1, a)[None]).tolist()), "transformers" in sys.modules)
"""


def test_a_program_without_transformers_reads_what_was_written(tmp_path):
    head = rh.MLPHead(3, "mood", hidden=5, act_fn="relu", activation="softmax")
    model = with_nodes(tiny_llama(), rh.Node(head, -2, "mlp_output", "l1", name="head"))
    alone = rh.export_head(model, "head", tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors"]
    shown = subprocess.run(
        [sys.executable, "-c", _READER], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.rsplit(" ", 1)
    assert shown[1].strip() == "False"
    torch.testing.assert_close(
        torch.tensor(json.loads(shown[0])), alone(torch.linspace(-1, 1, WIDTH)[None]), atol=1e-6, rtol=0
    )
    text = json.loads((folder / "head.json").read_text())
    assert text["widths"] == [WIDTH, 5, 3] and (text["act_fn"], text["activation"]) == ("relu", "softmax")
    assert (text["site"]["layer"], text["site"]["component"], text["positions"]) == (1, "mlp_output", "l1")
    assert (text["target"], text["loss"], text["module"]) == (
        "mood",
        "cross_entropy",
        "model.layers.1.mlp.down_proj:output",
    )


def test_what_is_no_plain_module_is_refused_and_nothing_is_written(tmp_path):
    model = with_nodes(
        tiny_llama(),
        rh.Node(rh.LoReFT(rank=2), 0, name="edit"),
        rh.Node(rh.LinearHead(2, "y", pool="attention"), 1, name="attends"),
        rh.Node(rh.MLPHead(2, "y", hidden=4, act_fn="relu2"), 1, name="odd"),
        rh.Node(rh.LinearHead(2, "y"), 1, positions=lambda tokens: tokens.real, name="own"),
    )
    for name, message in [
        ("edit", "node 'edit' is a LoReFT: only a LinearHead or an MLPHead"),
        ("attends", "head 'attends' has pool='attention'"),
        ("odd", "torch has no module for the activation 'relu2'"),
        ("own", "function"),
    ]:
        with pytest.raises(ValueError, match=message):
            rh.export_head(model, name, tmp_path / "out")
    with pytest.raises(KeyError, match="attends"):
        rh.export_head(model, "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a classifier of transformers ---

SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def bare(config) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModel.from_config(config).eval()


def causal(config) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def opt(**options) -> tf.PreTrainedModel:
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return causal(tf.OPTConfig(**sizes, ffn_dim=24, **options))


DECODERS = {
    "Llama": tiny_llama,
    "Llama without its output layer": lambda: bare(tf.LlamaConfig(**GROUPED)),
    "GPT-2": tiny_gpt2,
    "Qwen 2": lambda: causal(tf.Qwen2Config(**GROUPED)),
    "Mistral": lambda: causal(tf.MistralConfig(**GROUPED)),
    "Gemma 3": lambda: causal(tf.Gemma3TextConfig(**GROUPED, head_dim=4)),
    "GPT-NeoX": lambda: causal(tf.GPTNeoXConfig(**SIZES)),
    "OPT": lambda: opt(word_embed_proj_dim=WIDTH),
}
ENCODERS = {
    "BERT": ("tanh", lambda: bare(tf.BertConfig(**SIZES))),
    "BERT with its output layer": (
        "tanh",
        lambda: tf.AutoModelForMaskedLM.from_config(tf.BertConfig(**SIZES)).eval(),
    ),
    "RoBERTa": ("tanh", lambda: bare(tf.RobertaConfig(**SIZES))),
    "DistilBERT": (
        "relu",
        lambda: bare(
            tf.DistilBertConfig(
                vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=4, hidden_dim=24, max_position_embeddings=64
            )
        ),
    ),
    "ELECTRA": ("gelu", lambda: bare(tf.ElectraConfig(**SIZES, embedding_size=8))),
    "DeBERTa 2": ("gelu", lambda: bare(tf.DebertaV2Config(**SIZES))),
    "MPNet": ("tanh", lambda: bare(tf.MPNetConfig(**SIZES))),
}


def lora(component: str = "query_output") -> rh.Node:
    return rh.Node(rh.LoRA(rank=2, alpha=8), 1, component, name="lora")


def last(head=None, **options) -> rh.Node:
    options = {"component": "final_norm_output", "positions": "l1"} | options
    return rh.Node(head or rh.LinearHead(3, "y", bias=False), name="y", **options)


def first(act_fn: str, head=None) -> rh.Node:
    return rh.Node(head or rh.MLPHead(3, "y", hidden=WIDTH, act_fn=act_fn), -1, positions="f1", name="y")


def check_reloaded(model: rh.InterventionModel, folder, ids=IDS) -> None:
    before = state(model)
    to_sequence_classification(model, "y").save_pretrained(folder)
    loaded, report = tf.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    mask = (ids != 0).long()
    expected = model(input_ids=ids, attention_mask=mask).predictions["y"]
    torch.testing.assert_close(loaded.eval()(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.05  # else anything would be equal
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(input_ids=ids, attention_mask=mask).predictions["y"].equal(expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_linear_head_of_a_decoder_is_saved_as_a_standard_classifier(name, tmp_path):
    model = with_nodes(DECODERS[name](), lora(), last(), rh.Node(rh.LinearHead(2, "z"), 0, name="another"))
    check_reloaded(model, tmp_path)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_mlp_head_of_an_encoder_is_saved_as_a_standard_classifier(name, tmp_path):
    act_fn, make = ENCODERS[name]
    torch.manual_seed(0)
    ids = IDS if make().config.pad_token_id == 0 else IDS.masked_fill(IDS == 0, make().config.pad_token_id)
    check_reloaded(with_nodes(make(), lora(), first(act_fn)), tmp_path, ids)


def test_lora_at_the_path_of_any_module_is_merged(tmp_path):
    for i, make in enumerate((tiny_llama, DECODERS["Llama without its output layer"], tiny_gpt2)):
        base = make()
        graph = rh.preset("lora2:all-linear", base) + rh.InterventionGraph(last())
        model = rh.InterventionModel(base, graph).eval()
        randomise(model)
        check_reloaded(model, tmp_path / str(i))


def test_padding_on_the_left_gives_the_same_logits():
    model = with_nodes(tiny_llama(), last())
    classifier = to_sequence_classification(model, "y")
    ids = torch.stack([row.roll(7 - n) for row, n in zip(IDS, LENGTHS, strict=True)])
    mask = (ids != 0).long()
    given = classifier(ids, attention_mask=mask).logits
    torch.testing.assert_close(given, model(ids, attention_mask=mask).predictions["y"], atol=1e-5, rtol=0)


def test_where_pad_is_eos_an_eos_within_a_row_does_no_harm_and_one_at_its_end_is_read_past():
    model = with_nodes(tiny_llama(pad_token_id=2), last())
    classifier = to_sequence_classification(model, "y")
    ids, mask = (
        torch.tensor([[5, 2, 6, 2, 7, 2], [2, 8, 9, 10, 2, 2]]),
        torch.tensor([[1] * 5 + [0], [1] * 4 + [0] * 2]),
    )
    ours, theirs = model(ids, attention_mask=mask).predictions["y"], classifier(ids, attention_mask=mask).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    whole = model(ids, attention_mask=torch.ones_like(ids)).predictions["y"]
    assert (classifier(ids, attention_mask=torch.ones_like(ids)).logits - whole).abs().amin(0).max() > 0.01


@pytest.mark.parametrize(
    "head, problem",
    [
        (rh.LinearHead(3, "y", bias=False, activation="softmax"), "single_label_classification"),
        (rh.LinearHead(1, "y", "mse", bias=False), "regression"),
        (rh.LinearHead(3, "y", "multi_label", bias=False), "multi_label_classification"),
    ],
)
def test_transformers_takes_the_heads_loss(head, problem):
    target = {3: torch.tensor([2, 0, 1]), 1: torch.tensor([0.5, -1.0, 2.0])}[head.outputs]
    target = torch.eye(3)[target] if problem.startswith("multi") else target
    model = with_nodes(tiny_llama(), last(head))
    classifier = to_sequence_classification(model, "y")
    assert (classifier.config.problem_type, classifier.config.num_labels) == (problem, head.outputs)
    theirs = classifier(IDS, attention_mask=MASK, labels=target).loss
    torch.testing.assert_close(theirs, model(IDS, attention_mask=MASK, y=target).losses["y"], atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_of_another_dtype_gives_a_classifier_of_that_dtype(dtype, tmp_path):
    model = with_nodes(tiny_llama().to(dtype), last())
    classifier = to_sequence_classification(model, "y")
    assert classifier.dtype == dtype and torch.equal(classifier.score.weight, model.node("y").W.to(dtype))


def t5_encoder():
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )


TAKES = "LlamaForSequenceClassification maps 16 → 3, and takes LinearHead(3, bias=False) at "
TAKES += "component='final_norm_output', positions='l1'"
REFUSED = {
    "a bias": (tiny_llama, [last(rh.LinearHead(3, "y"))], "has a bias where there is no place for one: " + TAKES),
    "hidden layers": (tiny_llama, [last(rh.MLPHead(3, "y", hidden=8))], "head 'y' maps 16 → 8 → 3: " + TAKES),
    "another token": (tiny_llama, [last(positions="f1")], TAKES),
    "several tokens": (tiny_llama, [last(positions="l2")], "predicts at several tokens of a row: " + TAKES),
    "a mean": (tiny_llama, [last(rh.LinearHead(3, "y", bias=False, pool="mean"), positions="all")], TAKES),
    "before the norm": (tiny_llama, [last(component="block_output", layer=-1)], TAKES),
    "an earlier block": (tiny_llama, [last(component="block_output", layer=0)], TAKES),
    "a linear head of an encoder": (
        lambda: bare(tf.BertConfig(**SIZES)),
        [rh.Node(rh.LinearHead(3, "y"), -1, positions="f1", name="y")],
        "BertForSequenceClassification maps 16 → 16 → 3, and takes MLPHead(3, hidden=16, act_fn=",
    ),
    "another activation": (
        lambda: bare(tf.BertConfig(**SIZES)),
        [first("gelu")],
        "gives other logits, by",
    ),
    "a norm between": (
        lambda: bare(tf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
        [rh.Node(rh.MLPHead(3, "y", hidden=16, bias=False), component="final_norm_output", positions="f1", name="y")],
        "gives other logits, by",
    ),
    "an edit": (
        tiny_llama,
        [rh.Node(rh.LoReFT(rank=2), 0, name="edit"), last()],
        "node 'edit' is a LoReFT, and only LoRA can be merged",
    ),
    "LoRA on some tokens": (
        tiny_llama,
        [rh.Node(rh.LoRA(rank=2), 0, "query_output", "l1", name="lora"), last()],
        "node 'lora' acts on positions 'l1'",
    ),
    "an activation that the loss sees": (
        tiny_llama,
        [last(rh.LinearHead(1, "y", "mse", bias=False, activation="sigmoid"))],
        "train it with activation=None",
    ),
    "no pad token": (lambda: tiny_llama(pad_token_id=None), [last()], "model.config.pad_token_id = tokenizer.pad_"),
    "a map between": (lambda: opt(word_embed_proj_dim=8), [last()], "OPTForSequenceClassification maps 8 → 3"),
    "two stacks": (t5_encoder, [rh.Node(rh.LinearHead(3, "y"), -1, name="y")], "is an encoder-decoder"),
    "no such class": (
        lambda: causal(tf.CohereConfig(**GROUPED)),
        [last()],
        "transformers has no sequence-classification model for CohereForCausalLM (cohere)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_standard_classifier_cannot_express_is_refused_with_the_reason(case):
    make, nodes, words = REFUSED[case]
    model = with_nodes(make(), *nodes)
    before = state(model)
    with pytest.raises(ValueError) as error:
        to_sequence_classification(model, "y")
    assert words in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_several_adapters_one_must_be_chosen():
    model = with_nodes(tiny_llama(), last())
    model.add_adapter("other", rh.InterventionGraph(lora()))
    to_sequence_classification(model, "y")
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="several adapters act, default, other"):
        to_sequence_classification(model, "y")


# --- the base model by itself ---


def finetuned(make, folder) -> tuple[rh.InterventionModel, dict]:
    """A model of which every weight was trained for a step, and the weights before it."""
    base = make()
    model = rh.InterventionModel(base, rh.InterventionGraph(lora("mlp_output"), last(rh.LinearHead(3, "y"))))
    randomise(model)
    base.requires_grad_(True)
    before = state(model)
    ids = random_ids(6, 5)
    rows = [{"input_ids": row, "labels": row, "prompt_mask": [1] * 5, "y": i % 3} for i, row in enumerate(ids.tolist())]
    args = tf.TrainingArguments(
        str(folder), max_steps=1, learning_rate=1e-2, weight_decay=0.1, per_device_train_batch_size=6, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    tf.Trainer(model, args, train_dataset=rows, data_collator=collate).train()
    return model.eval(), before


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_base_that_was_finetuned_as_a_whole_is_saved_by_itself_and_the_heads_beside_it(make, tmp_path):
    model, before = finetuned(make, tmp_path / "run")
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    expected = model(IDS, attention_mask=MASK)
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert not [key for key in load_file(tmp_path / "base" / "model.safetensors") if "rh_" in key]
    base, report = type(make()).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values()), report
    plain = model.get_base_model()
    with model.disable_adapter():
        assert torch.equal(base.eval()(IDS, attention_mask=MASK).logits, plain(IDS, attention_mask=MASK).logits)
    loaded = rh.InterventionModel.from_pretrained(base, tmp_path / "adapter").eval()
    out = loaded(IDS, attention_mask=MASK)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.predictions["y"], expected.predictions["y"])


def test_a_base_with_several_adapters_is_saved_without_all_of_them(tmp_path):
    base = tiny_llama()
    keys = set(base.state_dict())
    model = with_nodes(base, last())
    model.add_adapter("other", rh.InterventionGraph(lora()))
    base.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == keys
    copied = copy.deepcopy(model)
    copied.get_base_model().save_pretrained(tmp_path / "copy")
    assert set(load_file(tmp_path / "copy" / "model.safetensors")) == keys
    model.delete_adapter("other")
    assert not model.unload()._keys_to_ignore_on_save


# --- loading what does not fit ---


def saved(folder, head, **where) -> None:
    where = where or {"layer": 2, "positions": "l1"}
    with_nodes(tiny_llama(), rh.Node(head, name="judge", **where)).save_pretrained(folder)


def refused(base, folder, *words: str) -> None:
    before, trained = state(base), [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(ValueError) as error:
        rh.InterventionModel.from_pretrained(base, folder)
    for word in words:
        assert word in str(error.value)
    after = state(base)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert type(base(IDS).logits) is torch.Tensor and "predictions" not in base(IDS)


@pytest.mark.parametrize(
    "head, problem",
    [
        (rh.LinearHead(3, "y"), "'judge.W' has shape (3, 16), and this model needs (3, 32)"),
        (rh.MLPHead(3, "y", hidden=5), "'judge.W0' has shape (5, 16), and this model needs (5, 32)"),
        (rh.LinearHead(3, "y", pool="attention"), "'judge.q' has shape (16,), and this model needs (32,)"),
    ],
    ids=["linear", "mlp", "attention"],
)
def test_heads_of_a_base_of_another_width_are_refused(head, problem, tmp_path):
    saved(tmp_path, head, layer=2, positions="all" if head.pool else "l1")
    refused(tiny_llama(hidden_size=32), tmp_path, problem, "Load it onto the model that it was trained on")


def test_heads_of_a_deeper_base_are_refused(tmp_path):
    saved(tmp_path, rh.LinearHead(3, "y"))
    refused(tiny_llama(num_hidden_layers=2), tmp_path, "layer 2 is out of range", "layers 0 to 1")


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize(
    "head, weight, bias",
    [
        (rh.LinearHead(3, "y"), "'judge.W' has shape (3, 16), and this model needs ({n}, 16)", "'judge.b'"),
        (rh.MLPHead(3, "y", hidden=4), "'judge.W1' has shape (3, 4), and this model needs ({n}, 4)", "'judge.b1'"),
    ],
    ids=["linear", "mlp"],
)
def test_weights_of_another_number_of_labels_than_the_graph_says_are_refused(head, weight, bias, outputs, tmp_path):
    saved(tmp_path, head)
    change_weights(tmp_path)
    change_config(tmp_path, lambda config: config["graph"]["nodes"][0]["options"].update(outputs=outputs))
    refused(
        tiny_llama(), tmp_path, weight.format(n=outputs), f"{bias} has shape (3,), and this model needs ({outputs},)"
    )

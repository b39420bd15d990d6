"""Heads of transformer-heads against their formula: linear maps with ReLU between, on `hidden_states[layer_hook]`."""

import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from support.models import LAYERS, VOCAB, WIDTH, random_ids, tiny_bart, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor, nn

import reftheads as rh
from reftheads.interop.transformer_heads import HeadConfig, graph_of

EXACT = {"atol": 1e-10, "rtol": 0}
EOS = 2


class Theirs(nn.Module):
    """The maps of a head: biases everywhere but at the end, where `output_bias` says it."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        torch.manual_seed(3)
        widths = [config.in_size, *[config.hidden_size] * (config.num_layers - 1), config.num_outputs or 1]
        last = len(widths) - 2
        self.lins = nn.ModuleList(
            nn.Linear(a, b, bias=bool(i < last or config.output_bias))
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        ).double()
        self.activation = {"linear": lambda z: z, "sigmoid": torch.sigmoid, "relu": torch.relu}[
            config.output_activation
        ]

    def forward(self, h: Tensor) -> Tensor:
        for lin in self.lins[:-1]:
            h = lin(h).relu()
        return self.activation(self.lins[-1](h))

    def letters(self) -> dict[str, Tensor]:
        """The weights by our names: W, b of a linear head, W0, b0, W1 … of an MLP."""
        number = (lambda i: "") if len(self.lins) == 1 else str
        weights = {f"W{number(i)}": lin.weight for i, lin in enumerate(self.lins)}
        return weights | {f"b{number(i)}": lin.bias for i, lin in enumerate(self.lins) if lin.bias is not None}


def head(**fields) -> HeadConfig:
    return HeadConfig(**{"name": "head", "in_size": WIDTH, "num_outputs": 3} | fields)


def only_node(config: HeadConfig, base: nn.Module | None = None) -> rh.Node:
    (node,) = graph_of([config], base or tiny_llama())
    return node


def ours_and_theirs(config: HeadConfig, make=tiny_llama) -> tuple[rh.InterventionModel, Theirs, nn.Module]:
    theirs = Theirs(config)
    model = rh.InterventionModel(make(), graph_of([config], make())).double().eval()
    model.node(config.name).assign(**{name: value.detach() for name, value in theirs.letters().items()})
    return model, theirs, make().double()


def rows(side: str) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Rows of 6, 3 and 5 tokens: ids, mask, the columns of each row; pad is eos, which leads and stands in some."""
    ids, mask, columns = torch.full((3, 6), EOS), torch.zeros(3, 6, dtype=torch.long), []
    for row, length in enumerate((6, 3, 5)):
        at = list(range(length)) if side == "right" else list(range(6 - length, 6))
        ids[row, at], mask[row, at] = random_ids(1, length, seed=row)[0], 1
        columns.append(at)
    ids[0, columns[0][2]] = ids[1, columns[1][0]] = ids[2, columns[2][-1]] = EOS
    return ids, mask, columns


def place(values: list[Tensor], columns: list[list[int]], fill) -> Tensor:
    """A target a token in a batch of six columns."""
    out = torch.full((len(columns), 6), fill, dtype=values[0].dtype)
    for row, (at, value) in enumerate(zip(columns, values, strict=True)):
        out[row, at] = value
    return out


SHAPES = {
    "linear": {},
    "linear with bias": {"output_bias": True},
    "MLP": {"num_layers": 3, "hidden_size": 8},
    "MLP with bias": {"num_layers": 2, "hidden_size": 8, "output_bias": True},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("hook", [-1, -2, 0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_sequence_head_is_theirs_at_the_last_real_token(shape, hook, side):
    model, theirs, base = ours_and_theirs(head(pred_for_sequence=True, layer_hook=hook, **shape))
    ids, mask, columns = rows(side)
    target = torch.tensor([2, 0, 1])
    out = model(ids, attention_mask=mask, head=target)
    hidden = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[hook]
    expected = theirs(torch.stack([hidden[row, at[-1]] for row, at in enumerate(columns)]))
    torch.testing.assert_close(out.predictions["head"], expected, **EXACT)
    torch.testing.assert_close(out.losses["head"], F.cross_entropy(expected, target), **EXACT)
    out.loss.backward()
    F.cross_entropy(expected, target).backward()
    stored = model.node("head").stored()
    for name, value in theirs.letters().items():
        torch.testing.assert_close(stored[name].grad, value.grad, **EXACT)
    assert stored.keys() == theirs.letters().keys()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_token_head_is_theirs_at_every_real_token_the_last_one_included(shape, side):
    model, theirs, base = ours_and_theirs(head(layer_hook=-2, **shape))
    ids, mask, columns = rows(side)
    targets = [torch.arange(len(at)) % 3 for at in columns]
    out = model(ids, attention_mask=mask, head=place(targets, columns, 1))  # 1 on padding must not count
    hidden = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    expected = torch.cat([theirs(hidden[row, at]) for row, at in enumerate(columns)])
    torch.testing.assert_close(out.predictions["head"][mask.bool()], expected, **EXACT)
    torch.testing.assert_close(out.losses["head"], F.cross_entropy(expected, torch.cat(targets)), **EXACT)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ignore_pads", [None, True, False])
def test_a_causal_lm_head_is_theirs_on_each_next_token(ignore_pads, side):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = head(num_outputs=VOCAB, is_causal_lm=True, target="next", ignore_pads=ignore_pads)
    model, theirs, base = ours_and_theirs(config)
    ids, mask, columns = rows(side)
    out = model(ids, attention_mask=mask, next=ids.masked_fill(mask == 0, -100))
    hidden = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = torch.cat([theirs(hidden[row, at[:-1]]) for row, at in enumerate(columns)])
    following = torch.cat([ids[row, at[1:]] for row, at in enumerate(columns)])
    torch.testing.assert_close(out.losses["head"], F.cross_entropy(expected, following), **EXACT)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3])
def test_layer_hook_is_an_index_into_the_hidden_states_of_the_model(make):
    ids = random_ids()
    for hook in range(-LAYERS - 1, LAYERS + 1):
        model, theirs, base = ours_and_theirs(head(layer_hook=hook), make)
        hidden = base(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model(ids).predictions["head"], theirs(hidden[hook]), **EXACT)


def test_layer_hook_minus_one_lies_behind_the_final_norm_and_all_others_before_it():
    def where(hook):
        return str(only_node(head(layer_hook=hook)).site)

    assert where(-1) == where(LAYERS) == "final_norm_output"
    assert where(-2) == where(LAYERS - 1) == f"block_output[{LAYERS - 2}]"
    assert where(1) == "block_output[0]"
    assert where(0) == where(-LAYERS - 1) == "embedding_output"


def test_layer_hook_minus_one_is_the_last_block_where_there_is_no_final_norm():
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=24
    )
    assert str(only_node(head(), tf.BertModel(config)).site) == f"block_output[{LAYERS - 1}]"


@pytest.mark.parametrize("hook", [LAYERS + 1, -LAYERS - 2])
def test_a_layer_hook_that_the_model_does_not_have_is_refused(hook):
    with pytest.raises(ValueError, match=rf"'head': layer_hook is {hook}, .* 3 blocks have indices from -4 to 3"):
        graph_of([head(layer_hook=hook)], tiny_llama())


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_a_model_of_two_stacks_is_refused(make):
    with pytest.raises(ValueError, match="2 stacks of blocks"):
        graph_of([head()], make())


# --- losses -------------------------------------------------------------------------------------------------

NUMBERS, LETTERS = torch.tensor([0.5, -3.0, 2.0]).double(), torch.tensor([[0, 1, 1.0], [1, 0, 0], [0, 0, 1]]).double()
LOSSES = {
    "mse": ({"loss_fct": "mse", "num_outputs": 1}, NUMBERS, F.mse_loss),
    "mse, relu": ({"loss_fct": "mse", "num_outputs": 1, "output_activation": "relu"}, NUMBERS, F.mse_loss),
    "mse, num_outputs None": ({"loss_fct": "mse", "num_outputs": None}, NUMBERS, F.mse_loss),
    "mse, several numbers": ({"loss_fct": "mse", "output_activation": "sigmoid"}, LETTERS, F.mse_loss),
    "bce": (
        {"loss_fct": "bce", "num_outputs": 1, "output_activation": "sigmoid"},
        LETTERS[:, 1],
        F.binary_cross_entropy,
    ),
    "bce, several": ({"loss_fct": "bce", "output_activation": "sigmoid"}, LETTERS, F.binary_cross_entropy),
}


@pytest.mark.parametrize("shape", [SHAPES["linear"], SHAPES["MLP"]], ids=["linear", "MLP"])
@pytest.mark.parametrize("fields, target, loss", LOSSES.values(), ids=LOSSES)
def test_a_regression_is_theirs(fields, target, loss, shape):
    config = head(is_regression=True, pred_for_sequence=True, loss_weight=0.3, **fields, **shape)
    model, theirs, base = ours_and_theirs(config)
    ids, mask, columns = rows("right")
    out = model(ids, attention_mask=mask, head=target)
    hidden = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = theirs(torch.stack([hidden[row, at[-1]] for row, at in enumerate(columns)]))
    torch.testing.assert_close(out.predictions["head"], expected, **EXACT)
    torch.testing.assert_close(out.losses["head"], loss(expected.view(-1), target.view(-1)), **EXACT)
    torch.testing.assert_close(out.loss, 0.3 * loss(expected.view(-1), target.view(-1)), **EXACT)


def test_a_regression_at_every_token_is_theirs():
    model, theirs, base = ours_and_theirs(head(loss_fct="mse", num_outputs=1, is_regression=True, layer_hook=1))
    ids, mask, columns = rows("left")
    targets = [torch.arange(len(at)).double() for at in columns]
    out = model(ids, attention_mask=mask, head=place(targets, columns, float("nan")))
    hidden = base(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    expected = torch.cat([theirs(hidden[row, at])[:, 0] for row, at in enumerate(columns)])
    torch.testing.assert_close(out.losses["head"], F.mse_loss(expected, torch.cat(targets)), **EXACT)


def test_mse_that_is_no_regression_is_one_with_a_warning():
    with pytest.warns(UserWarning, match="'head' has loss_fct='mse' and is_regression=False") as caught:
        node = only_node(head(loss_fct="mse", num_outputs=1))
    assert node.intervention.loss == "mse"
    assert caught[0].filename == __file__


def test_without_loss_fct_a_head_predicts_and_is_not_trained():
    model, theirs, base = ours_and_theirs(head(loss_fct=None, output_activation="sigmoid"))
    ids = random_ids()
    out = model(ids)
    hidden = base(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(out.predictions["head"], theirs(hidden), **EXACT)
    assert out.losses is None and only_node(head(loss_fct=None)).intervention.target is None


def test_losses_of_our_own_can_be_named():
    assert only_node(head(loss_fct="huber", num_outputs=1, is_regression=True)).intervention.loss == "huber"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss_fct": "focal"}, "unknown loss 'focal'"),
        ({"output_activation": "sigmoid"}, "set output_activation='linear'"),
        ({"output_activation": "sofmax", "loss_fct": None}, "unknown activation 'sofmax'"),
        ({"is_regression": True}, "set is_regression=False, or loss_fct='mse'"),
        ({"loss_fct": "bce", "num_outputs": 1}, "set it to 'sigmoid'"),
        ({"num_outputs": None}, "cross_entropy over one class"),
        ({"in_size": 768}, "in_size is 768, but this LlamaForCausalLM has width 16"),
        ({"num_layers": 2}, "num_layers of 2 or more and its hidden_size, got num_layers=2 and hidden_size=0"),
        ({"num_layers": 0, "hidden_size": 8}, "got num_layers=0"),
        ({"name": "lm_head"}, "take out.logits"),
        ({"name": "a.b"}, "cannot be used"),
    ],
    ids=str,
)
def test_what_cannot_be_carried_over_is_refused_by_the_name_of_the_head(fields, message):
    config = head(**fields)
    with pytest.raises(ValueError, match=f"head '{config.name}': .*{message}"):
        graph_of([config], tiny_llama())


# --- the other fields ---------------------------------------------------------------------------------------


def test_the_defaults_are_a_linear_probe_of_classes_at_every_token_that_trains_the_model_as_well():
    config = HeadConfig("head", WIDTH, 3)
    node = only_node(config)
    assert node.intervention == rh.LinearHead(3, target="head", bias=False)
    assert (str(node.positions), str(node.site), node.name) == ("all", "final_norm_output", "head")
    assert config.target == "head" and config.ignore_pads is True
    assert head(is_causal_lm=True).ignore_pads is False


def test_target_and_loss_weight_and_trainable_go_to_the_node():
    probe = only_node(head(target="label", loss_weight=0.25, trainable=False)).intervention
    assert (probe.target, probe.weight, probe.trainable) == ("label", 0.25, False)
    model = rh.InterventionModel(
        tiny_llama(), graph_of([head(trainable=False, num_layers=2, hidden_size=4)], tiny_llama())
    )
    assert not list(model.node("head").parameters()) and len(model.node("head").stored()) == 3


@pytest.mark.parametrize("block", [True, False])
def test_block_gradients_keeps_gradients_from_the_model(block):
    base = tiny_llama()
    graph = graph_of([head(block_gradients=block, pred_for_sequence=True)], base)
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 0, name="edit")) + graph).eval()
    model(random_ids(), head=torch.tensor([1, 2])).loss.backward()
    assert (model.node("edit").W.grad is None) == block


def test_a_target_named_labels_goes_to_the_head_alone():
    config = head(num_outputs=VOCAB, is_causal_lm=True, target="labels")
    model, theirs, base = ours_and_theirs(config)
    ids = random_ids()
    out = model(ids, labels=ids)
    hidden = base(ids, output_hidden_states=True).hidden_states[-1]
    expected = F.cross_entropy(theirs(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, **EXACT)


def test_beside_labels_for_the_model_a_sequence_head_needs_a_prompt_mask():
    model, theirs, base = ours_and_theirs(head(pred_for_sequence=True))
    ids, mask, columns = rows("right")
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, prompt_mask=mask, labels=labels, head=torch.tensor([2, 0, 1]))
    plain = base(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    expected = theirs(torch.stack([plain.hidden_states[-1][row, at[-1]] for row, at in enumerate(columns)]))
    torch.testing.assert_close(out.predictions["head"], expected, **EXACT)
    torch.testing.assert_close(out.loss, plain.loss + out.losses["head"], **EXACT)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_copy_of_the_models_own_output_layer_is_a_head_by_another_name(make):
    base = make()
    model = rh.InterventionModel(base, graph_of([head(name="copy", num_outputs=VOCAB, is_causal_lm=True)], base))
    model.eval().node("copy").assign(W=base.get_output_embeddings().weight.detach())
    out = model(random_ids())
    torch.testing.assert_close(out.predictions["copy"], out.logits)


def test_ignore_pads_false_is_warned_of_where_padding_would_count():
    with pytest.warns(UserWarning, match="ignore_pads=False, but here padding never counts") as caught:
        graph_of([head(ignore_pads=False, pred_for_sequence=True)], tiny_llama())
    assert caught[0].filename == __file__


def test_an_unknown_field_is_refused_by_the_known_ones():
    with pytest.raises(ValueError, match="no field 'layer': use name, in_size, num_outputs, layer_hook"):
        head(layer=3)


def test_a_causal_head_cannot_predict_for_the_sequence():
    with pytest.raises(ValueError, match="'head' cannot be both is_causal_lm"):
        head(is_causal_lm=True, pred_for_sequence=True)


def test_configs_are_copied_compared_and_read_from_json_values():
    config = head(layer_hook=-3, is_causal_lm=True)
    assert deepcopy(config) == config == HeadConfig(**asdict(config))
    assert graph_of([asdict(config)], tiny_llama()) == graph_of([config], tiny_llama())


@pytest.mark.slow
def test_heads_of_many_kinds_make_one_graph_that_is_saved_and_read_by_another_process(tmp_path):
    size = {"in_size": WIDTH}
    number = {"loss_fct": "mse", "is_regression": True}
    configs = [
        HeadConfig("sentiment", num_outputs=2, layer_hook=-4, pred_for_sequence=True, loss_weight=2.0, **size),
        HeadConfig("causal", num_outputs=VOCAB, is_causal_lm=True, **size),
        HeadConfig("letters", num_outputs=26, layer_hook=-3, pred_for_sequence=True, **number, **size),
        HeadConfig("left", num_outputs=1, layer_hook=-3, num_layers=3, hidden_size=8, **number, **size),
    ]
    model = rh.InterventionModel(tiny_llama(), graph_of(configs, tiny_llama())).eval()
    ids = random_ids()
    targets = {
        "sentiment": torch.tensor([0, 1]), "causal": ids, "letters": torch.ones(2, 26), "left": torch.ones(2, 7),
    }  # fmt: skip
    out = model(ids, **targets)
    assert set(out.losses) == set(targets)
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(ids, tmp_path / "ids")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOADS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = {name: value.double().sum().item() for name, value in out.predictions.items()}
    read = dict(line.split() for line in run.stdout.strip().splitlines()[-len(expected) :])
    assert {name: pytest.approx(float(value), abs=1e-4) for name, value in read.items()} == expected


_LOADS = """
import torch, transformers
import reftheads as rh
base = transformers.AutoModelForCausalLM.from_pretrained("base").eval()
model = rh.InterventionModel.from_pretrained(base, "adapter").eval()
for name, value in model(torch.load("ids", weights_only=True)).predictions.items():
    print(name, value.double().sum().item())
"""

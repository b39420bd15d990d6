"""What reuse is said to spare, against a count of the operations that are done."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.models import tiny_gpt2, tiny_llama
from support.training import edits, head
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import reftheads as rh
from reftheads.reuse.forecast import Forecast, describe
from reftheads.reuse.store import ActivationStore

EVEN, RAGGED = (40,) * 4, (40, 20, 60, 30)


def llama() -> tf.LlamaForCausalLM:
    """Large enough for its weights to take most of the time; its attention is two matrix products."""
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6}
    return tiny_llama(**shape, attn_implementation="eager")


def graph(positions: Any, *layers: int, component: str = "block_output") -> rh.InterventionGraph:
    return rh.InterventionGraph.over(rh.LoReFT(rank=2), layers, positions=positions, component=component)


GRAPHS = {
    "the last token": graph("l1", 2, 3),
    "seven and seven": graph("f7+l7", 2, 3),
    "every token": graph("all", 0, 3),
    "the last block": graph("l1", 5),
    "before the first block": graph("l1", 0, component="block_input"),
    "heads": rh.InterventionGraph(head(1, "a"), head(3, "b")),
    "heads and edits": rh.InterventionGraph(head(1, "a"), *graph("l2", 2, 3), head(5, "b")),
}


def batch_of(lengths: tuple[int, ...] = EVEN, labels: bool = True, heads: bool = False) -> dict[str, Tensor]:
    """Rows that differ from the first token on; the last four of each are the answer."""
    width, count = max(lengths), len(lengths)
    ids = torch.randint(3, 190, (count, width), generator=torch.Generator().manual_seed(0))
    column, length = torch.arange(width), torch.tensor(lengths)[:, None]
    real, prompt = column < length, column < length - 4
    batch = {"input_ids": ids * real, "attention_mask": real.long(), "prompt_mask": prompt.long()}
    batch |= {"labels": ids.masked_fill(prompt | ~real, -100)} if labels else {}
    return batch | ({"label": torch.zeros(count, dtype=torch.long)} if heads else {})


def operations(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def compare(model: rh.InterventionModel, batch: dict[str, Tensor]) -> None:
    """Counts a plain step, one that records and one that replays; and compares it with the forecast."""
    store = ActivationStore(2**28)

    def step() -> None:
        model(**batch).loss.backward()

    plain = operations(step)
    with model.reusing(store) as replay:
        step()  # what is looked up once for a model, such as what its blocks return
        store.clear()
        recording, replaying = operations(step), operations(step)
        forecast = Forecast.of(replay, [batch])
    # the eager attention computes what a causal mask then hides, which is not counted
    assert forecast.plain == pytest.approx(plain, rel=0.15)
    assert forecast.recording == pytest.approx(recording, rel=0.15)
    assert forecast.replaying == pytest.approx(replaying, rel=0.15)
    assert forecast.stored == pytest.approx(store.bytes, rel=0.01)
    assert forecast.rows == len(batch["input_ids"])


@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_forecast_is_what_a_step_computes_and_keeps(name, lengths):
    compare(rh.InterventionModel(llama(), GRAPHS[name]).train(), batch_of(lengths, heads="heads" in name))


def test_heads_without_labels_are_forecast_to_cost_nothing_but_their_recording():
    model = rh.InterventionModel(llama(), GRAPHS["heads"]).train()
    batch = batch_of(labels=False, heads=True)
    store = ActivationStore(2**28)
    with model.reusing(store) as replay:
        model(**batch)
        store.clear()
        recording = operations(lambda: model(**batch))
        forecast = Forecast.of(replay, [batch])
        assert operations(lambda: model(**batch)) < 0.001 * recording
    assert forecast.replaying == 0
    assert forecast.recording == pytest.approx(recording, rel=0.15)
    assert forecast.stored == pytest.approx(store.bytes, rel=0.01)


def test_several_batches_are_added():
    replay = rh.InterventionModel(llama(), GRAPHS["the last token"]).train().replay()
    batches = [batch_of(), batch_of(RAGGED)]
    one, two, both = (Forecast.of(replay, some) for some in (batches[:1], batches[1:], batches))
    for name in ("plain", "recording", "replaying", "stored", "rows"):
        assert getattr(both, name) == pytest.approx(getattr(one, name) + getattr(two, name))


def experts() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    made = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, **heads, attn_implementation="eager"))
    made.set_experts_implementation("eager")
    return made.eval()


def encoder() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    config = tf.BertConfig(**shape, num_attention_heads=4, num_labels=2, attn_implementation="eager")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    return tf.BertForSequenceClassification(config)


def gpt2() -> Any:
    return tiny_gpt2(
        vocab_size=200,
        n_embd=64,
        n_layer=6,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="eager",
    )


@pytest.mark.parametrize("make", [experts, encoder, gpt2])
def test_the_forecast_holds_for_experts_encoders_and_fused_projections(make):
    rule = "f1" if make is encoder else "l1"
    model = rh.InterventionModel(make(), graph(rule, 2, 3)).train()
    batch = batch_of(RAGGED)
    if make is encoder:
        batch = {n: batch[n] for n in ("input_ids", "attention_mask")} | {"labels": torch.tensor([0, 1, 0, 1])}
    compare(model, batch)


# --- in words ---------------------------------------------------------------------------------------------


def described(model: rh.InterventionModel, *batches: dict[str, Tensor]) -> list[str]:
    text = describe(model.replay(), batches)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_decoder_whose_prefixes_are_left_out_is_described():
    lines = described(rh.InterventionModel(llama(), GRAPHS["the last token"]).train(), batch_of())
    forecast = Forecast.of(rh.InterventionModel(llama(), GRAPHS["the last token"]).train().replay(), [batch_of()])
    assert lines == [
        "prefix keys and values before the first edit and label",
        "layers 3 of 6 blocks are replayed: the first edit is at block_output[2]",
        "logits where there is a label",
        "prompts generate begins with what is kept of them",
        f"a step {forecast.replaying / forecast.plain:.1%} of a plain step's operations, "
        f"{forecast.recording / forecast.plain:.1%} while it is recorded",
        f"to keep {forecast.stored / 4 / 1e6:.3g} MB a row",
    ]


CASES = {
    "f7+l7": (
        lambda: rh.InterventionModel(llama(), GRAPHS["seven and seven"]),
        [
            "prefix not reused: positions 'f7+l7' begin with the first token",
            "layers 3 of 6 blocks are replayed: the first edit is at block_output[2]",
            "logits where there is a label",
            "prompts not reused by generate: positions 'f7+l7' begin with the first token",
        ],
    ),
    "heads": (
        lambda: rh.InterventionModel(llama(), GRAPHS["heads"]),
        [
            "prefix not reused: no edit: all that is kept is what the readers see",
            "layers 6 of 6 blocks are replayed: no edit",
            "readers what a, b read is kept",
            "logits where there is a label",
            "prompts generate begins with what is kept of them",
        ],
    ),
    "heads and edits": (
        lambda: rh.InterventionModel(llama(), GRAPHS["heads and edits"]),
        [
            "prefix keys and values before the first edit and label",
            "layers 3 of 6 blocks are replayed: the first edit is at block_output[2]",
            "readers what a reads is kept",
            "logits where there is a label",
            "prompts generate begins with what is kept of them",
        ],
    ),
    "before the first block": (
        lambda: rh.InterventionModel(llama(), GRAPHS["before the first block"]),
        [
            "prefix keys and values before the first edit and label",
            "layers not reused: block_input[0] comes before the end of the first block",
            "logits where there is a label",
            "prompts generate begins with what is kept of them",
        ],
    ),
    "encoder": (
        lambda: rh.InterventionModel(encoder(), graph("f1", 2, 3)),
        [
            "prefix not reused: every token sees all the others",
            "layers 3 of 4 blocks are replayed: the first edit is at block_output[2]",
            "logits as the base model has them",
        ],
    ),
    "dropout": (
        lambda: rh.InterventionModel(tiny_gpt2(), edits()),
        [
            "reuse nothing: the base model has dropout in training mode (Dropout.p); "
            "load_base(…, dropout=False) has none"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_described(case):
    make, lines = CASES[case]
    model = make().train()
    assert described(model) == lines
    if case == "dropout":
        assert described(model, batch_of()) == lines


def test_what_the_model_prints_is_the_description(capsys):
    model = rh.InterventionModel(llama(), GRAPHS["the last token"]).train()
    print(model.reuse_summary(batch_of()))
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == described(model, batch_of())


def test_dropout_counts_in_training_mode_alone():
    model = rh.InterventionModel(tiny_gpt2(), edits())
    assert described(model.eval())[0] == "prefix keys and values before the first edit and label"
    with model.disable_adapter():
        assert described(model) == ["reuse nothing: adapters are disabled"]

"""What is not understood takes the plain path, or leaves out the part that cannot be reused."""

from typing import Any

import pytest
import torch
import transformers as tf
from support.architectures import CASES
from support.models import randomise, tiny_gpt2
from support.replay import (
    GPT2,
    base_of,
    batch_of,
    blocks_of,
    check,
    check_exact,
    check_plain,
    from_config,
    head,
    inside,
    intervened,
    loreft,
    replayed,
    step,
    token_rows,
    usual_batch,
)
from torch import nn
from transformers.integrations.neftune import activate_neftune

import reftheads as rh
from reftheads.reuse.store import ActivationStore

pytestmark = pytest.mark.usefixtures("loss_in_float64")


def test_dropout_in_the_base_model_is_random_in_every_step() -> None:
    model = intervened(tiny_gpt2(**GPT2 | {"resid_pdrop": 0.1}).double(), loreft(1))
    assert "dropout in training mode" in check_plain(model, usual_batch())
    check_exact(model.eval(), usual_batch())


def test_noise_on_the_embeddings_is_random_in_every_step() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    handle = activate_neftune(model, 5.0)
    with model.reusing(ActivationStore(2**30)) as used:
        assert "noise" in used.eligibility.why_plain()
        assert len({float(model(**batch).loss.detach()) for _ in range(3)}) == 3
        assert used.eligibility.why_plain() is not None and model.eval() and used.eligibility.why_plain() is None
    handle.remove()


def test_weights_of_the_base_model_that_are_trained_change_what_is_below() -> None:
    model = intervened(base_of("llama"), loreft(1))
    model.get_base_model().model.embed_tokens.weight.requires_grad = True
    assert "are trained (model.embed_tokens.weight)" in check_plain(model, usual_batch())


def test_disabled_adapters_give_the_base_model() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    with model.disable_adapter():
        assert "disabled" in check_plain(model, batch)


@pytest.mark.parametrize("names", [["default", "__base__", "other", "__base__"], ["default", "other"] * 2])
def test_an_adapter_for_each_row_gives_the_plain_losses_and_gradients(names: list[str]) -> None:
    model, batch = intervened(base_of("llama"), loreft(1), training=False), usual_batch()
    model.add_adapter("other", rh.InterventionGraph(loreft(0)))
    model.double().tuner.set_adapter(["default", "other"])
    randomise(model)
    model.eval()
    batch["adapter_names"] = names  # type: ignore[assignment]
    plain = step(model, batch)
    assert len(plain.gradients) == 6
    for store in (ActivationStore(2**30), None):
        with model.reusing(store):
            check(step(model, batch), plain)
            check(step(model, batch), plain)


@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}, {"logits_to_keep": 1}]
)
def test_a_call_that_asks_for_more_takes_the_plain_path(options: dict[str, Any]) -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch(labels=False) | options
    plain = model(**batch)
    with model.reusing(ActivationStore(2**30)) as used:
        assert used(batch) is None
        got = model(**batch)
    assert torch.equal(got[0], plain[0]) and len(got) == len(plain)


def test_embeddings_in_place_of_tokens_take_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch["inputs_embeds"] = model.get_base_model().model.embed_tokens(batch.pop("input_ids")).detach()
    check_plain(model, batch)


def test_a_mask_of_four_dimensions_takes_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    mask = batch["attention_mask"].bool()
    batch["attention_mask"] = (mask[:, None, None, :] & torch.ones(12, 12).tril().bool()).double().log()
    batch["attention_mask"] = batch["attention_mask"].clamp(min=-1e30)
    check_plain(model, batch)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rows_padded_at_the_left_are_whole_unless_they_say_their_positions(name: str) -> None:
    model = intervened(base_of(name), loreft(1), loreft(2))
    for position_ids in (False, True)[: 1 + (name == "llama")]:
        batch = usual_batch(side="left", position_ids=position_ids)
        check_exact(model, batch)
        assert replayed(model, batch, blocks_of(model)[-1]) == [4 * 4 if position_ids else 4 * 12]


def test_batch_norms_in_training_mode_take_the_plain_path() -> None:
    base = base_of("llama")
    base.model.norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(32), nn.Unflatten(0, (4, -1))).double()
    base.requires_grad_(False)
    model = intervened(base, loreft(1))
    batch, store = usual_batch(), ActivationStore(2**30)
    with model.reusing(store) as used:
        assert "batch norms" in used.eligibility.why_plain() and used(batch) is None


def test_the_loss_of_a_router_takes_the_plain_path() -> None:
    model, batch = intervened(base_of("mixtral"), loreft(1)), usual_batch()
    check_exact(model, batch)
    model.get_base_model().config.output_router_logits = True
    assert "router" in check_plain(model, batch)


@pytest.mark.parametrize("rule", ["l1", "all"])
def test_activation_checkpointing_goes_without_a_prefix_but_skips_blocks(rule: str) -> None:
    model, batch = intervened(base_of("llama"), loreft(1, rule), head(0)), usual_batch(targets=True)
    model.gradient_checkpointing_enable()
    check_exact(model, batch)
    low, _, high = inside(model)
    assert replayed(model, batch, low) == [] and set(replayed(model, batch, high)) == {4 * 12}


def test_labels_on_padding_take_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch["labels"] = batch["input_ids"].clone()
    check_plain(model, batch)


def test_a_classifier_of_padding_takes_the_plain_path() -> None:
    """As one does that looks at the first column of rows padded at the left."""
    model = intervened(base_of("bert"), loreft(1, "all"))
    batch = usual_batch(labels=False, side="left") | {"labels": torch.tensor([1, 0, 0, 1])}
    batch.pop("prompt_mask")
    check_plain(model, batch)


def test_labels_on_the_tokens_of_an_encoder_have_the_plain_gradients() -> None:
    model = intervened(from_config(CASES["bert"].config, tf.AutoModelForTokenClassification), loreft(1, "all"))
    batch = usual_batch(labels=False)
    batch.pop("prompt_mask")
    labels = batch["input_ids"] % 2
    check_exact(model, batch | {"labels": labels.where(batch["attention_mask"].bool(), -100)})
    check_plain(model, batch | {"labels": labels})


def test_a_label_behind_the_last_real_token_counts_once() -> None:
    model = intervened(base_of("llama"), loreft(1))
    batch = usual_batch()
    batch["labels"][1, 9] = 5  # the first column of the padding, which the last token predicts
    check_exact(model, batch)


def test_a_token_that_nothing_marks_as_padding_is_no_padding() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch.pop("attention_mask")
    check_exact(model, batch)


def test_ids_of_32_bits_are_ids_as_well() -> None:
    model, store = intervened(base_of("llama"), loreft(1)), ActivationStore(2**30)
    row = token_rows([(8, 3)])[0]
    same_bytes = [token for pair in zip(row, [0] * 8, strict=True) for token in pair][:8]
    batch, other = batch_of([row], [3]), batch_of([same_bytes], [3])
    other["input_ids"] = other["input_ids"].int()
    for one in (batch, other, batch):
        plain = step(model, one)
        with model.reusing(store):
            check(step(model, one), plain)
            check(step(model, one), plain)


def test_columns_of_one_content_but_other_meaning_are_told_apart() -> None:
    base = from_config(CASES["bert"].config, tf.AutoModel)
    model, store = intervened(base, head(1, "all"), training=False), ActivationStore(2**30)
    one = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]]), "y": torch.tensor([[0, 1]])}
    for name in ("token_type_ids", "position_ids"):
        batch = one | {name: torch.tensor([[1, 0]])}
        plain = step(model, batch)
        with model.reusing(store):
            check(step(model, batch), plain)

"""Nothing stale is served: entries are known by all that their content hangs on."""

from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from support.architectures import SMALL
from support.replay import base_of, check, from_config, head, intervened, loreft, step, usual_batch

from reftheads.reuse import prefixes
from reftheads.reuse.store import ActivationStore

pytestmark = pytest.mark.usefixtures("loss_in_float64")


def test_a_weight_changed_in_place_is_seen() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        before = step(model, batch)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.weight.add_(0.1)
    plain = step(model, batch)
    assert abs(float(plain.loss - before.loss)) > 1e-4
    with model.reusing(used):
        check(step(model, batch), plain)


def test_a_buffer_changed_in_place_is_seen() -> None:
    model, batch, store = intervened(base_of("llama"), loreft(1)), usual_batch(), ActivationStore(2**30)
    with model.reusing(store) as used:
        before = step(model, batch)
    with torch.no_grad():
        model.get_base_model().model.rotary_emb.inv_freq.mul_(0.5)
    plain = step(model, batch)
    assert abs(float(plain.loss - before.loss)) > 1e-6
    with model.reusing(used):
        check(step(model, batch), plain)


@pytest.mark.parametrize("column", ["input_ids", "position_ids", "attention_mask"])
def test_another_input_is_another_entry(column: str) -> None:
    model, store = intervened(base_of("llama"), loreft(1), head(0, "f1")), ActivationStore(2**30)
    batch = usual_batch(targets=True, position_ids=True)
    other = {name: value.clone() for name, value in batch.items()}
    other[column][:, 2] = {"input_ids": 5, "position_ids": 7, "attention_mask": 0}[column]
    with model.reusing(store) as used:
        step(model, batch)
    plain = step(model, other)
    with model.reusing(used):
        check(step(model, other), plain)


def test_models_of_other_weights_never_share_an_entry() -> None:
    batch, store = usual_batch(targets=True), ActivationStore(2**30)
    for seed in range(2):
        base = base_of("llama")
        with torch.no_grad():
            base.model.layers[0].mlp.down_proj.weight[0, 0] += seed
        model = intervened(base, loreft(1), head(0))
        plain, store.hits = step(model, batch), 0
        with model.reusing(store):
            check(step(model, batch), plain)
        assert store.hits == 0


def test_models_of_one_content_share_their_entries() -> None:
    batch, store = usual_batch(), ActivationStore(2**30)
    for _ in range(2):
        model = intervened(base_of("llama"), loreft(1))
        store.misses = 0
        with model.reusing(store):
            step(model, batch)
    assert store.misses == 0


def test_settings_that_no_weight_shows_are_told_apart() -> None:
    batch, store = usual_batch(), ActivationStore(2**30)
    for eps in (1e-6, 0.1):
        config = tf.LlamaConfig(**SMALL, rms_norm_eps=eps)
        model = intervened(from_config(config), loreft(1))
        plain, store.hits = step(model, batch), 0
        with model.reusing(store):
            check(step(model, batch), plain)
        assert store.hits == 0


def test_autocast_and_no_autocast_share_no_entry() -> None:
    model, batch, store = intervened(base_of("llama").float(), loreft(1)), usual_batch(), ActivationStore(2**30)
    for enabled in (False, True, False):
        store.hits = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plain = step(model, batch)
            with model.reusing(store):
                first = step(model, batch)
                check(first, plain, 0.05 if enabled else 1e-4)
                assert (store.hits > 0) == (not enabled and len(store) > 8)
                check(step(model, batch), first, 0)


def test_a_store_without_room_changes_nothing() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    plain = step(model, batch)
    for budget in (0, 1000, 20_000):
        store = ActivationStore(budget)
        with model.reusing(store), mock.patch.object(prefixes, "SHARED", 2):
            for _ in range(3):
                check(step(model, batch), plain)
        assert store.bytes <= budget


def test_what_is_on_disk_serves_a_second_run(tmp_path: Any) -> None:
    batch = usual_batch(targets=True)
    for run in range(2):
        model, store = intervened(base_of("llama"), loreft(1), head(0)), ActivationStore(0, tmp_path)
        plain = step(model, batch)
        with model.reusing(store):
            check(step(model, batch), plain)
        assert (store.misses == 0) == bool(run)


def test_reusing_ends_with_its_block_also_by_an_error() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    with pytest.raises(IndexError), model.reusing(None):
        model(**batch | {"input_ids": batch["input_ids"] + 1000})
    plain = step(model, batch)
    with model.reusing(None):
        check(step(model, batch), plain)
    assert plain.output.logits is not None and step(model, batch).output.logits is not None


def test_evaluation_without_gradient_gives_what_training_needs() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    plain = step(model, batch)
    with model.reusing(store), torch.inference_mode():
        torch.testing.assert_close(model(**batch).loss.clone(), plain.loss)
    with model.reusing(store):
        store.misses = 0
        check(step(model, batch), plain)
    assert store.misses == 0

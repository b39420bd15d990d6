"""A call that fails in the middle leaves nothing that the next call sees, whatever failed and wherever."""

import gc
import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import torch
import transformers as tf
from support.calls import (
    BY_ROW,
    CALLS,
    NEW,
    PROMPTS,
    alone,
    answers_as_alone,
    call,
    disabled,
    generate,
    padded,
    rows,
    same,
    shared_model,
)
from support.models import word_tokenizer

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

WIDTH = max(map(len, PROMPTS))  # columns of the prompts


class Broken(Exception):
    """What a user's own code raises in these tests."""


# --- what may fail ----------------------------------------------------------------------------------------


@contextmanager
def failing(
    model: rh.InterventionModel,
    path: str,
    error: type[BaseException] = Broken,
    tokens: int | None = None,
    after: int = 0,
) -> Iterator[None]:
    """Within, the module at `path` fails where it returns, in a pass of so many columns, having let `after` by."""
    passes = iter(range(after))

    def fail(module: torch.nn.Module, args: Any, output: Any) -> None:
        h = output if isinstance(output, torch.Tensor) else output[0]
        if tokens in (None, h.shape[1]) and next(passes, None) is None:
            raise error("on purpose")

    handle = model.get_base_model().get_submodule(path).register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


class Stops(tf.LogitsProcessor):
    """A logits processor that raises at the third step."""

    def __init__(self, error: type[BaseException]):
        self.error = error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == WIDTH + 2:
            raise self.error("on purpose")
        return scores


class Gone(tf.generation.streamers.BaseStreamer):
    """A streamer that raises at the third token."""

    def __init__(self) -> None:
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens > 3:  # the prompt comes first
            raise Broken

    def end(self) -> None:
        pass


def bad_ids(model: rh.InterventionModel) -> None:
    model(**{**rows(), "input_ids": rows()["input_ids"] + 1000})


def bad_ids_by_rows(model: rh.InterventionModel) -> None:
    model(**{**rows(), "input_ids": rows()["input_ids"] + 1000}, adapter_names=BY_ROW)


def bad_ids_in_the_base_model(model: rh.InterventionModel) -> None:
    model.get_base_model()(**{**rows(), "input_ids": rows()["input_ids"] + 1000})


def bad_ids_in_the_backbone(model: rh.InterventionModel) -> None:
    model.get_base_model().model(input_ids=padded(PROMPTS)["input_ids"] + 1000)


def bad_ids_in_generate(model: rh.InterventionModel) -> None:
    model.generate(padded(PROMPTS)["input_ids"] + 1000, max_new_tokens=2)


def a_hook_in_a_block(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1"):
        call(model)


def a_hook_in_a_block_by_rows(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1"):
        call(model, adapter_names=BY_ROW)


def a_hook_of_the_vocabulary_projection(model: rh.InterventionModel) -> None:
    with failing(model, "lm_head"):
        call(model)


def a_hook_before_the_base_model(model: rh.InterventionModel) -> None:
    def fail(module: torch.nn.Module, args: Any) -> None:
        raise Broken

    handle = model.get_base_model().register_forward_pre_hook(fail)
    try:
        call(model, adapter_names=BY_ROW)
    finally:
        handle.remove()


def a_hook_in_generate(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", tokens=1, after=2):
        generate(model)


def a_hook_in_generate_by_rows(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", tokens=1, after=2):
        generate(model, adapter_names=BY_ROW)


def a_hook_where_what_was_generated_is_read(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", tokens=WIDTH + NEW):
        generate(model, return_heads=True)


def a_hook_while_disabled(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", tokens=1, after=2):
        disabled(model)


def a_hook_while_recording(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.0"), model.reusing(rh.ActivationStore()):
        call(model)


def a_hook_while_replaying(model: rh.InterventionModel) -> None:
    with model.reusing(rh.ActivationStore()):
        call(model)
        with failing(model, "model.layers.2"):
            call(model)


def a_hook_while_reusing_by_rows(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.2"), model.reusing():
        call(model, adapter_names=BY_ROW)


def the_body_of_reusing(model: rh.InterventionModel) -> None:
    with model.reusing():
        call(model)
        raise Broken


def the_body_of_disable_adapter(model: rh.InterventionModel) -> None:
    with model.disable_adapter():
        call(model)
        raise Broken


def a_streamer(model: rh.InterventionModel) -> None:
    model.generate(**padded(PROMPTS[:1]), max_new_tokens=NEW, streamer=Gone())


def a_streamer_whose_reader_went_away(model: rh.InterventionModel) -> None:
    streamer = tf.TextIteratorStreamer(word_tokenizer(), timeout=0.01)
    streamer.text_queue = queue.Queue(maxsize=1)
    model.generate(**padded(PROMPTS[:1]), max_new_tokens=NEW, streamer=streamer)


def ctrl_c_in_a_block(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", KeyboardInterrupt):
        call(model, adapter_names=BY_ROW)


def ctrl_c_in_the_backbone(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", KeyboardInterrupt):
        CALLS["backbone"](model)


def ctrl_c_in_generate(model: rh.InterventionModel) -> None:
    generate(model, logits_processor=[Stops(KeyboardInterrupt)])


def ctrl_c_in_generate_by_rows(model: rh.InterventionModel) -> None:
    generate(model, adapter_names=BY_ROW, logits_processor=[Stops(KeyboardInterrupt)])


def ctrl_c_in_a_block_in_generate(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", KeyboardInterrupt, tokens=1, after=2):
        generate(model, return_heads=True)


def ctrl_c_where_what_was_generated_is_read(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.1", KeyboardInterrupt, tokens=WIDTH + NEW):
        generate(model, return_heads=True)


def ctrl_c_while_disabled(model: rh.InterventionModel) -> None:
    disabled(model, logits_processor=[Stops(KeyboardInterrupt)])


def ctrl_c_while_recording(model: rh.InterventionModel) -> None:
    with failing(model, "model.layers.0", KeyboardInterrupt), model.reusing(rh.ActivationStore()):
        call(model)


def ctrl_c_while_replaying(model: rh.InterventionModel) -> None:
    with model.reusing(rh.ActivationStore()):
        call(model)
        with failing(model, "model.layers.2", KeyboardInterrupt):
            call(model)


def a_target_of_another_shape(model: rh.InterventionModel) -> None:
    model(**{**rows(), "label": torch.zeros(3).long()})


def a_label_that_is_no_token(model: rh.InterventionModel) -> None:
    model(**{**rows(), "labels": rows()["labels"].clamp(min=1000)})


def an_adapter_that_is_not_there(model: rh.InterventionModel) -> None:
    call(model, adapter_names=["a", "z", "a", "a"])


def names_of_another_number(model: rh.InterventionModel) -> None:
    call(model, adapter_names=["a", "b", "c"])


def names_of_another_number_in_generate(model: rh.InterventionModel) -> None:
    generate(model, adapter_names=["a", "b", "c"])


@contextmanager
def checkpointing(model: rh.InterventionModel) -> Iterator[None]:
    """Within, the model is trained, and its blocks keep nothing for the backward pass."""
    model.train().get_base_model().activation_checkpointing_enable()
    try:
        yield
    finally:
        model.eval().get_base_model().activation_checkpointing_disable()


def training_forward(model: rh.InterventionModel) -> None:
    with checkpointing(model), failing(model, "model.layers.2"):
        model(**rows(), use_cache=False, adapter_names=BY_ROW)


def training_backward(model: rh.InterventionModel) -> None:
    with checkpointing(model):
        loss = model(**rows(), use_cache=False, adapter_names=BY_ROW).loss
        with failing(model, "model.layers.2.self_attn"):
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def ctrl_c_in_training_forward(model: rh.InterventionModel) -> None:
    with checkpointing(model), failing(model, "model.layers.2", KeyboardInterrupt):
        model(**rows(), use_cache=False, adapter_names=BY_ROW)


FAILURES: dict[Callable[[rh.InterventionModel], None], type[BaseException]] = {
    bad_ids: IndexError,
    bad_ids_by_rows: IndexError,
    bad_ids_in_the_base_model: IndexError,
    bad_ids_in_the_backbone: IndexError,
    bad_ids_in_generate: IndexError,
    a_hook_in_a_block: Broken,
    a_hook_in_a_block_by_rows: Broken,
    a_hook_of_the_vocabulary_projection: Broken,
    a_hook_before_the_base_model: Broken,
    a_hook_in_generate: Broken,
    a_hook_in_generate_by_rows: Broken,
    a_hook_where_what_was_generated_is_read: Broken,
    a_hook_while_disabled: Broken,
    a_hook_while_recording: Broken,
    a_hook_while_replaying: Broken,
    a_hook_while_reusing_by_rows: Broken,
    the_body_of_reusing: Broken,
    the_body_of_disable_adapter: Broken,
    a_streamer: Broken,
    a_streamer_whose_reader_went_away: queue.Full,
    ctrl_c_in_a_block: KeyboardInterrupt,
    ctrl_c_in_the_backbone: KeyboardInterrupt,
    ctrl_c_in_generate: KeyboardInterrupt,
    ctrl_c_in_generate_by_rows: KeyboardInterrupt,
    ctrl_c_in_a_block_in_generate: KeyboardInterrupt,
    ctrl_c_where_what_was_generated_is_read: KeyboardInterrupt,
    ctrl_c_while_disabled: KeyboardInterrupt,
    ctrl_c_while_recording: KeyboardInterrupt,
    ctrl_c_while_replaying: KeyboardInterrupt,
    a_target_of_another_shape: ValueError,
    a_label_that_is_no_token: IndexError,
    an_adapter_that_is_not_there: ValueError,
    names_of_another_number: ValueError,
    names_of_another_number_in_generate: ValueError,
    training_forward: Broken,
    training_backward: Broken,
    ctrl_c_in_training_forward: KeyboardInterrupt,
}


# --- and what comes after ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fail, error", FAILURES.items(), ids=lambda value: value.__name__)
def test_the_call_after_a_failed_one_answers_as_if_it_had_not_been(
    fail: Callable[[rh.InterventionModel], None], error: type[BaseException]
):
    model = shared_model()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, after in CALLS.items():  # each kind of call comes first after a failed one
        with pytest.raises(error):
            fail(model)
        same(after(model), alone(name), f"{name} after {fail.__name__}")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    answers_as_alone(model)


def test_a_reader_that_goes_away_leaves_a_generation_that_nobody_waits_for():
    model = shared_model()
    streamer = tf.TextIteratorStreamer(word_tokenizer(), timeout=30)
    thread = Thread(target=model.generate, kwargs=dict(**padded(PROMPTS[:1]), max_new_tokens=40, streamer=streamer))
    thread.start()
    next(iter(streamer))
    answers_as_alone(model)
    thread.join(60)
    answers_as_alone(model)


@pytest.mark.parametrize("error", [None, Broken, KeyboardInterrupt])
def test_nothing_that_a_call_was_given_or_read_is_kept_by_the_model(error: type[BaseException] | None):
    model = shared_model()
    batch = {**rows(), "prompt_mask": rows()["attention_mask"].bool()}
    kept = [weakref.ref(tensor) for tensor in batch.values()]
    model.get_base_model().model.layers[1].register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    if error is None:
        model(**batch)
    else:
        with failing(model, "model.layers.2", error), pytest.raises(error):
            model(**batch)
    del batch
    gc.collect()
    assert len(kept) == 8 and all(reference() is None for reference in kept)


def test_what_a_failed_call_raised_is_what_the_user_sees():
    model = shared_model()
    with pytest.raises(Broken, match="on purpose") as caught, failing(model, "model.layers.1"):
        call(model)
    assert caught.value.__context__ is None

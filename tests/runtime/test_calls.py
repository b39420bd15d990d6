"""What a call knows belongs to that call: threads and coroutines share one model and see nothing of each other.

A call that has begun goes on with what it began with. `with model.disable_adapter()` and `with model.reusing()` hold
for the thread (the context) that entered them, and `set_adapter` changes what later calls see.
"""

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import pytest
import torch
import transformers as tf
from support.calls import (
    BY_ROW,
    CALLS,
    NEW,
    PROMPTS,
    Answer,
    Pause,
    alone,
    answers_as_alone,
    at_once,
    call,
    generate,
    holding,
    midway,
    rows,
    same,
    shared_model,
)

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations


@pytest.fixture(autouse=True)
def threads_interleave() -> Iterator[None]:
    """Lets the interpreter switch threads every hundredth of a millisecond instead of every five."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_the_calls_of_these_tests_can_be_told_apart():
    generated = [alone("disabled"), *(alone("generate", adapter) for adapter in "abc"), alone("generate by rows")]
    assert len({str(answer["sequences"].tolist()) for answer in generated}) == 5
    losses = [float(alone(name)["loss"]) for name in ("call", "call by rows", "call with a prompt mask")]
    assert len(set(losses)) == len(losses)
    assert float(alone("reusing")["2.loss"]) == pytest.approx(losses[0], rel=1e-5)  # the logits' part is in float32
    same(alone("reusing prefixes"), alone("generate"))


# --- four threads at once ---------------------------------------------------------------------------------


def test_four_threads_generate_with_adapters_and_prompts_of_their_own():
    batches = [PROMPTS, PROMPTS[2:3], PROMPTS[1:], PROMPTS[:2]]
    options = [{"adapter_names": BY_ROW}, {}, {"adapter_names": ["b", "__base__", "c"]}, {"return_heads": True}]
    each = [partial(generate, prompts=batch, **one) for batch, one in zip(batches, options, strict=True)]
    expected = [one(shared_model()) for one in each]
    model = shared_model()
    for turn in range(10):
        got = at_once([partial(one, model) for one in each])
        for i in range(4):
            same(got[i], expected[i], f"turn {turn}, thread {i}")
    answers_as_alone(model)


def test_four_threads_call_with_labels_targets_and_prompt_masks_of_their_own():
    names = ["call", "call by rows", "call side by side", "call with a prompt mask"]
    model = shared_model()
    for turn in range(25):
        for name, got in zip(names, at_once([partial(CALLS[name], model) for name in names]), strict=True):
            same(got, alone(name), f"turn {turn}, {name}")
    answers_as_alone(model)


def test_calls_of_every_kind_at_once_answer_as_alone():
    choose = random.Random(0)
    model = shared_model()
    for _ in range(25):
        names = choose.sample(list(CALLS), 4)
        for name, got in zip(names, at_once([partial(CALLS[name], model) for name in names]), strict=True):
            same(got, alone(name), f"{name} among {names}")
    answers_as_alone(model)


def test_several_adapters_that_act_together_do_so_in_every_thread():
    expected = shared_model()
    expected.set_adapter(["a", "c"])
    expected = generate(expected)
    model = shared_model()
    model.set_adapter(["a", "c"])
    for _ in range(5):
        for got in at_once([partial(generate, model)] * 3 + [partial(CALLS["disabled"], model)])[:3]:
            same(got, expected)


# --- one call midway, and what another thread does --------------------------------------------------------

Running = Callable[[rh.InterventionModel, Pause], Answer]


def between_steps(name: str) -> Running:
    """A generation that is held up after its second step."""
    return lambda model, pause: CALLS[name](model, logits_processor=[pause])


def between_blocks(name: str, tokens: int | None = None) -> Running:
    """A call that is held up where the block below the edits returns, in the first pass of so many columns."""

    def run(model: rh.InterventionModel, pause: Pause) -> Answer:
        with holding(model.get_base_model().model.layers[0], pause, tokens):
            return CALLS[name](model)

    return run


def replaying(model: rh.InterventionModel, pause: Pause) -> Answer:
    """A call that is held up while it replays what an earlier one recorded."""
    with model.reusing(rh.ActivationStore()):
        call(model)
        with holding(model.get_base_model().model.layers[1], pause):
            return call(model)


def recording(model: rh.InterventionModel, pause: Pause) -> Answer:
    """A call that is held up while it records."""
    with model.reusing(rh.ActivationStore()):
        with holding(model.get_base_model().model.layers[0], pause, None):
            return call(model)


RUNNING: dict[str, Running] = {
    "generate": between_steps("generate"),
    "generate by rows": between_steps("generate by rows"),
    "generate with heads": between_steps("generate with heads"),
    "heads of what was generated": between_blocks("generate with heads", max(map(len, PROMPTS)) + NEW),
    "disabled": between_steps("disabled"),
    "reusing prefixes": between_steps("reusing prefixes"),
    "call": between_blocks("call"),
    "call by rows": between_blocks("call by rows"),
    "call with a prompt mask": between_blocks("call with a prompt mask"),
    "gradients": between_blocks("gradients"),
    "backbone": between_blocks("backbone"),
    "recording": recording,
    "replaying": replaying,
}
KIND = {"heads of what was generated": "generate with heads"}


def expected_of(name: str) -> Answer:
    """What a running call gives where nobody disturbs it."""
    if name in ("recording", "replaying"):
        which = {"recording": "1", "replaying": "2"}[name]
        return {key[2:]: value for key, value in alone("reusing").items() if key[0] == which}
    return alone(KIND.get(name, name))


@contextmanager
def calls_of_every_kind(model: rh.InterventionModel) -> Iterator[None]:
    answers_as_alone(model)
    yield


@contextmanager
def disables(model: rh.InterventionModel) -> Iterator[None]:
    with model.disable_adapter():
        same(generate(model), alone("disabled"))
        yield
        same(generate(model), alone("disabled"))


@contextmanager
def has_disabled(model: rh.InterventionModel) -> Iterator[None]:
    with model.disable_adapter():
        pass
    yield


@contextmanager
def reuses(model: rh.InterventionModel) -> Iterator[None]:
    with model.reusing(rh.ActivationStore()):
        assert "logits" not in call(model)
        yield
        assert "logits" not in call(model)


@contextmanager
def fails(model: rh.InterventionModel) -> Iterator[None]:
    with pytest.raises(IndexError):
        model(**{**rows(), "input_ids": rows()["input_ids"] + 1000})
    yield


@contextmanager
def sets_another_adapter(model: rh.InterventionModel) -> Iterator[None]:
    model.set_adapter("c")
    same(generate(model), alone("generate", "c"))
    yield
    same(generate(model), alone("generate", "c"))
    model.set_adapter("a")


@contextmanager
def switches_adapters_off(model: rh.InterventionModel) -> Iterator[None]:
    model.base_model.disable_adapter_layers()
    same(generate(model), alone("disabled"))
    yield
    model.base_model.enable_adapter_layers()


MEANWHILE = [calls_of_every_kind, disables, has_disabled, reuses, fails, sets_another_adapter, switches_adapters_off]
TRAINED_BY_ALL = (sets_another_adapter, switches_adapters_off)  # which parameters want gradients, they say for all
PAIRS = [
    pytest.param(name, meanwhile, id=f"{name}-{meanwhile.__name__}")
    for name in RUNNING
    for meanwhile in MEANWHILE
    if not (name == "gradients" and meanwhile in TRAINED_BY_ALL)
]


@pytest.mark.parametrize("running, meanwhile", PAIRS)
def test_a_call_goes_on_with_what_it_began_with(
    running: str, meanwhile: Callable[[rh.InterventionModel], AbstractContextManager[None]]
):
    expected = expected_of(running)
    for until_it_ends in (False, True):
        model = shared_model()
        with midway(partial(RUNNING[running], model)) as other:
            with meanwhile(model):
                if until_it_ends:
                    same(other.finish(), expected, running)
            same(other.finish(), expected, running)
        answers_as_alone(model)


def test_disabling_ends_for_each_thread_where_that_thread_leaves():
    model = shared_model()

    def other(pause: Pause) -> tuple[Answer, Answer]:
        with model.disable_adapter():
            pause.hold()
            within = generate(model)
        return within, generate(model)

    with model.disable_adapter():
        with midway(other) as entered_later:
            pass
        within, after = entered_later.finish()
        same(within, alone("disabled"))
        same(after, alone("generate"))
        same(generate(model), alone("disabled"))
    same(generate(model), alone("generate"))


def test_what_is_recomputed_in_backward_is_what_its_own_call_saw():
    model = shared_model()
    model.set_adapter("c")  # LoRA in block 1
    model.train().get_base_model().activation_checkpointing_enable()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def train(pause: Pause) -> Answer:
        loss = model(**rows(), use_cache=False).loss
        with holding(model.get_base_model().model.layers[2].self_attn, pause):  # recomputed before block 1
            gradients = torch.autograd.grad(loss, list(trained.values()))
        return {"loss": loss.detach(), **dict(zip(trained, gradients, strict=True))}

    with midway(train) as other:
        same(call(model), alone("call", "c"))
        same(CALLS["call by rows"](model), alone("call by rows"))
        with model.disable_adapter():
            call(model)
            same(other.finish(), alone("gradients", "c"))


# --- calls within calls -----------------------------------------------------------------------------------


class Asks(tf.LogitsProcessor):
    """A logits processor that makes a call of its own at every step, and leaves the logits as they are."""

    def __init__(self, ask: Callable[[], Answer]):
        self.ask = ask
        self.answers: list[Answer] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.answers.append(self.ask())
        return scores


INNER = ["call", "call by rows", "generate", "generate by rows", "disabled", "reusing"]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", ["generate", "generate by rows"])
def test_a_call_within_a_generation_is_a_call_of_its_own(outer: str, inner: str):
    model = shared_model()
    asks = Asks(partial(CALLS[inner], model))
    same(CALLS[outer](model, logits_processor=[asks]), alone(outer), outer)
    assert len(asks.answers) == NEW
    for got in asks.answers:
        same(got, alone(inner), inner)


def test_a_context_holds_for_the_calls_within_the_calls_that_are_made_in_it():
    model = shared_model()
    asks = Asks(partial(generate, model))
    same(CALLS["disabled"](model, logits_processor=[asks]), alone("disabled"))
    for got in asks.answers:
        same(got, alone("disabled"))


def test_what_holds_for_one_model_does_not_hold_for_another():
    one, other = shared_model(), shared_model()
    with one.disable_adapter():
        answers_as_alone(other)
    with one.reusing(rh.ActivationStore()):
        answers_as_alone(other)
    asks = Asks(partial(CALLS["generate by rows"], other))
    same(generate(one, adapter_names=["b"] * 4, logits_processor=[asks]), alone("generate", "b"))
    for got in asks.answers:
        same(got, alone("generate by rows"))


# --- coroutines -------------------------------------------------------------------------------------------


def test_coroutines_of_one_thread_do_not_see_each_others_contexts():
    model = shared_model()

    async def visit(enter: Callable[[], AbstractContextManager], *names: str) -> list[tuple[str, Answer]]:
        answers = []
        with enter():
            for name in names:
                await asyncio.sleep(0)
                answers.append((name, CALLS[name](model)))
                await asyncio.sleep(0)
        return answers

    async def together() -> list[list[tuple[str, Answer]]]:
        store = rh.ActivationStore()
        return await asyncio.gather(
            visit(model.disable_adapter, "generate", "generate", "generate"),
            visit(nullcontext, "generate by rows", "call by rows", "call", "generate"),
            visit(partial(model.reusing, store), "call", "call", "call"),
            visit(model.disable_adapter, "generate"),
        )

    disabled, plain, reused, shortly_disabled = asyncio.run(together())
    for _, got in disabled + shortly_disabled:
        same(got, alone("disabled"))
    for name, got in plain:
        same(got, alone(name), name)
    for _, got in reused:
        same(got, {key[2:]: value for key, value in alone("reusing").items() if key[0] == "2"})
    answers_as_alone(model)


def test_a_thread_that_is_started_with_the_context_of_a_coroutine_goes_on_in_it():
    model = shared_model()

    async def main() -> tuple[Answer, Answer]:
        with model.disable_adapter():
            within = await asyncio.create_task(asyncio.to_thread(generate, model))
        return within, await asyncio.to_thread(generate, model)

    within, after = asyncio.run(main())
    same(within, alone("disabled"))
    same(after, alone("generate"))

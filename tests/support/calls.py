"""One model that several callers share: its adapters, every kind of call of it, and a call that is held up midway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

import reftheads as rh
from support import oracle
from support.models import tiny_llama

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]
ANSWERS = [[21, 22], [23, 24, 25], [26, 27, 28, 29], [30]]
BY_ROW = ["a", "c", "__base__", "b"]
NEW = 5
SECONDS = 60  # after which a test that waits for a thread fails

Answer = dict[str, Tensor]
"""What a call gave, tensor by tensor."""


# --- the model --------------------------------------------------------------------------------------------


def shared_model() -> rh.InterventionModel:
    """Return a Llama in float64 with adapters `a` (active), `b` and `c`, each of which changes every answer.

    `a` and `b` have one graph and weights of their own: LoReFT at the end of the prompt and a head on its last token.
    `c` edits both ends of the prompt by LoRA, steers what is generated, and has a head that reads every token.
    """
    base = tiny_llama(vocab_size=31, initializer_range=0.3).double()
    base.generation_config.eos_token_id = None
    prompts = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=4), 1, positions="l2", name="edit"),
        rh.Node(rh.LinearHead(2, target="label"), -1, positions="l1", name="verdict"),
    )
    answers = rh.InterventionGraph(
        rh.Node(rh.LoRA(2, alpha=4), 1, "query_output", positions="f2+l2", name="lora"),
        rh.Node(rh.Steering(), 2, positions="generated", name="steer"),
        rh.Node(rh.LinearHead(1, target="score", loss="mse"), -1, name="value"),
    )
    model = rh.InterventionModel(base, prompts, "a")
    model.add_adapter("b", prompts)
    model.add_adapter("c", answers)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rh_nodes." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    return model.double().eval()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Return the ids and mask of prompts, padded at the left."""
    batch = oracle.pad(prompts, "left")
    del batch["position_ids"]
    return batch


def rows() -> dict[str, Tensor]:
    """Return four rows of prompt and answer, padded at the left, with labels, a prompt mask and targets of heads."""
    batch = oracle.pad([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    before_end = mask.flip(1).cumsum(1).flip(1)
    answered = before_end <= torch.tensor([len(a) for a in ANSWERS])[:, None]
    labels = ids.masked_fill(~answered | (mask == 0), -100)
    score = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64).view(ids.shape)
    return {**batch, "labels": labels, "label": torch.tensor([0, 1, 1, 0]), "score": score}


# --- every kind of call -----------------------------------------------------------------------------------


def tensors(output: Any) -> Answer:
    """Return the tensors of a model's output by the path of their field, without caches."""
    out: Answer = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            out[path] = value.detach()
        elif isinstance(value, dict) and path != "past_key_values":
            for name, inner in value.items():
                visit(f"{path}.{name}" if path else name, inner)
        elif isinstance(value, tuple | list):
            for i, inner in enumerate(value):
                visit(f"{path}.{i}", inner)

    visit("", dict(output) if isinstance(output, dict) else {"": output})
    return out


def generate(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> Answer:
    """Continue prompts greedily, and return the sequences, every step's logits and what heads predict."""
    fixed = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return tensors(model.generate(**padded(prompts), **fixed | options))


def call(model: Any, **options: Any) -> Answer:
    """Call the model on rows with labels and targets."""
    with torch.no_grad():
        return tensors(model(**rows(), **options))


def gradients(model: rh.InterventionModel) -> Answer:
    """Return the loss of the rows and its gradients, without touching `.grad`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**rows()).loss
    return {"loss": loss.detach(), **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))}


def backbone(model: rh.InterventionModel) -> Answer:
    """Call the backbone of the base model on the same rows, of which it knows neither labels nor targets."""
    batch = {name: value for name, value in rows().items() if name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        return tensors(model.get_base_model().model(**batch))


def disabled(model: rh.InterventionModel, **options: Any) -> Answer:
    """Generate as the base model does."""
    with model.disable_adapter():
        return generate(model, **options)


def reusing(model: rh.InterventionModel, **options: Any) -> Answer:
    """Call the model twice on what a store of the call's own keeps, recorded and then replayed."""
    with model.reusing(rh.ActivationStore()):
        recorded = call(model, **options)
        replayed = call(model, **options)
    assert "logits" not in recorded | replayed, "the store was not used"
    return {f"{when}.{name}": t for when, out in (("1", recorded), ("2", replayed)) for name, t in out.items()}


def reusing_prefixes(model: rh.InterventionModel, **options: Any) -> Answer:
    """Generate by rows on what a store of the call's own keeps."""
    with model.reusing(rh.ActivationStore()):
        return generate(model, **options)


CALLS: dict[str, Callable[..., Answer]] = {
    "generate": generate,
    "generate by rows": lambda model, **options: generate(model, adapter_names=BY_ROW, **options),
    "generate with heads": lambda model, **options: generate(model, return_heads=True, **options),
    "generate beams": lambda model, **options: generate(model, num_beams=2, output_logits=False, **options),
    "call": call,
    "call by rows": lambda model, **options: call(model, adapter_names=BY_ROW, **options),
    "call side by side": lambda model, **options: call(model, adapter_names=["a", "a", "b", "b"], **options),
    "call with a prompt mask": lambda model, **options: call(
        model, prompt_mask=rows()["attention_mask"].bool(), **options
    ),
    "gradients": gradients,
    "backbone": backbone,
    "disabled": disabled,
    "reusing": reusing,
    "reusing by rows": lambda model, **options: reusing(model, adapter_names=BY_ROW, **options),
    "reusing prefixes": reusing_prefixes,
}
"""Every kind of call that callers of one model make."""


def save_answers(model: rh.InterventionModel, file: str) -> None:
    """Write what every kind of call gives to a file, by the name of the kind; for another process."""
    torch.set_num_threads(1)
    torch.save({name: function(model) for name, function in CALLS.items()}, file)


@cache
def alone(name: str, adapter: str = "a") -> Answer:
    """Return what a kind of call gives on a fresh model that nobody else calls."""
    model = shared_model()
    model.set_adapter(adapter)
    return CALLS[name](model)


def same(got: Answer, expected: Answer, what: str = "") -> None:
    """Assert that two calls gave the same; `what` is named where they did not."""
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{what}, {name}: {text}"
        )


def answers_as_alone(model: rh.InterventionModel) -> None:
    """Assert that every kind of call of a shared model gives what it gives on a fresh one."""
    for name, function in CALLS.items():
        same(function(model), alone(name), name)


# --- several at once --------------------------------------------------------------------------------------


def at_once(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own, all beginning together, and return what they gave; raise the first error."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait(SECONDS)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(run, function) for function in functions]
    return [future.result() for future in futures]


class Pause(tf.LogitsProcessor):
    """Holds up the first thread that comes by, until it may go on.

    As a logits processor it lets `after` steps of a generation by first.
    """

    def __init__(self, after: int = 2):
        self.after = after
        self.reached = threading.Event()
        self.go = threading.Event()

    def hold(self) -> None:
        """Stand still, the first time."""
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(SECONDS), "nobody let this thread go on"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= max(map(len, PROMPTS)) + self.after:
            self.hold()
        return scores


class Midway:
    """A call in another thread that stands still midway; `finish` lets it go on and returns what it gave."""

    def __init__(self, pause: Pause, future: Future[Any]):
        self.pause = pause
        self.future = future

    def finish(self) -> Any:
        """Let the call go on and wait for its result."""
        self.pause.go.set()
        return self.future.result(SECONDS)


@contextmanager
def midway(function: Callable[[Pause], Any]) -> Iterator[Midway]:
    """Within, `function` stands still in another thread, where it called `hold` of the pause that it was given."""
    pause = Pause()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function, pause)
        future.add_done_callback(lambda _: pause.reached.set())
        try:
            assert pause.reached.wait(SECONDS)
            assert not future.done() or future.result() is None, "the call ended before it was held up"
            yield Midway(pause, future)
        finally:
            pause.go.set()


@contextmanager
def holding(module: torch.nn.Module, pause: Pause, tokens: int | None = None) -> Iterator[None]:
    """Within, this thread is held up where `module` returns, at the first pass (of so many columns)."""
    thread = threading.get_ident()

    def hold(module: torch.nn.Module, args: Any, output: Any) -> None:
        h = output if isinstance(output, Tensor) else output[0]
        if threading.get_ident() == thread and tokens in (None, h.shape[1]):
            pause.hold()

    handle = module.register_forward_hook(hold)
    try:
        yield
    finally:
        handle.remove()

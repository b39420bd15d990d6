"""Copies of a model answer as it does and share nothing with it, however they are made."""

import copy
import io
import multiprocessing
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calls import (
    BY_ROW,
    Answer,
    Pause,
    alone,
    answers_as_alone,
    at_once,
    call,
    generate,
    midway,
    rows,
    same,
    save_answers,
    shared_model,
    tensors,
)
from torch import Tensor, nn

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations


# --- copies that one asks for -----------------------------------------------------------------------------


def pickled(model: rh.InterventionModel) -> rh.InterventionModel:
    """The model through `pickle`, as to another process."""
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: rh.InterventionModel) -> rh.InterventionModel:
    """The model through `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[rh.InterventionModel], rh.InterventionModel]] = [copy.deepcopy, pickled, saved_whole]


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_answers_the_same(make: Callable[[rh.InterventionModel], rh.InterventionModel]):
    model = shared_model()
    answers_as_alone(make(model))
    answers_as_alone(make(make(model)))
    answers_as_alone(model)


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_has_weights_hooks_and_adapters_of_its_own(make: Callable[[rh.InterventionModel], rh.InterventionModel]):
    model = shared_model()
    twin = make(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.set_adapter("c")
    answers_as_alone(model)
    twin.unload()
    answers_as_alone(model)
    with make(model).disable_adapter():
        answers_as_alone(model)


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_that_is_made_in_the_middle_of_things_is_as_any_other(
    make: Callable[[rh.InterventionModel], rh.InterventionModel],
):
    model = shared_model()

    def running(pause: Pause) -> Answer:
        return generate(model, adapter_names=BY_ROW, logits_processor=[pause])

    with midway(running) as other:
        with model.disable_adapter(), model.reusing():
            twin = make(model)
            call(model)
        answers_as_alone(twin)
        same(other.finish(), alone("generate by rows"))
    answers_as_alone(twin)


@pytest.mark.slow
def test_a_spawned_process_that_is_given_a_model_answers_the_same(tmp_path: Path):
    model, file = shared_model(), tmp_path / "answers"
    process = multiprocessing.get_context("spawn").Process(target=save_answers, args=(model, str(file)))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
    for name, answer in torch.load(file, weights_only=True).items():
        same(answer, alone(name), name)
    answers_as_alone(model)


# --- replicas, as nn.DataParallel makes them --------------------------------------------------------------

REFUSED = "DistributedDataParallel|DDP"


def change(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function of the model's floating-point tensors that gives different ones of the same shape and place."""
    generator = torch.Generator().manual_seed(7)
    moves = {id(p): torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.05 for p in model.parameters()}
    return lambda tensor: tensor.detach() + moves[id(tensor)] if id(tensor) in moves else tensor.detach().clone()


def replicate(model: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """A replica of `model` as `torch.nn.parallel.replicate` makes it on another device, with tensors by `copied`.

    A replica has no parameters: its tensors are plain attributes. Its hooks are those of the original.
    """
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = OrderedDict()
        for key, child in module._modules.items():
            if child is None:
                replica._modules[key] = None
            else:
                setattr(replica, key, replicas[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                moved = copied(parameter).requires_grad_(parameter.requires_grad)
                setattr(replica, key, moved)
                replica._former_parameters[key] = moved
        for key, buffer in module._buffers.items():
            if buffer is None:
                replica._buffers[key] = None
            else:
                setattr(replica, key, copied(buffer))
    return replicas[model]


def trained_of(replica: nn.Module) -> dict[str, Tensor]:
    """The tensors of a replica that want gradients, by name."""
    return {
        f"{path}.{key}": tensor
        for path, module in replica.named_modules()
        for key, tensor in getattr(module, "_former_parameters", {}).items()
        if tensor.requires_grad
    }


def changed_model(adapter: str) -> rh.InterventionModel:
    """A model whose own parameters are those that a replica of a shared model gets."""
    model = shared_model()
    model.set_adapter(adapter)
    moved = change(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(moved(parameter))
    return model


def replica_of(model: rh.InterventionModel) -> nn.Module | None:
    """A replica with other tensors; `None` where it is refused, with the way out."""
    try:
        return replicate(model, change(model))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=REFUSED):
            raise error
        return None


def answer_of(function: Callable[[], Any]) -> Any:
    """What a call of a replica gives; `None` where it is refused, with the way out."""
    try:
        return function()
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=REFUSED):
            raise error
        return None


@pytest.mark.parametrize("adapter", ["a", "c"])
def test_a_replica_computes_with_its_own_tensors_or_is_refused(adapter: str):
    model = shared_model()
    model.set_adapter(adapter)
    replica = replica_of(model)
    output = None if replica is None else answer_of(lambda: replica(**rows()))
    if output is not None:
        expected = changed_model(adapter)
        same(tensors(output), tensors(expected(**rows())), "replica")
        trained = {name: p for name, p in expected.named_parameters() if p.requires_grad}
        wanted = torch.autograd.grad(expected(**rows()).loss, list(trained.values()))
        mine = trained_of(replica)
        assert mine.keys() == trained.keys()
        got = torch.autograd.grad(output.loss, list(mine.values()))
        same(dict(zip(mine, got, strict=True)), dict(zip(trained, wanted, strict=True)), "gradients of a replica")
        assert all(parameter.grad is None for parameter in model.parameters())
    model.set_adapter("a")
    answers_as_alone(model)


def test_replicas_that_run_at_once_compute_what_each_computes_alone_or_are_refused():
    model = shared_model()
    replicas = [replica_of(model) for _ in range(4)]
    expected = tensors(changed_model("a")(**rows()))
    for _ in range(5):
        calls = [partial(answer_of, partial(replica, **rows())) for replica in replicas if replica is not None]
        for output in at_once(calls) if calls else []:
            if output is not None:
                same(tensors(output), expected, "replica")
    answers_as_alone(model)

"""A copy of a model, by whatever way it was made, is a model of its own that answers the same."""

import copy
import io
import multiprocessing
import pickle

import peft
import pytest
import torch
from support.models import random_ids, randomise, tiny_llama

import reftheads as rh

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations

IDS = random_ids()
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
GRAPH = rh.InterventionGraph(
    rh.Node(rh.LoReFT(rank=2), layer=1, positions="l1", name="edit"),
    rh.Node(rh.LinearHead(outputs=2), layer=2, positions="l1", name="head"),
    rh.Node(rh.LoRA(rank=2), layer=0, component="query_output", name="lora"),
)


def trained(wrap):
    """A model in which every node has random weights."""
    model = wrap(tiny_llama())
    randomise(model)
    return model.eval()


def answers(model):
    """What a model says to padded rows: logits, predictions, and the tokens and predictions that it generates."""
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK)
        new = model.generate(
            input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, eos_token_id=-1, return_heads=True
        )
    return out.logits, out.predictions["head"], new.sequences, new.predictions["head"]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # the test's own file


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}
WRAPS = {
    "InterventionModel": lambda base: rh.InterventionModel(base, GRAPH),
    "get_peft_model": lambda base: peft.get_peft_model(base, rh.InterventionConfig(graph=GRAPH)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_copy_answers_the_same_and_is_a_model_of_its_own(wrap, way):
    model = trained(WRAPS[wrap])
    before = answers(model)
    twin = WAYS[way](model)
    assert type(twin) is type(model) and same(answers(twin), before) == [True] * 4
    with twin.disable_adapter(), model.disable_adapter(), torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    assert same(answers(model), before) == [True] * 4
    after = answers(twin)
    assert same(after, before) == [False] * 4
    randomise(model, 9)
    assert same(answers(model), before) != [True] * 4 and same(answers(twin), after) == [True] * 4
    model.unload()
    assert same(answers(twin), after) == [True] * 4


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_can_be_trained_saved_and_unloaded_alone(way, tmp_path):
    model = trained(WRAPS["InterventionModel"])
    before = answers(model)
    twin = WAYS[way](model)
    labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < 2, -100)
    twin.train()(input_ids=IDS, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in twin.node("edit").parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    twin.eval().save_pretrained(tmp_path)
    assert same(answers(rh.InterventionModel.from_pretrained(tiny_llama(), tmp_path)), before) == [True] * 4
    twin.add_adapter("second", GRAPH)
    twin.set_adapter("second")
    assert list(model.peft_config) == ["default"] and same(answers(model), before) == [True] * 4
    base = twin.unload()
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, tiny_llama()(IDS).logits)
    assert same(answers(model), before) == [True] * 4


def _answer(model, connection):
    torch.set_num_threads(1)
    connection.send([tensor.tolist() for tensor in answers(model)])


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_spawned_process_gets_a_model_that_answers_the_same(wrap):
    model, context = trained(WRAPS[wrap]), multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(model, there))
    process.start()
    there.close()
    theirs = here.recv()
    process.join()
    assert process.exitcode == 0
    assert theirs == [tensor.tolist() for tensor in answers(model)]

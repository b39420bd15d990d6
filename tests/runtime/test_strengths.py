"""How strongly a node acts is said call by call: by its equation, in each way through the model, for one thread."""

import threading

import pytest
import torch
from support.models import random_ids, randomise, tiny_llama
from transformers import DynamicCache

import reftheads as rh

STRENGTHS = [-0.5, 0.3, 1.7]
IDS = random_ids(batch=2, tokens=7)


def edited(*nodes: rh.Node) -> rh.InterventionModel:
    model = rh.InterventionModel(tiny_llama(initializer_range=0.3).double(), rh.InterventionGraph(*nodes))
    model.tuner.layer.double()
    randomise(model)
    return model


def two_nodes() -> rh.InterventionModel:
    low = rh.Node(rh.LoReFT(rank=2), 0, positions="f2", name="low")
    return edited(low, rh.Node(rh.Steering(), 1, name="high"))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_an_edit_goes_so_far_of_its_way(strength):
    model = edited(rh.Node(rh.LoReFT(rank=2), 1, positions="f2", name="edit"))
    node = model.node("edit")

    def by_hand(module, args, h):
        far = h + (h @ node.W.T + node.b - h @ node.R.T) @ node.R
        return torch.cat([h[:, :2] + strength * (far - h)[:, :2], h[:, 2:]], 1)

    with model.at_strength({"edit": strength}), torch.no_grad():
        got = model(IDS).logits
    base = model.get_base_model()
    handle = base.model.layers[1].register_forward_hook(by_hand)
    with model.disable_adapter(), torch.no_grad():
        expected = model(IDS).logits
    handle.remove()
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, model(IDS).logits)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_linear_edit_at_a_strength_is_the_one_with_scaled_weights(strength):
    model = edited(
        rh.Node(rh.LoRA(rank=2), 1, "query_output", name="lora"), rh.Node(rh.Steering(), 1, positions="l1", name="v")
    )
    with torch.no_grad(), model.at_strength({"lora": strength, "v": strength}):
        got = model.generate(IDS, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model.node("lora").assign(B=strength * model.node("lora").B)
    model.node("v").assign(v=strength * model.node("v").v)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_at_0_a_node_is_not_there_and_at_1_it_is_what_it_learnt_bit_for_bit():
    model = two_nodes()
    full = model(IDS).logits
    with model.disable_adapter():
        base = model(IDS).logits
    with model.at_strength({"low": 0, "high": 0.0}):
        assert torch.equal(model(IDS).logits, base)
        with model.at_strength({"low": 1, "high": 1}):  # the inner block counts more
            assert torch.equal(model(IDS).logits, full)
    with model.at_strength({"low": 0}), model.at_strength({"high": 0}):  # and leaves alone what it does not name
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, full)


@torch.no_grad()
def test_a_name_means_a_node_in_every_adapter_or_in_one():
    model = two_nodes()
    model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Steering(), 1, name="high")))
    model.tuner.layer.double()
    model.set_adapter(["default", "other"])
    randomise(model)
    model.set_adapter(["default"])
    alone = model(IDS).logits
    model.set_adapter(["default", "other"])
    with model.at_strength({"other/high": 0}):
        assert torch.equal(model(IDS).logits, alone)
    with model.at_strength({"high": 0, "low": 0}), model.disable_adapter():
        base = model(IDS).logits
    with model.at_strength({"high": 0, "low": 0}):
        assert torch.equal(model(IDS).logits, base)


OTHER = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 2, positions="f1+l1", name="low"))


@torch.no_grad()
@pytest.mark.parametrize("graph", [None, OTHER], ids=["of one graph", "of two graphs"])
def test_rows_of_several_adapters_keep_to_their_strengths(graph):
    model = two_nodes()
    model.add_adapter("other", graph or model.plan().graph)
    model.tuner.layer.double()
    names = ["default", "other"]
    model.set_adapter(names)
    randomise(model)
    with model.at_strength({"other/low": 0.4, "default/high": 0}):
        together = model(IDS, adapter_names=names).logits
        for i, name in enumerate(names):
            torch.testing.assert_close(together[i], model(IDS, adapter_names=[name] * 2).logits[i])


def test_a_replayed_step_has_the_loss_and_the_gradients_of_a_plain_one():
    model = edited(rh.Node(rh.LoReFT(rank=2), 1, positions="l1", name="edit"))
    labels = IDS.clone()
    labels[:, :4] = -100
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.requires_grad)])

    with model.at_strength({"edit": 0.3}):
        plain = step()
        with model.reusing(rh.ActivationStore()):
            step()
            torch.testing.assert_close(step(), plain)
    assert not torch.allclose(step(), plain)


@torch.no_grad()
def test_two_threads_do_not_see_each_others_strengths():
    model, got, meet = two_nodes(), {}, threading.Barrier(3)

    def ask(strength: float) -> None:
        with model.at_strength({"low": strength, "high": strength}):
            meet.wait()
            got[strength] = [model(IDS).logits for _ in range(20)]
            meet.wait()

    threads = [threading.Thread(target=ask, args=(strength,)) for strength in (0.25, 0.75)]
    for thread in threads:
        thread.start()
    meet.wait()  # both blocks are open
    full = model(IDS).logits
    meet.wait()
    for thread in threads:
        thread.join()
    assert torch.equal(full, model(IDS).logits)
    for strength, answers in got.items():
        with model.at_strength({"low": strength, "high": strength}):
            alone = model(IDS).logits
        assert not torch.allclose(alone, full) and all(torch.equal(answer, alone) for answer in answers)


def test_a_cache_that_was_filled_at_another_strength_is_refused():
    model, cache = two_nodes(), DynamicCache(config=tiny_llama().config)
    with model.at_strength({"high": 0.5}):
        model(IDS[:, :4], past_key_values=cache)
        model.generate(IDS, past_key_values=cache, max_new_tokens=1)
    cache = DynamicCache(config=model.config)
    with model.at_strength({"high": 0.5}):
        model(IDS[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="at another strength"):
        model.generate(IDS, past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), "1", None, True, 1j])
def test_what_is_no_finite_number_is_refused(strength):
    model = two_nodes()
    with pytest.raises(ValueError, match="strength of node 'low' must be a finite number"):
        with model.at_strength({"high": 0, "low": strength}):
            pass


def test_a_node_that_is_not_there_and_one_that_reads_are_refused():
    model = edited(rh.Node(rh.Steering(), 1, name="v"), rh.Node(rh.Collect(), 1, name="seen"))
    with pytest.raises(ValueError, match="no node 'w': there are default/v, default/seen"), model.at_strength({"w": 1}):
        pass
    with pytest.raises(ValueError, match="node 'seen' reads"), model.at_strength({"seen": 0}):
        pass

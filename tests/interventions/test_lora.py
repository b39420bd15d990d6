"""LoRA as a node, against hooks of the test's own."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from support.models import WIDTH, random_ids, randomise, tiny_gpt2, tiny_llama, weighted

import reftheads as rh
from reftheads.graph import Context
from reftheads.graph.intervention import Shape
from reftheads.runtime.node_module import NodeModule

EXACT = {"atol": 1e-10, "rtol": 0}
LLAMA = "model.layers.1.self_attn.q_proj"
GPT2 = "transformer.h.1.attn.c_attn"

# base model, where, the module that is hooked, and which of its columns belong to the site
CASES = {
    "linear": (tiny_llama, {"layer": 1, "component": "query_output"}, LLAMA, slice(0, WIDTH)),
    "grouped keys": (tiny_llama, {"layer": 1, "component": "key_output"}, LLAMA.replace("q_", "k_"), slice(0, 8)),
    "one head": (tiny_llama, {"layer": 1, "component": "query_output", "head": 2}, LLAMA, slice(8, 12)),
    "path": (tiny_llama, {"component": "model.layers.1.mlp.up_proj"}, "model.layers.1.mlp.up_proj", slice(0, 24)),
    "fused values": (tiny_gpt2, {"layer": 1, "component": "value_output"}, GPT2, slice(2 * WIDTH, 3 * WIDTH)),
    "whole fused": (tiny_gpt2, {"component": GPT2}, GPT2, slice(0, 3 * WIDTH)),
}


@pytest.mark.parametrize("positions, tokens", [("all", slice(0, 7)), ("2:5", slice(2, 5))])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_written_out_formula(case, positions, tokens):
    make, where, path, columns = CASES[case]
    ids = random_ids()
    node = rh.Node(rh.LoRA(rank=2, alpha=7), positions=positions, name="n", **where)
    model = rh.InterventionModel(make(), rh.InterventionGraph(node)).double().eval()
    randomise(model)
    p = {name: value.detach().clone().requires_grad_() for name, value in model.node("n").stored().items()}
    base = make().double().requires_grad_(False)

    def hook(module, args, h):
        update = torch.zeros_like(h)
        update[:, tokens, columns] = 7 / 2 * args[0][:, tokens] @ p["A"].T @ p["B"].T
        return h + update

    base.get_submodule(path).register_forward_hook(hook)
    logits, expected = model(ids).logits, base(ids).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    weighted(logits).backward()
    weighted(expected).backward()
    for name, parameter in model.node("n").named_parameters():
        assert p[name].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, p[name].grad, **EXACT)


def test_lora_starts_as_the_identity_and_alpha_is_the_rank_if_left_out():
    ids = random_ids()
    base = tiny_llama()
    expected = base(ids).logits
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 1, "query_output"))).eval()
    assert torch.equal(model(ids).logits, expected)
    assert rh.LoRA(rank=4).scaling == 1
    assert rh.LoRA(rank=4, alpha=16).scaling == 4


def test_dropout_acts_on_what_enters_the_module_in_training_only():
    lora = rh.LoRA(rank=2, dropout=0.5)
    torch.manual_seed(0)
    node = NodeModule(lora, Shape(WIDTH, WIDTH))
    randomise(node)
    h, x = torch.randn(2, 2, 5, WIDTH)
    p = node.stored()
    torch.manual_seed(1)
    trained = lora.edit(p, h, Context(x=x, training=True))
    torch.manual_seed(1)
    torch.testing.assert_close(trained, h + F.dropout(x, 0.5) @ p["A"].T @ p["B"].T)
    torch.testing.assert_close(lora.edit(p, h, Context(x=x)), h + x @ p["A"].T @ p["B"].T)


def test_two_nodes_on_one_module_add_up():
    ids = random_ids()

    def model(*ranks):
        nodes = (rh.Node(rh.LoRA(rank), 1, "query_output", name=f"n{i}") for i, rank in enumerate(ranks))
        return rh.InterventionModel(tiny_llama(), rh.InterventionGraph(*nodes)).double().eval()

    apart, together = model(2, 3), model(5)
    randomise(apart)
    a, b = apart.node("n0"), apart.node("n1")
    together.node("n0").assign(A=torch.cat([a.A, b.A]), B=torch.cat([a.B, b.B], dim=1))
    torch.testing.assert_close(apart(ids).logits, together(ids).logits, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=lambda bits: next(iter(bits)))
def test_lora_beside_a_quantised_module_is_the_written_out_formula_and_trains(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    ids = random_ids()
    quantised = tf.BitsAndBytesConfig(**bits)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu")
    node = rh.Node(rh.LoRA(rank=2, alpha=8), 1, "query_output", positions="2:5", name="n")
    model = rh.InterventionModel(base, rh.InterventionGraph(node))
    randomise(model)
    model.train()(ids, labels=ids, prompt_mask=torch.ones_like(ids)).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.node("n").parameters())
    seen = []
    base.get_submodule(LLAMA).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model.eval()(ids)
        with model.disable_adapter():
            model(ids)
    (x, edited), (_, h) = seen
    p = {name: value.detach() for name, value in model.node("n").stored().items()}
    expected = h.float().clone()
    expected[:, 2:5] += 4 * x[:, 2:5].float() @ p["A"].T @ p["B"].T
    torch.testing.assert_close(edited, expected.to(h.dtype), atol=1e-5, rtol=1e-5)
    assert torch.equal(edited[:, :2], h[:, :2]) and not torch.equal(edited[:, 2:5], h[:, 2:5])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rh.LoRA(rank=0), "positive integer"),
        (lambda: rh.LoRA(rank=2, dropout=1.5), "dropout must be"),
        (lambda: rh.LoRA(rank=2, dtype="int4"), "float type"),
        (lambda: rh.Node(rh.LoRA(rank=WIDTH + 1), 1, "query_output"), "over the widths"),
        (lambda: rh.Node(rh.LoRA(rank=2), 1, "block_output"), "linear module"),
        (lambda: rh.Node(rh.LoRA(rank=2), 1, "head_output"), "linear module"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        rh.InterventionModel(tiny_llama(), rh.InterventionGraph(make()))

"""Tensor parallelism: where a process sees all features, the graph is that of one process; elsewhere it is refused."""

import pytest
import torch
from support.models import tiny_llama
from support.processes import run_together
from torch import nn

from reftheads.architectures.sharding import holds_a_part

PROGRAM = """
import sys
import torch
import torch.distributed as dist
import transformers as tf
from support.models import randomise, tiny_llama, weighted
from support.oracle import pad
from support.processes import leave
import reftheads as rh

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, out = sys.argv[1:]
options = {"distributed_config": tf.DistributedConfig(tp_size=2, tp_plan="auto")} if dist.get_world_size() == 2 else {}
load = lambda: tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
batch = pad([[5, 6, 7, 8, 9, 10], [11, 12, 13]], "left")
NAMES = ["block_input", "attention_input", "attention_output", "mlp_input", "mlp_output", "block_output"]
PATHS = ["model.layers.1.input_layernorm", "model.layers.1.self_attn", "model.layers.1.mlp", "model.embed_tokens"]
INPUTS = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp"]
whole = [{"layer": 1, "component": name} for name in NAMES] + [{"component": path} for path in PATHS]
whole += [{"component": path, "side": "input"} for path in INPUTS] + [{"component": "final_norm_output"}]
whole += [{"component": "embedding_output"}]

nodes = []
for i, where in enumerate(whole):
    nodes += [
        rh.Node(rh.LoReFT(rank=2), **where, positions="f2+l2", name=f"edit{i}"),
        rh.Node(rh.Steering(), **where, positions="generated", name=f"steer{i}"),
        rh.Node(rh.Collect(), **where, name=f"seen{i}"),
    ]
model = rh.InterventionModel(load(), rh.InterventionGraph(*nodes))
randomise(model.tuner.layer)
model.double()
result = model(**batch, prompt_mask=batch["attention_mask"] * (torch.arange(6) < 5))
(weighted(result.logits) + sum(weighted(seen) for seen in result.collected.values())).backward()
found = {"logits": result.logits, **result.collected}
found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
found["generated"] = model.eval().generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
found = {name: t.detach() for name, t in found.items()}

if options:
    part = [{"layer": 1, "component": name} for name in ("query_output", "key_output", "value_output", "head_output")]
    part += [{"layer": 1, "component": name, "head": 1} for name in ("query_output", "key_output", "head_output")]
    part += [{"layer": 1, "component": "mlp_activation"}]
    part += [{"component": "model.layers.1.mlp." + name} for name in ("gate_proj", "up_proj")]
    part += [{"component": "model.layers.1." + name, "side": "input"} for name in ("mlp.down_proj", "self_attn.o_proj")]
    lora = [{"layer": 1, "component": name} for name in ("query_output", "attention_output", "mlp_output")]
    for what, places in ((rh.LoReFT(rank=2), part), (rh.Collect(), part), (rh.LoRA(rank=2), lora)):
        for where in places:
            base = load()
            try:
                graph = rh.InterventionGraph(rh.Node(rh.Steering(), 0), rh.Node(what, **where, name="edit"))
                rh.InterventionModel(base, graph)
                raise AssertionError(f"{what} at {where} was not refused")
            except ValueError as error:
                assert "node 'edit'" in str(error) and "tensor parallelism gives each process" in str(error), error
            assert not hasattr(base, "interventions") and not base.model.layers[0]._forward_hooks
torch.save(found, f"{out}.{dist.get_rank()}")
leave()
"""


@pytest.mark.slow
def test_two_processes_that_share_the_heads_give_what_one_gives_or_refuse(tmp_path):
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "base")
    run_together(PROGRAM, tmp_path / "base", tmp_path / "one", processes=1)
    run_together(PROGRAM, tmp_path / "base", tmp_path / "two", processes=2)
    expected = torch.load(tmp_path / "one.0", weights_only=True)
    assert len(expected) > 60
    for rank in range(2):
        found = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


PARTS = {
    "layers.0.attn.q": frozenset(["output"]),
    "layers.0.attn.o": frozenset(["input"]),
    "layers.0.mlp.up": frozenset(["output"]),
    "layers.0.mlp.down": frozenset(["input"]),
    "layers.0.mlp.packed": frozenset(["input", "output"]),
    "layers.1.inner.up": frozenset(["output"]),
    "layers.1.outer.down": frozenset(["input"]),
}


@pytest.mark.parametrize(
    "path, inputs, outputs",
    [
        ("", False, False),
        ("norm", False, False),
        ("layers.0", False, False),
        ("layers.0.norm", False, False),
        ("layers.0.attn", False, False),
        ("layers.0.attn.q", False, True),
        ("layers.0.attn.o", True, False),
        ("layers.0.attn.dropout", True, True),
        ("layers.0.mlp.packed", True, True),
        ("layers.1.inner", False, True),  # as BERT's `intermediate` and `output`
        ("layers.1.outer", True, False),
        ("layers.1.norm", True, True),
    ],
)
def test_what_holds_a_part_follows_from_where_weights_are_cut(path: str, inputs: bool, outputs: bool):
    assert holds_a_part(PARTS, path, "input") == inputs
    assert holds_a_part(PARTS, path, "output") == outputs


def test_a_model_of_one_process_holds_no_parts():
    model: nn.Module = tiny_llama()
    assert not any(holds_a_part({}, path, "output") for path, _ in model.named_modules())

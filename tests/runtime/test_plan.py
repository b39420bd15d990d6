"""Compiling: every node finds its module, widths and turn, or the graph is refused before anything is changed."""

import pytest
import torch
from support.models import HEADS, LAYERS, WIDTH, random_ids, tiny_bart, tiny_gpt2, tiny_llama, tiny_t5

import reftheads as rh
from reftheads.graph.site import BLOCK_COMPONENTS
from reftheads.runtime import compile_graph


def probe(layer=None, component="block_output", positions="l1", **rest):
    return rh.Node(rh.LinearHead(outputs=1, loss="mse"), layer, component, positions, name="probe", **rest)


def gated(layer=None, component="block_output", positions="all", **rest):
    inner = rh.Gated(rh.LoReFT(rank=1))
    return rh.Node(inner, layer, component, positions, name="gated", source="probe", **rest)


def test_a_plan_says_module_side_and_width_of_every_node():
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), layer=-1, name="block"),
        rh.Node(rh.LoRA(rank=2), layer=0, component="key_output", name="key"),
        rh.Node(rh.LoReFT(rank=2), layer=1, component="head_output", head=-1, name="head"),
        rh.Node(rh.Collect(), component="model.layers.2.mlp.down_proj", side="input", name="path"),
    )
    plan = compile_graph(graph, tiny_llama())
    found = {n: (plan[n].address.module, plan[n].address.side, plan[n].shape.width) for n in graph.names}
    assert found == {
        "block": ("model.layers.2", "output", WIDTH),
        "key": ("model.layers.0.self_attn.k_proj", "output", WIDTH // 2),  # two of four heads are keys
        "head": ("model.layers.1.self_attn.o_proj", "input", WIDTH // HEADS),
        "path": ("model.layers.2.mlp.down_proj", "input", 24),
    }
    assert plan["key"].shape.input_width == WIDTH and plan["head"].shape.input_width is None
    assert plan["head"].address.site.head == HEADS - 1 and plan["block"].address.site.layer == LAYERS - 1


def test_compiling_changes_nothing():
    model = tiny_llama()
    names, state = [n for n, _ in model.named_modules()], set(vars(model))
    compile_graph(rh.InterventionGraph.over(rh.LoReFT(rank=2), range(3)), model)
    assert [n for n, _ in model.named_modules()] == names and set(vars(model)) == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_is_walked_as_often_however_many_nodes_are_placed():
    model, walks = tiny_llama(), []
    walk = model.named_modules

    def counted(*args, **kwargs):
        walks.append(args)
        return walk(*args, **kwargs)

    places = [{"layer": 1}, {"layer": 0, "component": "query_output"}, {"component": "model.layers.2.mlp"}]
    counts = []
    for times in (1, 1, 6):  # the first looks at how the model runs, which is remembered
        nodes = [
            rh.Node(rh.Collect(), **place, name=f"{i}_{j}") for i in range(times) for j, place in enumerate(places)
        ]
        model.named_modules = counted
        assert len(compile_graph(rh.InterventionGraph(*nodes), model).nodes) == 3 * times
        del model.named_modules
        counts.append(len(walks))
        walks.clear()
    assert counts[1] == counts[2] <= 6


# --- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", ["source first", "reader first"])
@pytest.mark.parametrize("layer", [(0, 1), (0, 2), (0, 0), (1, 0), (2, 0)])
@pytest.mark.parametrize("components", [("block_output", "mlp_input"), ("query_output", "value_output")])
def test_a_source_must_run_before_its_reader(layer, components, listed):
    """Within a block the vocabulary's order is that of execution, so the oracle is the order of its words."""
    for first, second in (components, components[::-1]):
        nodes = [probe(layer[0], first), gated(layer[1], second)]
        graph = rh.InterventionGraph(*(nodes if listed == "source first" else nodes[::-1]))
        turn = [(at, BLOCK_COMPONENTS.index(c)) for at, c in zip(layer, (first, second), strict=True)]
        if turn[0] < turn[1]:
            compile_graph(graph, tiny_llama())
        else:
            with pytest.raises(ValueError) as error:
                compile_graph(graph, tiny_llama())
            assert "'gated'" in str(error.value) and "reads 'probe'" in str(error.value)
            assert "runs later: a source must lie before its reader" in str(error.value)


def test_at_one_site_the_order_of_the_list_decides():
    compile_graph(rh.InterventionGraph(probe(1), gated(1)), tiny_llama())
    with pytest.raises(ValueError, match="runs later"):
        compile_graph(rh.InterventionGraph(gated(1), probe(1)), tiny_llama())


def test_at_one_fused_projection_the_order_of_the_list_decides():
    """Queries, keys and values are given at once there, and a path may name all of them."""
    path, ids = "transformer.h.1.attn.c_attn", random_ids()
    whole = rh.Node(rh.Steering(torch.ones(3 * WIDTH)), component=path, name="all")
    keys = rh.Node(rh.Ablate(), 1, "key_output", name="part")
    seen = rh.Node(rh.Collect(), component=path, name="seen")
    shown = []
    for nodes in ((whole, keys, seen), (keys, whole, seen)):
        model = rh.InterventionModel(tiny_gpt2(), rh.InterventionGraph(*nodes)).eval()
        shown.append(model(ids).collected["seen"][..., WIDTH : 2 * WIDTH])
    assert shown[0].eq(0).all() and shown[1].eq(1).all()


@pytest.mark.parametrize("positions", ["all", "f2", "prompt"])
def test_a_source_of_several_tokens_in_another_stack_is_refused(positions: str):
    read = rh.Node(rh.LinearHead(1), 0, positions=positions, stack="encoder", name="probe")
    edit = rh.Node(rh.Gated(rh.Steering()), 2, positions=positions, source="probe")
    with pytest.raises(ValueError, match="of another stack, whose tokens are not its own"):
        compile_graph(rh.InterventionGraph(read, edit), tiny_bart())


def test_a_pass_agrees_with_the_order_that_compiling_promised():
    """Every accepted pair of components runs: the source was there when its reader asked."""
    ran = 0
    for first in BLOCK_COMPONENTS:
        for second in BLOCK_COMPONENTS:
            model, graph = tiny_llama(), rh.InterventionGraph(probe(1, first), gated(1, second))
            try:
                compile_graph(graph, model)
            except ValueError:
                continue
            out = rh.InterventionModel(model, graph)(random_ids())
            assert out.predictions["probe"].shape == (2, 1)
            ran += 1
    assert ran == len(BLOCK_COMPONENTS) * (len(BLOCK_COMPONENTS) + 1) // 2


def test_the_embeddings_come_before_all_blocks_and_the_final_norm_after():
    embeddings, norm = {"component": "embedding_output"}, {"component": "final_norm_output"}
    for source, reader in ((embeddings, {"layer": 0}), ({"layer": -1}, norm), (embeddings, norm)):
        compile_graph(rh.InterventionGraph(probe(**source), gated(**reader)), tiny_llama())
        with pytest.raises(ValueError, match="runs later"):
            compile_graph(rh.InterventionGraph(probe(**reader), gated(**source)), tiny_llama())


def test_an_encoder_runs_before_its_decoder_whatever_the_layers():
    model = tiny_t5()
    there = rh.InterventionGraph(probe(2, stack="encoder"), gated(0, stack="decoder"))
    compile_graph(there, model)
    back = rh.InterventionGraph(probe(0, stack="decoder"), gated(2, stack="encoder"))
    with pytest.raises(ValueError, match=r"at encoder block_output\[2\] reads 'probe' at decoder block_output\[0\]"):
        compile_graph(back, model)
    edited = rh.InterventionModel(model, there)
    edited.node("probe").assign(W=torch.zeros(1, WIDTH), b=[0.0])
    ids = random_ids()
    assert edited(input_ids=ids, decoder_input_ids=ids[:, :3]).predictions["probe"].tolist() == [[0.0], [0.0]]


def test_a_path_whose_place_in_the_block_is_unknown_cannot_be_ordered():
    graph = rh.InterventionGraph(probe(component="model.layers.1.post_attention_layernorm"), gated(2))
    with pytest.raises(ValueError, match="cannot tell whether 'probe' runs before 'gated'.*use a component"):
        compile_graph(graph, tiny_llama())


# --- what a node needs of its place ------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["query_output", "key_output", "value_output", "mlp_output", "attention_output"])
def test_lora_finds_the_linear_module_of_a_component(component):
    base = tiny_llama()
    plan = compile_graph(rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 1, component, name="lora")), base)
    module = base.get_submodule(plan["lora"].address.module)
    assert isinstance(module, torch.nn.Linear)
    assert (plan["lora"].shape.input_width, plan["lora"].shape.width) == (module.in_features, module.out_features)


@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_input", "mlp_activation", "head_output"])
def test_lora_is_refused_where_there_is_no_linear_output(component):
    with pytest.raises(ValueError) as error:
        compile_graph(rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 1, component)), tiny_llama())
    message = str(error.value)
    assert "LoRA acts on the output of a linear module" in message and f"{component}[1]" in message
    assert "query_output" in message and "path of a projection" in message


def test_lora_acts_on_the_columns_of_a_fused_projection():
    plan = compile_graph(rh.InterventionGraph(rh.Node(rh.LoRA(rank=2), 1, "value_output", name="v")), tiny_gpt2())
    assert plan["v"].address.module == "transformer.h.1.attn.c_attn"
    assert plan["v"].address.columns == range(2 * WIDTH, 3 * WIDTH)
    assert (plan["v"].shape.width, plan["v"].shape.input_width) == (WIDTH, WIDTH)


def test_nodes_of_one_width_share_one_set_of_parameters():
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph.over(rh.LoReFT(rank=2), range(3), share="all"))
    assert len({id(model.node(f"loreft_{i}")) for i in range(3)}) == 1
    assert model.get_nb_trainable_parameters()[0] == 2 * WIDTH * 2 + 2


def test_nodes_of_different_widths_cannot_share():
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 1, name="wide", share="s"),
        rh.Node(rh.LoReFT(rank=2), 1, "key_output", name="narrow", share="s"),
    )
    with pytest.raises(ValueError, match="'wide' and 'narrow' share 's', but see 16 and 8 features: share only among"):
        compile_graph(graph, tiny_llama())


def test_shared_lora_needs_equal_input_widths_too():
    """mlp_output and attention_output are equally wide, but what enters their projections is not."""
    graph = rh.InterventionGraph(
        rh.Node(rh.LoRA(rank=2), 1, "attention_output", name="a", share="s"),
        rh.Node(rh.LoRA(rank=2), 1, "mlp_output", name="b", share="s"),
    )
    with pytest.raises(ValueError, match="'a' and 'b' share 's', but see 16 → 16 and 24 → 16 features"):
        compile_graph(graph, tiny_llama())


def test_an_edit_of_the_residual_stream_may_be_shared_between_modules_of_any_input():
    """What enters the module is of no concern to an edit that does not read it."""
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=2), 1, "attention_output", name="a", share="s"),
        rh.Node(rh.LoReFT(rank=2), 1, "mlp_output", name="b", share="s"),
        rh.Node(rh.LoReFT(rank=2), 1, "block_output", name="c", share="s"),
    )
    assert len(compile_graph(graph, tiny_llama()).owners()) == 1

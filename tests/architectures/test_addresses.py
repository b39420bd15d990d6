"""Every component of every supported architecture, checked on the activation that an edit changes.

`CASES` names, per architecture, the modules that consume each activation. The tests write a known tensor
where `locate` says and look at those consumers, so that the table is independent of `locate`.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from support.architectures import BART, CASES, CAUSAL, GQA, LAYERS, SMALL, B, Case, T
from torch import Tensor, nn

from reftheads.architectures.address import Address
from reftheads.architectures.addresses import locate
from reftheads.architectures.structure import stacks
from reftheads.graph.site import BLOCK_COMPONENTS, COMPONENTS, HEAD_COMPONENTS, Site
from reftheads.runtime.hooks import attach


@cache
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name].auto.from_config(CASES[name].config).double().eval()
    model.set_experts_implementation("eager")  # the grouped products know no float64
    for p in model.parameters():  # biases and norms away from 0 and 1, projections large enough to matter
        p.data.add_(torch.randn_like(p) * 0.2)
    return model


def inputs(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    if isinstance(case.config, tf.ViTConfig):  # 4 patches and a class token
        return {"pixel_values": torch.randn(B, 3, 8, 8, generator=g, dtype=torch.float64)}
    ids = torch.randint(3, 40, (B, T), generator=g)
    return {"input_ids": ids} if case.stack is None else {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


@dataclass
class Seen:
    """What entered and left the modules of one block, by their names in `CASES`; "" is the block."""

    into: dict[str, Tensor] = field(default_factory=dict)
    out: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None


def run(name: str, layer: int = 1) -> Seen:
    """Runs the model and records plain hooks' view of one block, after those that are already installed."""
    case, model, seen = CASES[name], build(name), Seen()
    table = (*case.qkv, case.o, case.first, case.middle, *case.up, case.down, case.attention_adds, case.mlp_adds)
    names = {n for n in (*table, case.last, case.cross, case.middle_output, "") if n is not None}
    handles = []

    def record(name: str) -> None:
        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            seen.into[name] = h.clone().reshape(B, -1, h.shape[-1])

        def after(_module: nn.Module, _args: tuple, output: Any) -> None:
            h = output if isinstance(output, Tensor) else output[0]
            seen.out[name] = h.clone().reshape(B, -1, h.shape[-1])

        module = model.get_submodule(case.path(name, layer))
        handles.extend(
            [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        )

    try:
        for n in names:
            record(n)
        with torch.no_grad():
            seen.result = model(**inputs(case), output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@cache
def untouched(name: str) -> Seen:
    return run(name)


def known(name: str, width: int) -> Tensor:
    tokens = untouched(name).into[""].shape[1]
    return torch.randn(B, tokens, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def find(name: str, component: str, layer: int | None = 1, head: int | None = None) -> Address:
    layer = layer if component in BLOCK_COMPONENTS else None
    return locate(build(name), Site(layer, component, head=head, stack=CASES[name].stack))


def read(name: str, *components: str, layer: int = 1) -> list[Tensor]:
    values: dict[str, Tensor] = {}
    handles = []
    for component in components:
        address = find(name, component, layer)

        def touch(h: Tensor, _entered: Any, component: str = component, address: Address = address) -> None:
            values[component] = h[..., address.index].clone().reshape(B, -1, address.width)

        handles.append(attach(build(name).get_submodule(address.module), address.side, touch))
    with torch.no_grad():
        build(name)(**inputs(CASES[name]))
    for handle in handles:
        handle.remove()
    return [values[c] for c in components]


def write(name: str, address: Address, value: Tensor, layer: int = 1) -> Seen:
    def touch(h: Tensor, _entered: Any) -> Tensor:
        new = h.clone()
        new[..., address.index] = value.reshape(*h.shape[:-1], address.width)
        return new

    handle = attach(build(name).get_submodule(address.module), address.side, touch)
    try:
        return run(name, layer)
    finally:
        handle.remove()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def heads_of(case: Case, seen: Seen) -> list[Tensor]:
    """Queries, keys and values (batch, token, head, feature), split as the architecture's forward does it."""
    return case.split(*(seen.out[n] for n in case.qkv), c=case)


def added(case: Case, seen: Seen) -> tuple[Tensor, Tensor]:
    """What attention and MLP add to the residual stream."""
    mlp = case.mlp_adds or case.down
    assert mlp is not None
    return seen.out[case.attention_adds or case.o], seen.out[mlp]


def second_residual(case: Case, seen: Seen, attention: Tensor, entered: Tensor) -> Tensor:
    """What the MLP's output is added to."""
    if case.last is not None:
        assert case.middle is not None
        return seen.out[case.middle_output or case.middle]
    return entered + attention + (seen.out[case.cross] if case.cross else 0)


def unchanged_before(name: str, seen: Seen, component: str) -> None:
    """Nothing that runs before `component` noticed the edit."""
    case, base = CASES[name], untouched(name)
    steps: list[tuple[str, list[tuple[dict[str, Tensor], dict[str, Tensor], str | None]]]] = [
        ("attention_input", [(seen.into, base.into, case.first if case.first not in case.qkv else None)]),
        ("head_output", [(seen.out, base.out, n) for n in case.qkv]),
        ("attention_output", [(seen.into, base.into, case.o)]),
        ("mlp_input", [(seen.out, base.out, case.attention_adds or case.o)]),
        ("mlp_activation", [(seen.into, base.into, n) for n in case.up]),
        ("mlp_output", [(seen.into, base.into, case.down)]),
        ("block_output", [(seen.out, base.out, case.mlp_adds or case.down)]),
    ]
    for before, pairs in steps:
        if BLOCK_COMPONENTS.index(before) <= BLOCK_COMPONENTS.index(component):
            for now, then, module in pairs:
                if module is not None:
                    same(now[module], then[module])


every = pytest.mark.parametrize("name", CASES)


# --- reading ---------------------------------------------------------------------------------------------


@every
def test_block_inputs_and_outputs_are_the_hidden_states_that_the_model_reports(name: str) -> None:
    case = CASES[name]
    states = untouched(name).result[case.hidden_states]
    for layer in range(LAYERS):
        entered, left = read(name, "block_input", "block_output", layer=layer)
        same(entered, states[layer])
        if layer < LAYERS - 1 or case.last_state == "block_output":
            same(left, states[layer + 1])
    same(read(name, "embedding_output")[0], states[0])
    if case.last_state == "final_norm_output":
        same(read(name, "final_norm_output")[0], states[-1])


@every
def test_attention_and_mlp_output_are_what_is_added_to_the_residual_stream(name: str) -> None:
    case, seen, model = CASES[name], untouched(name), build(name)
    entered, attention, mlp, left = read(name, "block_input", "attention_output", "mlp_output", "block_output")
    if case.last is None:
        cross = seen.out[case.cross] if case.cross else 0
        close(entered + attention + cross + mlp, left)
        return
    assert case.middle is not None
    with torch.no_grad():
        middle = model.get_submodule(case.path(case.middle))(entered + attention)
        if case.cross:
            assert case.middle_output is not None
            middle = model.get_submodule(case.path(case.middle_output))(middle + seen.out[case.cross])
        close(model.get_submodule(case.path(case.last))(middle + mlp), left)


@every
def test_widths_and_the_order_of_execution_are_those_of_the_tensors(name: str) -> None:
    case = CASES[name]
    components = [c for c in BLOCK_COMPONENTS if c != "mlp_activation" or case.down]
    calls: list[str] = []
    handles = []
    addresses = {component: find(name, component) for component in components}
    for component, address in addresses.items():

        def touch(h: Tensor, _entered: Any, component: str = component, address: Address = address) -> None:
            calls.append(component)
            assert h[..., address.index].shape[-1] == address.width
            assert address.columns is not None or h.shape[-1] == address.width

        handles.append(attach(build(name).get_submodule(address.module), address.side, touch))
    with torch.no_grad():
        build(name)(**inputs(case))
    for handle in handles:
        handle.remove()
    # Models are free to project keys before queries: those three are one step.
    one_step = HEAD_COMPONENTS[:3]
    assert [c for c in calls if c not in one_step] == [c for c in components if c not in one_step]
    assert sorted(components, key=lambda c: find(name, c).order or ()) == components
    assert (find(name, "embedding_output").order or ()) < (find(name, "block_input", 0).order or ())


# --- writing ---------------------------------------------------------------------------------------------


@every
def test_a_block_input_is_what_the_first_module_of_the_block_receives(name: str) -> None:
    value = known(name, 32)
    case = CASES[name]
    same(write(name, find(name, "block_input"), value).into[case.first], value)
    same(write(name, find(name, "block_output", 0), value).into[case.first], value)
    same(write(name, find(name, "embedding_output"), value, layer=0).into[case.first], value)
    unchanged_before(name, write(name, find(name, "block_output"), value), "block_output")


@every
def test_a_final_norm_output_is_what_leaves_the_stack(name: str) -> None:
    case, model = CASES[name], build(name)
    if not case.final_norm:
        with pytest.raises(ValueError, match="has no final norm: block_output of layer=-1 is what leaves"):
            find(name, "final_norm_output")
        return
    value = known(name, 32)
    address = find(name, "final_norm_output")
    left: list[Tensor] = []
    handles = [
        attach(model.get_submodule(address.module), address.side, lambda _h, _entered: value),
        model.get_submodule(address.stack).register_forward_hook(lambda *call: left.append(call[2].last_hidden_state)),
    ]
    with torch.no_grad():
        model(**inputs(case))
    for handle in handles:
        handle.remove()
    same(left[0], value)


@every
def test_an_attention_input_is_what_queries_keys_and_values_are_made_of_and_nothing_else(name: str) -> None:
    case, base, value = CASES[name], untouched(name), known(name, 32)
    seen = write(name, find(name, "attention_input"), value)
    for projection in case.qkv:
        same(seen.into[projection], value)
    unchanged_before(name, seen, "attention_input")
    if case.middle is None:  # parallel: the MLP reads its own norm of the residual stream
        for up in case.up:
            same(seen.into[up], base.into[up])
    else:
        close(seen.into[case.middle], base.into[""] + added(case, seen)[0])


@every
@pytest.mark.parametrize("component", HEAD_COMPONENTS[:3])
def test_writing_queries_keys_or_values_changes_their_columns_alone(name: str, component: str) -> None:
    case, base = CASES[name], heads_of(CASES[name], untouched(name))
    which = HEAD_COMPONENTS.index(component)
    count = case.heads if which == 0 else case.kv
    for head in (None, *range(count)):
        address = find(name, component, head=head)
        value = known(name, address.width)
        seen = write(name, address, value)
        expected = [x.clone() for x in base]
        expected[which][..., slice(None) if head is None else [head], :] = value.view(
            B, -1, count if head is None else 1, case.d
        )
        for now, then in zip(heads_of(case, seen), expected, strict=True):
            same(now, then)
        unchanged_before(name, seen, component)


@every
def test_zero_values_of_a_head_leave_zeros_in_the_output_of_its_group_alone(name: str) -> None:
    case, base = CASES[name], untouched(name)
    for head in range(case.kv):
        seen = write(name, find(name, "value_output", head=head), torch.zeros(base.into[""].shape[:-1] + (case.d,)))
        expected = base.into[case.o].clone().view(B, -1, case.kv, case.heads // case.kv * case.d)
        expected[..., head, :] = 0
        close(seen.into[case.o], expected.flatten(-2))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.score_bias])
@pytest.mark.parametrize("component", ["query_output", "key_output"])
def test_a_head_without_queries_or_keys_averages_the_values_that_it_sees(name: str, component: str) -> None:
    case, base = CASES[name], untouched(name)
    values = heads_of(case, base)[2]
    group = case.heads // case.kv
    distance = torch.arange(values.shape[1])[:, None] - torch.arange(values.shape[1])
    (info,) = (s for s in stacks(build(name)) if s.blocks[1] == case.path(""))
    visible = ((distance >= 0) & (distance < case.window)) if info.causal else torch.ones_like(distance)
    weights = visible.double() / visible.sum(-1, keepdim=True)
    for head in range(case.heads if component == "query_output" else case.kv):
        seen = write(name, find(name, component, head=head), torch.zeros(*values.shape[:2], case.d))
        got = seen.into[case.o].view(B, -1, case.heads, case.d)
        changed = [head] if component == "query_output" else list(range(head * group, (head + 1) * group))
        for h in changed:
            average = torch.einsum("ts,bsd->btd", weights, values[..., h // group, :])
            torch.testing.assert_close(got[..., h, :], average, rtol=1e-6, atol=1e-6)  # some softmax in float32
        others = [h for h in range(case.heads) if h not in changed]
        if not case.heads_mix:
            close(got[..., others, :], base.into[case.o].view_as(got)[..., others, :])


@every
def test_a_head_output_is_what_the_output_projection_reads(name: str) -> None:
    case, base, model = CASES[name], untouched(name), build(name)
    for head in (None, *range(case.heads)):
        address = find(name, "head_output", head=head)
        value = known(name, address.width)
        seen = write(name, address, value)
        expected = base.into[case.o].clone().view(B, -1, case.heads, case.d)
        expected[..., slice(None) if head is None else [head], :] = value.view(B, -1, address.width // case.d, case.d)
        same(seen.into[case.o], expected.flatten(-2))
        with torch.no_grad():
            close(seen.out[case.o], model.get_submodule(case.path(case.o)).forward(expected.flatten(-2)))
        unchanged_before(name, seen, "head_output")


@every
def test_an_attention_output_is_added_to_what_entered_the_block(name: str) -> None:
    case, base, value = CASES[name], untouched(name), known(name, 32)
    seen = write(name, find(name, "attention_output"), value)
    if case.middle is None:
        close(seen.out[""], base.into[""] + value + added(case, base)[1])
    else:
        close(seen.into[case.middle], base.into[""] + value)
    unchanged_before(name, seen, "attention_output")


@every
def test_an_mlp_input_is_what_all_first_projections_or_the_router_read(name: str) -> None:
    case, base, value = CASES[name], untouched(name), known(name, 32)
    seen = write(name, find(name, "mlp_input"), value)
    for up in case.up:
        same(seen.into[up], value)
    if case.last is None:
        attention, mlp = added(case, seen)
        close(seen.out[""], second_residual(case, seen, attention, base.into[""]) + mlp)
    unchanged_before(name, seen, "mlp_input")


@every
def test_an_mlp_activation_is_what_the_last_projection_reads(name: str) -> None:
    case, model = CASES[name], build(name)
    if case.down is None:
        with pytest.raises(ValueError, match="mixes experts in 'model.layers.1.mlp', .* use mlp_input or mlp_output"):
            find(name, "mlp_activation")
        return
    address = find(name, "mlp_activation")
    value = known(name, address.width)
    seen = write(name, address, value)
    same(seen.into[case.down], value)
    with torch.no_grad():
        close(seen.out[case.down], model.get_submodule(case.path(case.down)).forward(value))
    unchanged_before(name, seen, "mlp_activation")


@every
def test_an_mlp_output_is_added_to_the_residual_stream(name: str) -> None:
    case, base, value = CASES[name], untouched(name), known(name, 32)
    seen = write(name, find(name, "mlp_output"), value)
    residual = second_residual(case, base, added(case, base)[0], base.into[""])
    close(seen.into[case.last] if case.last else seen.out[""], residual + value)
    unchanged_before(name, seen, "mlp_output")


# --- the same model in other clothes ----------------------------------------------------------------------


@every
def test_the_bare_model_has_the_same_modules_at_the_same_addresses(name: str) -> None:
    case, model = CASES[name], build(name)
    bare = model.base_model
    for component in COMPONENTS:
        if (component == "mlp_activation" and not case.down) or (
            component == "final_norm_output" and not case.final_norm
        ):
            continue
        site = Site(1 if component in BLOCK_COMPONENTS else None, component, stack=case.stack)
        inside, outside = locate(bare, site), locate(model, site)
        assert bare.get_submodule(inside.module) is model.get_submodule(outside.module)
        assert bare.get_submodule(inside.stack) is model.get_submodule(outside.stack)
        assert (inside.width, inside.columns, inside.order) == (outside.width, outside.columns, outside.order)


def test_a_graph_compiled_into_the_model_is_not_taken_for_a_part_of_it() -> None:
    model = tf.AutoModel.from_config(tf.LlamaConfig(**GQA))
    before = stacks(model), locate(model, Site(1, "query_output", head=2))
    model.interventions = nn.ModuleDict({"default": build("llama").base_model})
    assert (stacks(model), locate(model, Site(1, "query_output", head=2))) == before
    with pytest.raises(ValueError, match="has no module 'interventions.default.norm'"):
        locate(model, Site(component="interventions.default.norm"))


def test_quantised_projections_have_the_widths_of_their_features_not_of_their_packed_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**GQA))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, attention.k_proj = bnb.nn.Linear4bit(32, 32), bnb.nn.Linear4bit(32, 16)
    attention.o_proj, mlp.down_proj = bnb.nn.Linear8bitLt(32, 32), bnb.nn.Linear4bit(48, 32)
    attention.q_proj.weight = nn.Parameter(torch.zeros(512, 1))
    for component in BLOCK_COMPONENTS:
        plain, quantised = (locate(m, Site(1, component)) for m in (build("llama"), model))
        assert quantised == plain


def test_stacks_know_their_blocks_and_whether_they_are_causal() -> None:
    encoder, decoder = stacks(build("t5 decoder"))
    assert (encoder.path, encoder.role, encoder.causal) == ("encoder", "encoder", False)
    assert (decoder.path, decoder.role, decoder.causal) == ("decoder", "decoder", True)
    assert decoder.blocks == ("decoder.block.0", "decoder.block.1", "decoder.block.2")
    paths = {"bert": "bert", "opt": "model.decoder", "gpt2": "transformer", "distilbert": "distilbert", "vit": "vit"}
    for name, path in paths.items():
        (info,) = stacks(build(name))
        assert info.path == path
        assert info.causal == (CASES[name].auto is CAUSAL)
    assert stacks(build("bert").base_model)[0].path == ""
    for is_decoder in (False, True):
        for config in (tf.BertConfig, tf.RoFormerConfig):
            (info,) = stacks(tf.AutoModel.from_config(config(**SMALL, is_decoder=is_decoder)))
            assert info.causal == is_decoder


def test_cross_attention_is_not_taken_for_self_attention_or_mlp() -> None:
    bert = tf.BertModel(tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    gpt2 = tf.GPT2Model(tf.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True))
    for model, path in ((bert, "encoder.layer.0.output.dense"), (gpt2, "h.0.mlp.c_proj")):
        assert locate(model, Site(0, "mlp_output")).module == path
        assert "cross" not in locate(model, Site(0, "value_output")).module


def test_a_site_is_normalised_to_the_model() -> None:
    assert locate(build("llama"), Site(-1, "query_output", head=-1)).site == Site(2, "query_output", head=3)
    assert locate(build("llama"), Site(0, stack="decoder")).site == Site(0)
    assert locate(build("bert"), Site(0, stack="encoder")).site == Site(0)
    assert locate(build("t5 decoder"), Site(0)).site == Site(0, stack="decoder")
    path = "model.encoder.layers.0.fc1"
    assert locate(build("bart encoder"), Site(component=path)).site == Site(component=path, stack="encoder")


# --- module paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "side", "width", "order"),
    [
        ("llama", "model.layers.1.mlp.gate_proj", "output", 48, (1, "mlp_activation")),
        ("llama", "model.layers.1.mlp.up_proj", "input", 32, (1, "mlp_input")),
        ("llama", "model.layers.1.mlp", "output", 32, (1, "mlp_output")),
        ("llama", "model.layers.1", "input", 32, (1, "block_input")),
        ("llama", "model.layers.1.self_attn", "output", 32, (1, "attention_output")),
        ("llama", "model.layers.1.self_attn.v_proj", "output", 16, (1, "value_output")),
        ("llama", "model.layers.1.self_attn.v_proj", "input", 32, (1, "attention_input")),
        ("llama", "model.layers.1.input_layernorm", "output", 32, None),
        ("llama", "model.embed_tokens", "output", 32, None),
        ("llama", "model.norm", "input", 32, (3, None)),
        ("qwen3", "model.layers.0.self_attn", "output", 32, (0, "attention_output")),
        ("gemma2", "model.layers.0.self_attn.o_proj", "output", 32, (0, "attention_output")),
        ("gemma2", "model.layers.0.mlp.down_proj", "output", 32, (0, "mlp_output")),
        ("gpt2", "transformer.h.2.attn.c_attn", "output", 96, (2, "query_output")),
        ("gpt2", "transformer.h.2.mlp.c_fc", "output", 128, (2, "mlp_activation")),
        ("neox", "gpt_neox.layers.0.attention.query_key_value", "output", 96, (0, "query_output")),
        ("bert", "bert.encoder.layer.0.attention", "output", 32, None),
        ("bert", "bert.encoder.layer.0.attention.self", "output", 32, (0, "head_output")),
        ("bert", "bert.encoder.layer.0.intermediate", "output", 48, None),
        ("bert", "bert.encoder.layer.0.intermediate.dense", "output", 48, (0, "mlp_activation")),
        ("roberta", "classifier.dense", "output", 32, None),
        ("t5 decoder", "decoder.block.0.layer.1.EncDecAttention", "output", 32, None),
        ("t5 decoder", "decoder.block.0.layer.1.EncDecAttention.k", "input", 32, None),
        ("bart decoder", "model.decoder.layers.0.encoder_attn.out_proj", "output", 32, None),
        ("mixtral", "model.layers.0.mlp", "output", 32, (0, "mlp_output")),
    ],
)
def test_a_module_path_has_the_width_and_the_place_of_its_tensor(
    name: str, path: str, side: Any, width: int, order: tuple[int, str | None] | None
) -> None:
    case, model = CASES[name], build(name)
    address = locate(model, Site(component=path, side=side))
    shapes: list[int] = []
    handle = attach(model.get_submodule(path), side, lambda h, _entered: shapes.append(h.shape[-1]))
    with torch.no_grad():
        model(**inputs(case))
    handle.remove()
    assert set(shapes) == {width} == {address.width}
    assert (address.module, address.side, address.columns) == (path, side, None)
    assert address.order == (order and (order[0], BLOCK_COMPONENTS.index(order[1]) if order[1] else 0))


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama", Site(40), "layer 40 is out of range: this llama has layers 0 to 2 (or -3 to -1)"),
        ("llama", Site(-4), "layer -4 is out of range: this llama has layers 0 to 2 (or -3 to -1)"),
        (
            "llama",
            Site(0, "query_output", head=12),
            "head 12 is out of range: query_output of this llama has heads 0 to 3 (or -4 to -1)",
        ),
        (
            "llama",
            Site(0, "value_output", head=2),
            "head 2 is out of range: value_output of this llama has heads 0 to 1 (or -2 to -1)",
        ),
        (
            "falcon, multi-query",
            Site(0, "key_output", head=1),
            "head 1 is out of range: key_output of this falcon has heads 0 to 0 (or -1 to -1)",
        ),
        ("llama", Site(0, stack="encoder"), "this llama has no encoder, only its decoder 'model': leave stack out"),
        ("bert", Site(0, stack="decoder"), "this bert has no decoder, only its encoder 'bert': leave stack out"),
        (
            "t5 encoder",
            Site(component="decoder.block.0.layer.2", stack="encoder"),
            "module 'decoder.block.0.layer.2' is not in the encoder of this t5: leave stack out",
        ),
        (
            "llama",
            Site(component="model.layers.1.mlp.gate_prj"),
            "this llama has no module 'model.layers.1.mlp.gate_prj': did you mean 'model.layers.1.mlp.gate_proj' or ",
        ),
        (
            "qwen3",
            Site(component="model.layers.0.self_attn.q_norm"),
            "output of 'model.layers.0.self_attn.q_norm' in this qwen3 has the shape [3, 7, 4, 16] for 3 rows",
        ),
        ("llama", Site(component="x.y"), "this llama has no module 'x.y': see model.named_modules()"),
        (
            "llama",
            Site(component="model.embed_tokens", side="input"),
            "the input of 'model.embed_tokens' in this llama is no tensor of one shape",
        ),
        (
            "t5 encoder",
            Site(component="encoder.block.0.layer"),
            "'encoder.block.0.layer' is a list of modules that is never called itself: name one of its members",
        ),
    ],
)
def test_an_error_says_what_was_given_and_what_is_allowed(name: str, site: Site, message: str) -> None:
    with pytest.raises(ValueError) as error:
        locate(build(name), site)
    assert message in str(error.value)


def test_a_model_without_blocks_is_addressed_by_module_path() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(
        ValueError, match="no transformer blocks recognised in this Sequential: .*: use the dotted path"
    ):
        locate(model, Site(0))
    address = locate(model, Site(component="0.0"))
    assert (address.width, address.stack, address.order) == (5, "", None)


def test_what_cannot_be_told_from_the_structure_is_refused_rather_than_guessed() -> None:
    with pytest.raises(ValueError, match="this albert: it runs the same blocks several times"):
        locate(tf.AlbertModel(tf.AlbertConfig(**SMALL, embedding_size=16)), Site(0))


# --- what a pass shows -----------------------------------------------------------------------------------------


def tiny(config: tf.PretrainedConfig, auto: Any = tf.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@pytest.mark.parametrize("config", [tf.DeepseekV2Config, tf.DeepseekV3Config, tf.MiniCPM3Config])
def test_a_query_of_latent_attention_changes_the_output_of_its_head_alone(config: type) -> None:
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    experts = {} if config is tf.MiniCPM3Config else dict(first_k_dense_replace=2)
    model = tiny(config(**SMALL | dict(num_hidden_layers=2) | latent | experts))
    query, output = (locate(model, Site(1, component, head=2)) for component in ("query_output", "head_output"))
    assert (query.width, output.width) == (12, 6)
    outputs: list[Tensor] = []
    attach(model.get_submodule(output.module), "input", lambda h, _: outputs.append(h))
    ids = torch.arange(3, 13)[None]

    def zero(h: Tensor, _: Tensor) -> Tensor:
        return h.index_fill(-1, torch.tensor(range(h.shape[-1])[query.index]), 0.0)

    with torch.no_grad():
        model(ids)
        attach(model.get_submodule(query.module), "output", zero)
        model(ids)
    changed = (outputs[0] != outputs[1]).any(1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(12, 18))
    with pytest.raises(ValueError, match="share a part of their keys"):
        locate(model, Site(0, "key_output"))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlm", "what leaves a member of 'transformer.attentions' is not what enters the next"),
        ("flaubert", "what leaves a member of 'transformer.attentions' is not what enters the next"),
        ("reformer", "what leaves a member of 'reformer.encoder.layers' is not what enters the next"),
    ],
)
def test_a_list_is_of_blocks_where_each_is_given_what_the_one_before_returns(model_type: str, reason: str) -> None:
    model = TINY[model_type]()
    with pytest.raises(ValueError, match=f"no transformer blocks recognised.*{reason}"):
        locate(model, Site(0))
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    assert locate(model, Site(component=path)).width == model.get_submodule(path).out_features


TINY: dict[str, Callable[[], Any]] = {
    "xlm": lambda: tiny(tf.XLMConfig(vocab_size=40, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64)),
    "flaubert": lambda: tiny(
        tf.FlaubertConfig(vocab_size=40, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64),
        tf.AutoModelForMaskedLM,
    ),
    "reformer": lambda: tiny(
        tf.ReformerConfig(
            vocab_size=40,
            hidden_size=32,
            feed_forward_size=48,
            num_attention_heads=4,
            attention_head_size=8,
            axial_pos_shape=(4, 4),
            axial_pos_embds_dim=(16, 16),
            attn_layers=["local"] * 2,
            is_decoder=False,
            local_attn_chunk_length=4,
            max_position_embeddings=16,
        ),  # fmt: skip
        tf.AutoModelForMaskedLM,
    ),
    "openai-gpt": lambda: tiny(tf.OpenAIGPTConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mamba": lambda: tiny(tf.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "rwkv": lambda: tiny(tf.RwkvConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, context_length=64)),
    "fnet": lambda: tiny(
        tf.FNetConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, intermediate_size=48), tf.AutoModelForMaskedLM
    ),
    "granitemoeshared": lambda: tiny(
        tf.GraniteMoeSharedConfig(**GQA, num_local_experts=4, shared_intermediate_size=16)
    ),
}


@pytest.mark.parametrize(
    ("model_type", "causal"), [("openai-gpt", True), ("mamba", True), ("rwkv", True), ("fnet", False)]
)
def test_whether_tokens_see_later_ones_is_seen(model_type: str, causal: bool) -> None:
    (info,) = stacks(TINY[model_type]())
    assert (info.causal, len(info.blocks)) == (causal, 2)


@pytest.mark.parametrize(
    ("config", "causal"),
    [(tf.PegasusXConfig, (False, True)), (tf.BigBirdPegasusConfig, (False, True)), (tf.LEDConfig, (False, True))],
)
def test_both_halves_of_an_encoder_decoder_model_look_as_they_do(config: type, causal: tuple[bool, bool]) -> None:
    small = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | dict(attention_window=[4] * 3)
    model = tiny(config(**small), tf.AutoModelForSeq2SeqLM)
    assert tuple(info.causal for info in stacks(model)) == causal


def test_whether_tokens_see_later_ones_is_seen_beside_an_image() -> None:
    """BLIP runs on no text without an image; what an image changes is no later token."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = sizes | dict(vocab_size=40, encoder_hidden_size=32, max_position_embeddings=64, is_decoder=True)
    model = tiny(
        tf.BlipConfig(text_config=text, vision_config=sizes | dict(image_size=8, patch_size=4)),
        tf.AutoModelForImageTextToText,
    )
    assert {info.path: info.causal for info in stacks(model)} == {"vision_model": False, "text_decoder.bert": True}


def test_columns_that_a_block_fills_up_by_itself_are_refused() -> None:
    """Every second attention of Pegasus-X has half a block of zeros before its tokens."""
    small = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | dict(block_size=8)
    model = tiny(tf.PegasusXConfig(**small), tf.AutoModelForSeq2SeqLM)
    assert locate(model, Site(0, "attention_input", stack="encoder")).form == "filled"
    with pytest.raises(ValueError, match="whose columns are not these tokens"):
        locate(model, Site(1, "attention_input", stack="encoder"))


@pytest.mark.parametrize("model_type", ["mamba", "fnet"])
def test_a_block_without_its_halves_is_the_identity(model_type: str) -> None:
    """`attention_output` means the layer that mixes tokens, whatever it is called."""
    model = TINY[model_type]()
    seen: dict[str, Tensor] = {}
    for component in ("attention_output", "mlp_output"):
        with suppress(ValueError):  # a block of Mamba has one half
            address = locate(model, Site(1, component))
            attach(model.get_submodule(address.module), address.side, lambda h, _: torch.zeros_like(h))
    for component in ("block_input", "block_output"):
        address = locate(model, Site(1, component))
        note = partial(lambda name, h, _: seen.__setitem__(name, h.clone()), component)
        attach(model.get_submodule(address.module), address.side, note)
    with torch.no_grad():
        model(torch.arange(3, 13)[None])
    norm = (
        (lambda h: F.layer_norm(F.layer_norm(h, (32,), eps=1e-12), (32,), eps=1e-12))
        if model_type == "fnet"
        else (lambda h: h)
    )
    torch.testing.assert_close(seen["block_output"], norm(seen["block_input"]))


def test_an_order_of_heads_that_is_not_the_one_of_the_name_is_refused() -> None:
    """MiniMax's lightning attention has each head's query, key and value side by side, then a norm over all heads."""
    config = tf.MiniMaxConfig(
        **GQA, num_local_experts=2, num_experts_per_tok=1, block_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = tiny(config)
    assert locate(model, Site(1, "query_output", head=1)).width == 8
    with pytest.raises(
        ValueError, match="order of queries, keys and values in 'self_attn.qkv_proj' is not a known one"
    ):
        locate(model, Site(0, "query_output"))


def test_a_second_mlp_beside_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="beside one attention and one MLP, shared_mlp add"):
        locate(TINY["granitemoeshared"](), Site(0, "mlp_output"))


def test_a_module_that_no_pass_calls_is_refused() -> None:
    """`nn.MultiheadAttention` reads the weights of its output projection without calling it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.query = nn.Linear(8, 8)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.attention(self.query(h), h, h)[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 8)
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.embed(input_ids)
            for layer in self.layers:
                h = layer(h)
            return h

    model = Model().eval()
    with pytest.raises(ValueError, match="'layers.0.attention.out_proj' does not run"):
        locate(model, Site(component="layers.0.attention.out_proj"))
    assert locate(model, Site(0)).width == 8

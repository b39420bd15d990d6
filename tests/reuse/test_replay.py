"""Computing only the cone of influence: losses and gradients are those of the plain path, and less is computed.

Weights are large, so that attention is not uniform, and in float64, where a wrong token shows far above rounding.
transformers rounds logits to float32 before the cross-entropy; here they stay in float64 (`exact_loss`), but in the
tests that say so.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.architectures import CASES, CAUSAL, GQA, SMALL, WIDE
from support.models import LAYERS, randomise, tiny_bart, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from support.oracle import causal_loss, exact_loss
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune
from transformers.loss import loss_utils

import reftheads as rh
from reftheads.graph.positions import Positions
from reftheads.reuse import prefixes
from reftheads.reuse.cone import Cone
from reftheads.reuse.store import ActivationStore
from reftheads.runtime import passes

DECODERS = [name for name, case in CASES.items() if case.auto is CAUSAL]
ENCODERS = ["bert", "roberta", "deberta-v2", "distilbert", "modernbert"]
STRONG = {"initializer_range": 0.3}
GPT2 = STRONG | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TINY = {"tiny llama": (tiny_llama, STRONG), "tiny gpt2": (tiny_gpt2, GPT2), "tiny gemma3": (tiny_gemma3, STRONG)}
# Tokens of each row, and of its prompt. Padding is shorter than any window: the eager attention of transformers is NaN
# in float64 where a query sees padding alone.
ROWS = [(12, 9), (9, 7), (12, 8), (10, 7)]
TRANSFORMERS_LOSS = loss_utils.ForCausalLMLoss


# --- batches, models, comparison --------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def loss_in_float64() -> Iterator[None]:
    with causal_loss(exact_loss):
        yield


def base_of(name: str) -> Any:
    """A model of `CASES` or a tiny one, with strong weights, in float64 and without dropout."""
    if name in TINY:
        make, options = TINY[name]
        return make(**options).double()
    return from_config(CASES[name].config, CASES[name].auto)


def from_config(config: Any, auto: Any = CAUSAL) -> Any:
    config = copy.deepcopy(config)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = auto.from_config(config).double()
    model.set_experts_implementation("eager")  # the grouped products know no float64
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    return model


def intervened(base: Any, *nodes: rh.Node, training: bool = True) -> rh.InterventionModel:
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).to(next(base.parameters()).dtype)
    randomise(model)
    return model.train(training)


def loreft(layer: int, positions: Any = "l1", rank: int = 2, **options: Any) -> rh.Node:
    return rh.Node(rh.LoReFT(rank=rank, **options), layer, positions=positions)


def head(layer: int, positions: Any = "l1", name: str | None = None, target: str | None = "y", **where: Any) -> rh.Node:
    return rh.Node(rh.LinearHead(3, target=target), layer, positions=positions, name=name, **where)


def token_rows(rows: Sequence[tuple[int, int]] = ROWS, seed: int = 0, vocab: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n, _ in rows]


def batch_of(
    tokens: Sequence[Sequence[int]],
    prompts: Sequence[int],
    side: str = "right",
    labels: bool = True,
    position_ids: bool = False,
) -> dict[str, Tensor]:
    """The batch of some rows, the labels on what follows each prompt."""
    width = max(map(len, tokens))
    names = ("input_ids", "attention_mask", "prompt_mask", "labels", "position_ids")
    batch = {name: torch.zeros(len(tokens), width, dtype=torch.long) for name in names}
    batch["labels"] -= 100
    for i, (row, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        start = 0 if side == "right" else width - len(row)
        end, answer = start + len(row), start + prompt
        batch["input_ids"][i, start:end] = torch.tensor(row)
        batch["attention_mask"][i, start:end] = 1
        batch["prompt_mask"][i, start:answer] = 1
        batch["labels"][i, answer:end] = torch.tensor(row[prompt:])
        batch["position_ids"][i, start:end] = torch.arange(len(row))
    left_out = [name for name, wanted in (("labels", labels), ("position_ids", position_ids)) if not wanted]
    return {name: value for name, value in batch.items() if name not in left_out}


def usual_batch(seed: int = 0, targets: bool = False, **options: Any) -> dict[str, Tensor]:
    batch = batch_of(token_rows(seed=seed), [prompt for _, prompt in ROWS], **options)
    return batch | ({"y": torch.tensor([0, 2, 1, 2])} if targets else {})


@dataclass
class Step:
    output: Any
    gradients: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return self.output.loss.detach()


def step(model: nn.Module, batch: dict[str, Any]) -> Step:
    """Forward and backward, from one state of the random numbers."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**batch)
    if output.loss is not None and output.loss.requires_grad:
        output.loss.backward()
    return Step(output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def check(got: Step, plain: Step, rtol: float = 1e-10) -> None:
    """Equal losses, and gradients equal in relation to their norm; one that is 0 may be missing."""
    if plain.output.loss is None:  # a head that reads nothing for certain has no loss then; here it may be 0
        assert got.output.loss is None or float(got.loss) == 0
        return
    torch.testing.assert_close(got.loss, plain.loss, rtol=rtol, atol=1e-13)
    whole = torch.stack([g.double().norm() for g in plain.gradients.values()] or [torch.zeros(())]).norm()
    for name in got.gradients.keys() | plain.gradients.keys():
        a, b = (s.gradients.get(name, torch.zeros(())).double() for s in (got, plain))
        difference = float((a - b).norm())
        rounding = 1e-12  # of what is 0 in truth
        allowed = rtol * float(b.norm()) + 0.01 * rtol * float(whole) + rounding
        assert difference <= allowed, f"{name}: {difference:.1e} of {float(b.norm()):.1e}"
    for field in ("losses", "predictions"):
        there, here = (getattr(s.output, field, None) or {} for s in (plain, got))
        assert there.keys() <= here.keys()
        for name in there:
            if field == "losses" or there[name].ndim == 2:  # one token a row
                torch.testing.assert_close(here[name], there[name], rtol=rtol * 10, atol=rtol * 10)


def check_exact(model: rh.InterventionModel, batch: dict[str, Any], rtol: float = 1e-10) -> Step:
    """That recording, replaying, and doing so without a store equal the plain path; gives the plain step."""
    plain = step(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        assert used(batch) is not None, used.eligibility.why_plain()
        check(step(model, batch), plain, rtol)
        store.hits = store.misses = 0
        check(step(model, batch), plain, rtol)
        assert store.misses == 0
        assert store.hits > 0 or not (used.cone.cut or used.cone.constant)
    with model.reusing(None):
        check(step(model, batch), plain, rtol)
    check(step(model, batch), plain, 0)  # the model is as it was
    return plain


def check_plain(model: rh.InterventionModel, batch: dict[str, Any]) -> Any:
    """That a batch takes the plain path."""
    plain = step(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        assert used(batch) is None
        check(step(model, batch), plain, 0)
        assert not len(store)
        return used.eligibility.why_plain()


@contextmanager
def counted(*modules: nn.Module) -> Iterator[list[int]]:
    """How many tokens go into each call of some modules, and come out of a projection."""
    seen: list[int] = []

    def enters(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        seen.append(h.shape[:-1].numel())

    def leaves(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output.shape[:-1].numel())

    handles = [
        module.register_forward_hook(leaves)
        if isinstance(module, nn.Linear)
        else module.register_forward_pre_hook(enters, with_kwargs=True)
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: rh.InterventionModel) -> list[nn.Module]:
    (stack,) = model.plan().stacks
    return [model.get_base_model().get_submodule(path) for path in stack.blocks]


def inside(model: rh.InterventionModel) -> list[nn.Module]:
    """A module in each block, which is called when the block computes something."""
    return [block.mlp for block in blocks_of(model)]  # type: ignore[misc]


# --- every architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_plain_gradients_and_leaves_the_prefixes_out(name: str) -> None:
    model, batch = intervened(base_of(name), loreft(-2), loreft(-1)), usual_batch()
    plain = check_exact(model, batch)
    assert all(float(g.norm()) > 1e-4 for g in plain.gradients.values()) and len(plain.gradients) == 6
    with model.reusing(ActivationStore(2**30)):
        step(model, batch)
        with counted(blocks_of(model)[-1]) as seen:
            step(model, batch)
    # 4 rows of at most 4 tokens: the last of the prompt and an answer, whose own last token predicts nothing
    assert seen == [4 * 4]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_in_float32_has_the_plain_gradients_up_to_rounding(name: str) -> None:
    model = intervened(base_of(name).float(), loreft(-2), loreft(-1))
    check_exact(model, usual_batch(), rtol=1e-5)  # 1.5e-6 at most was seen


TURNS = ["linear_attention", "full_attention"] * 2
GEMMA4 = WIDE | {"num_hidden_layers": 4, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4, "global_head_dim": 32}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
GPTJ = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
RECURRENT = "blocks carry a recurrent state"
OTHERS: dict[str, tuple[type, dict[str, Any], str | None]] = {
    "bidirectional": (tf.Gemma3TextConfig, WIDE | {"use_bidirectional_attention": True}, "sees all the others"),
    "two head widths": (tf.Gemma4TextConfig, GEMMA4 | {"num_kv_shared_layers": 0}, "keys and values of one shape"),
    "shared keys": (tf.Gemma4TextConfig, GEMMA4 | {"num_kv_shared_layers": 2}, "keys and values of one shape"),
    "linear attention": (
        tf.Qwen3NextConfig,
        WIDE | {"num_hidden_layers": 4, "layer_types": TURNS, "num_experts": 4, "num_experts_per_tok": 2},
        RECURRENT,
    ),
    "mamba beside attention": (tf.FalconH1Config, WIDE | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4}, RECURRENT),
    "convolutions": (tf.Lfm2Config, GQA | {"layer_types": ["conv", "full_attention", "conv"]}, RECURRENT),
    "latent attention": (
        tf.DeepseekV3Config,
        SMALL
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 2, "num_key_value_heads": 4},
        None,
    ),
    "chunked attention": (
        tf.Llama4TextConfig,
        WIDE | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4},
        None,
    ),
    "encoder as decoder": (tf.BertConfig, SMALL | {"is_decoder": True}, None),
    "attention in float32": (tf.GPTJConfig, GPTJ | {"rotary_dim": 4}, None),
    "biases by distance": (tf.MptConfig, {"vocab_size": 40, "d_model": 32, "n_layers": 3, "n_heads": 4}, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unusual_decoder_has_the_plain_gradients_and_says_what_is_not_reused(name: str) -> None:
    kind, options, reason = OTHERS[name]
    model, batch = intervened(from_config(kind(**options)), loreft(-2), loreft(-1), head(0)), usual_batch(targets=True)
    check_exact(model, batch, rtol=1e-6 if name in ("attention in float32", "biases by distance") else 1e-10)
    with model.reusing(None) as used:
        given = used.eligibility.why_no_prefix(used.cone)
        assert (given is None) == (reason is None) == used.split.rows(used.cone, batch).divided
        assert reason is None or reason in given


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_of_transformers_itself_is_the_plain_one_up_to_its_rounding(name: str) -> None:
    with causal_loss(TRANSFORMERS_LOSS):
        check_exact(intervened(base_of(name), loreft(-2), loreft(-1)), usual_batch(), rtol=1e-6)


@pytest.mark.parametrize("number", [7, torch.tensor(7)])
def test_the_number_of_items_in_an_accumulated_batch_divides_the_loss(number: Any) -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    whole = check_exact(model, batch)
    part = check_exact(model, batch | {"num_items_in_batch": number})
    labels = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(part.loss, whole.loss * labels / 7)


@pytest.mark.parametrize("positions", ["all", "f1"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_a_classifier_skips_the_blocks_below_the_edit(name: str, positions: str) -> None:
    model = intervened(base_of(name), loreft(1, positions), head(2, "f1"), head(0, "f1", name="low"))
    batch = usual_batch(targets=True, labels=False) | {"labels": torch.tensor([1, 0, 0, 1])}
    batch.pop("prompt_mask")
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)) as used:
        assert used.eligibility.why_no_layers(used.cone) is None and used.cone.cut == 2
        step(model, batch)
        lowest = [m for m in blocks_of(model)[0].modules() if isinstance(m, nn.Linear)]
        with counted(*lowest) as seen:
            step(model, batch)
    assert lowest and not seen


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bare_encoder_is_trained_by_its_heads(name: str) -> None:
    base = from_config(CASES[name].config, tf.AutoModel)
    model = intervened(base, loreft(1, "all"), head(1, "f1"), head(0, "all", name="tokens", target="t"))
    batch = usual_batch(targets=True, labels=False)
    batch.pop("prompt_mask")
    batch["t"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, -100)
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)):
        step(model, batch)
        with counted(blocks_of(model)[-1]) as seen:
            step(model, batch)
    assert not seen  # the head reads behind block 1


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_an_encoder_decoder_model_has_the_plain_gradients(make: Any, stack: Any) -> None:
    base = make(dropout_rate=0.0) if make is tiny_t5 else make(dropout=0.0, init_std=0.3)
    model = intervened(
        base.double(),
        rh.Node(rh.LoReFT(rank=2), 1, stack=stack, positions="l1" if stack == "encoder" else "all"),
        head(0, "f1", stack="encoder"),
    )
    batch = usual_batch(targets=True, labels=False)
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100], [5, 2, -100, -100], [3, 4, 5, 2]])
    batch = batch | {"labels": labels, "decoder_attention_mask": torch.ones_like(labels)}
    check_exact(model, batch)
    with model.reusing(ActivationStore(2**30)) as used:
        reason = used.eligibility.why_no_layers(Cone.of(model.plan().nodes, used.facts.info))
        assert (reason == "blocks hand on more than the hidden state") == (make is tiny_t5)
        assert (used.cone.cut > 0) == (make is tiny_bart)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_causal_classifier_has_the_plain_gradients(side: str) -> None:
    config = tf.LlamaConfig(**SMALL, num_labels=3)
    model = intervened(from_config(config, tf.AutoModelForSequenceClassification), loreft(1, "all"), loreft(2, "f1"))
    batch = usual_batch(labels=False, side=side) | {"labels": torch.tensor([1, 0, 2, 1])}
    check_exact(model, batch)


# --- all graphs, all batches ------------------------------------------------------------------------------

RULES = ["f1", "f2", "l1", "l2", "f1+l1", "all", "prompt", "generated", 0, -1, "2:4", Positions.where([4, 7])]
LATE = ["l1", "l2", "generated", -1, "2:4", Positions.where([4, 7])]  # before them lies a prefix
COMPONENTS = ["block_input", "block_output", "attention_output", "mlp_output", "query_output", "head_output"]
EDITS = [rh.LoReFT(rank=2), rh.DiReFT(rank=1, act_fn="relu"), rh.Steering(), rh.ScaleAndBias()]


@st.composite
def graphs(draw: Any, family: str) -> list[rh.Node]:
    layers, rules = st.integers(0, LAYERS - 1), st.sampled_from(draw(st.sampled_from([RULES, LATE, LATE])))
    nodes: list[rh.Node] = []
    for i in range(draw(st.integers(1, 4))):
        layer, component, rule = draw(layers), draw(st.sampled_from(COMPONENTS)), draw(rules)
        kind = draw(st.sampled_from(["edit", "edit", "head", "head", "lora", "tied", "gated", "collect"]))
        name, where = f"n{i}", {"layer": layer, "component": component, "positions": rule}
        if kind == "edit":
            nodes.append(rh.Node(draw(st.sampled_from(EDITS)), **where, name=name))
        elif kind == "head":
            nodes.append(rh.Node(draw(heads(rule)), **where, name=name))
        elif kind == "lora":
            linear = ["query_output"] if family == "tiny gemma3" else ["query_output", "mlp_output"]
            where["component"] = draw(st.sampled_from(linear))
            nodes.append(rh.Node(rh.LoRA(rank=2), **where, name=name))
        elif kind == "tied":
            nodes.append(rh.Node(rh.LoReFT(rank=2), **where, name=name, share="w"))
            nodes.append(rh.Node(rh.LoReFT(rank=2), draw(layers), positions=draw(rules), name=f"{name}b", share="w"))
        elif kind == "gated":
            read = draw(st.sampled_from(["l1", rule]))
            gate = rh.LinearHead(1, detach=draw(st.booleans()))
            nodes.append(rh.Node(gate, draw(st.integers(0, layer)), "block_input", read, name=f"{name}s"))
            edit = rh.Gated(rh.DiReFT(rank=2))
            nodes.append(rh.Node(edit, layer, "block_output", rule, name=name, source=f"{name}s"))
        else:
            nodes.append(rh.Node(rh.Collect(detach=draw(st.booleans())), **where, name=name))
    return nodes


@st.composite
def heads(draw: Any, rule: Any) -> rh.LinearHead:
    target = draw(st.sampled_from([None, "y" if Positions.parse(rule).bound == 1 else "t"]))
    return rh.LinearHead(3, target=target, detach=draw(st.booleans()), weight=draw(st.sampled_from([1.0, 0.3])))


MOSTLY = st.sampled_from([True, True, False])


@st.composite
def batches(draw: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two batches that share rows, in another order and with other padding."""
    common = draw(st.lists(st.integers(3, 9), min_size=20, max_size=20))
    pool = []
    for _ in range(draw(st.integers(1, 5))):
        length, same = draw(st.integers(2, 20)), draw(st.integers(0, 12))
        fresh = draw(st.lists(st.integers(3, 9), min_size=length, max_size=length))
        pool.append(([*common[:same], *fresh][:length], draw(st.integers(1, length - 1))))
    again = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
    sides = st.sampled_from([("right", False), ("right", True), ("left", True), ("left", True), ("left", False)])
    flags = st.builds(lambda side, labels: {"side": side[0], "labels": labels, "position_ids": side[1]}, sides, MOSTLY)
    return draw(completed(pool, draw(flags))), draw(completed(again, draw(flags)))


@st.composite
def completed(draw: Any, rows: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    batch = batch_of([row for row, _ in rows], [prompt for _, prompt in rows], **options)
    if draw(MOSTLY):
        batch["y"] = (batch["input_ids"].sum(1) % 4 - 1).masked_fill(batch["input_ids"].sum(1) % 4 == 0, -100)
        batch["t"] = batch["input_ids"].where(batch["input_ids"] > 5, -97) - 3
        batch["t"] = batch["t"].where(batch["t"] < 3, -100)
    if not draw(MOSTLY):
        batch.pop("prompt_mask")
    if bool(batch["attention_mask"].all()) and draw(st.booleans()):
        batch.pop("attention_mask")
    return batch


def attempt(model: nn.Module, batch: dict[str, Tensor]) -> Step | ValueError:
    try:
        return step(model, batch)
    except ValueError as error:
        return error


def check_as_plain(model: rh.InterventionModel, batch: dict[str, Tensor], used: Any, times: int) -> None:
    plain = attempt(model, batch)
    for _ in range(times):
        with model.reusing(used):
            got = attempt(model, batch)
        if isinstance(plain, ValueError):
            assert isinstance(got, ValueError), plain
        else:
            assert isinstance(got, Step), got
            check(got, plain)


def check_any(family: str, nodes: list[rh.Node], two: Any, training: bool, budget: int) -> None:
    model = intervened(base_of(family), *nodes, training=training)
    strange = {"y", "t"} - set(model.plan().targets)
    first, second = ({name: value for name, value in batch.items() if name not in strange} for batch in two)
    store = ActivationStore(budget)
    with mock.patch.object(prefixes, "SHARED", 4):
        check_as_plain(model, first, store, 2)
        check_as_plain(model, second, store, 2)
        check_as_plain(model, first, None, 1)


def any_graph(examples: int) -> Any:
    def decorate(test: Any) -> Any:
        anything = st.sampled_from(sorted(TINY)).flatmap(lambda family: st.tuples(st.just(family), graphs(family)))
        budgets = st.sampled_from([2**30, 2**30, 5000, 0])
        configured = settings(
            max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
        )
        return configured(given(anything, batches(), st.booleans(), budgets)(test))

    return decorate


@any_graph(60)
def test_any_graph_on_any_batch_has_the_plain_losses_and_gradients(graph: Any, two: Any, training: bool, budget: int):
    check_any(*graph, two, training, budget)


@pytest.mark.slow
@any_graph(500)
def test_many_graphs_on_many_batches_have_the_plain_losses_and_gradients(
    graph: Any, two: Any, training: bool, budget: int
):
    check_any(*graph, two, training, budget)


# --- what is computed -------------------------------------------------------------------------------------


def replayed(model: rh.InterventionModel, batch: dict[str, Any], *modules: nn.Module) -> list[int]:
    """How many tokens go into each call of some modules, in the second step on a batch."""
    with model.reusing(ActivationStore(2**30)) as used:
        assert used(batch) is not None
        step(model, batch)
        with counted(*modules) as seen:
            step(model, batch)
    return seen


def test_heads_alone_run_no_block_after_the_first_epoch() -> None:
    model = intervened(base_of("llama"), head(0, name="low"), head(2, "all", name="high", target="t"))
    batch = usual_batch(targets=True, labels=False)
    batch["t"] = batch["input_ids"] % 3
    check_exact(model, batch)
    assert replayed(model, batch, *inside(model), model.get_base_model().model.embed_tokens) == []


def test_heads_with_labels_run_no_block_after_the_first_epoch() -> None:
    model, batch = intervened(base_of("llama"), head(0), head(2, name="high")), usual_batch(targets=True)
    plain = check_exact(model, batch)
    assert float(plain.output.head_loss) < float(plain.loss)
    lm_head = model.get_base_model().lm_head
    assert replayed(model, batch, *inside(model)) == []
    assert replayed(model, batch, lm_head) == [int((batch["labels"] != -100).sum())]


def test_no_block_runs_above_the_last_head_if_there_are_no_labels() -> None:
    model = intervened(base_of("llama"), loreft(0), head(1), loreft(2))
    tokens = token_rows()
    batch = batch_of(tokens, list(map(len, tokens)), labels=False) | {"y": torch.tensor([0, 2, 1, 2])}
    plain = check_exact(model, batch)
    assert not any("loreft_2" in name for name in plain.gradients if float(plain.gradients[name].norm()) > 0)
    low, middle, high = inside(model)
    assert replayed(model, batch, low, high) == []
    assert replayed(model, batch, middle) == [4]


def test_the_first_pass_runs_no_further_than_somebody_looks() -> None:
    model, batch = intervened(base_of("llama"), head(1)), usual_batch(targets=True, labels=False)
    low, middle, high = inside(model)
    with model.reusing(ActivationStore(2**30)), counted(high) as above, counted(low, middle) as below:
        step(model, batch)
    assert not above and len(below) == 1 + (1 if below[1:] else 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_the_vocabulary_is_seen_by_tokens_with_a_label_alone(name: str) -> None:
    model, batch = intervened(base_of(name), loreft(1, "f1")), usual_batch()
    lm_head = model.get_base_model().get_output_embeddings()
    assert replayed(model, batch, lm_head) == [int((batch["labels"] != -100).sum())]
    with model.reusing(None):
        assert model(**batch).logits is None


def test_nothing_of_a_prefix_is_kept_for_the_backward_pass() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    def tokens(shapes: list[torch.Size]) -> int:
        """The most tokens of hidden states, of any kind, in one kept tensor."""
        return max(shape[:-1].numel() for shape in shapes if len(shape) == 3)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model, batch)
        plain, kept[:] = list(kept), []
        with model.reusing(None):
            step(model, batch)
    assert tokens(plain) == 4 * 12 and tokens(kept) == 4 * 4


def test_what_is_kept_needs_no_gradient_and_no_more_than_its_own_memory() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    with model.reusing(store):
        step(model, batch)
    tensors = [tensor for entry in store._memory.values() for tensor in entry.values()]
    assert tensors and not any(t.requires_grad for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_a_template_that_all_rows_begin_with_is_run_once(name: str) -> None:
    common = token_rows([(prefixes.SHARED + 3, 0)], seed=7)[0]
    config = copy.deepcopy(CASES[name].config)
    model = intervened(from_config(config), loreft(1))
    tokens = [common + row[:6] for row in token_rows()]
    batch = batch_of(tokens, [len(row) - 2 for row in tokens])
    check_exact(model, batch)
    store = ActivationStore(2**30)
    with model.reusing(store), counted(blocks_of(model)[0]) as seen:
        step(model, batch)
    # the template; the rest of each prefix but its last token; what is computed
    assert seen[:3] == [prefixes.SHARED, 4 * (3 + 6 - 2 - 1), 4 * 2]
    other = batch_of([common + row[:6] for row in token_rows(seed=3)], [len(row) - 2 for row in tokens])
    plain = step(model, other)
    with model.reusing(store), counted(blocks_of(model)[0]) as seen:
        check(step(model, other), plain)
    assert seen[:2] == [4 * (3 + 6 - 2 - 1), 4 * 2]


def test_two_answers_to_one_prompt_share_its_keys_and_values() -> None:
    (prompt,) = token_rows([(9, 9)])
    model = intervened(base_of("llama"), loreft(1))
    first, second = (batch_of([[*prompt, *answer]], [9]) for answer in ([5, 6], [7, 8, 9]))
    plain = step(model, second)
    store = ActivationStore(2**30)
    with model.reusing(store):
        step(model, first)
        step(model, first)
        store.hits = 0
        with counted(blocks_of(model)[0]) as seen:
            check(step(model, second), plain)
    check_exact(model, batch_of([[*prompt, 5, 6], [*prompt, 7, 8, 9]], [9, 9]))
    assert store.hits > 0 and seen[0] == 8  # its prefix in all blocks, since they lie below what is kept of it
    with model.reusing(store) as used:
        step(model, second)
        with counted(blocks_of(model)[2]) as seen:
            step(model, second)
    assert seen == [3] and used.store is store


def test_two_graphs_share_a_store() -> None:
    batch, store = usual_batch(targets=True), ActivationStore(2**30)
    for nodes in ([loreft(1), head(0)], [loreft(2), head(0)], [loreft(0)], [loreft(2), head(1, "2")], [head(2, -1)]):
        model = intervened(base_of("llama"), *nodes)
        given = batch if model.plan().targets else usual_batch()
        plain, store.hits = step(model, given), 0
        for _ in range(2):
            with model.reusing(store) as used:
                assert used(given) is not None
                check(step(model, given), plain)
        assert store.hits > 0 or used.cone.cut == 0


def test_two_adapters_that_act_together_have_the_plain_gradients() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(1, name="probe")), usual_batch(targets=True)
    model.add_adapter("other", rh.InterventionGraph(loreft(0), loreft(2), head(0, name="probe")))
    model.double().train()
    for names in (["default", "other"], ["other"], ["default"], ["other", "default"]):
        model.set_adapter(names)
        randomise(model)
        plain = check_exact(model, batch)
        assert len(plain.gradients) == sum({"default": 5, "other": 8}[name] for name in names)


SITES = {
    "the embeddings": {"component": "embedding_output"},
    "the final norm": {"component": "final_norm_output"},
    "a norm within a block": {"component": "model.layers.1.input_layernorm"},
    "what enters an attention": {"component": "model.layers.1.self_attn", "side": "input"},
    "a projection": {"component": "model.layers.2.mlp.gate_proj"},
    "the table of embeddings": {"component": "model.embed_tokens"},
    "one head": {"layer": 1, "component": "query_output", "head": 2},
}


@pytest.mark.parametrize("rule", ["l1", "generated", "all"])
@pytest.mark.parametrize("where", SITES.values(), ids=list(SITES))
def test_an_edit_at_any_site_has_the_plain_gradients(where: dict[str, Any], rule: str) -> None:
    reader = head(1, name="probe") if where["component"] != "final_norm_output" else head(2, name="probe")
    model = intervened(base_of("llama"), rh.Node(rh.LoReFT(rank=2), positions=rule, **where), reader)
    check_exact(model, usual_batch(targets=True))
    model = intervened(base_of("llama"), loreft(1, rule), rh.Node(rh.LinearHead(3, target="t"), **where))
    batch = usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


@pytest.mark.parametrize("rule", ["l1", "l2", "generated"])
def test_a_gate_sees_the_probe_below_the_edits_at_its_own_tokens(rule: str) -> None:
    probe = rh.Node(rh.LinearHead(1), 0, positions=rule, name="probe")
    gated = rh.Node(rh.Gated(rh.LoReFT(rank=2)), 1, positions=rule, source="probe")
    check_exact(intervened(base_of("llama"), probe, gated), usual_batch())


def test_a_target_for_each_token_goes_with_its_token_below_and_above_the_edit() -> None:
    nodes = [head(layer, "generated", name=f"at{layer}", target="t") for layer in (0, 2)]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


def test_a_target_for_each_slot_goes_with_its_slot_though_few_tokens_are_computed() -> None:
    model = intervened(base_of("llama"), loreft(0, "3:5"), head(1, "3:5", target="s"))
    batch = batch_of(token_rows([(5, 0), (4, 0)]), [5, 4])
    batch["labels"][1, 3] = 8  # the second row is computed from its third token on, and its head reads the fourth
    check_exact(model, batch | {"s": torch.tensor([[0, 1], [2, 0]])})


@pytest.mark.parametrize("pool", ["mean", "attention"])
@pytest.mark.parametrize("rule", ["all", "generated", "f2+l2"])
def test_a_pool_below_and_above_the_edit_has_the_plain_gradients(rule: str, pool: Any) -> None:
    pooled = rh.MLPHead(3, target="y", hidden=4, pool=pool)
    nodes = [rh.Node(pooled, layer, positions=rule, name=f"at{layer}") for layer in (0, 2)]
    check_exact(intervened(base_of("llama"), *nodes, loreft(1)), usual_batch(targets=True))


@pytest.mark.parametrize("rule", ["all", "generated"])
def test_the_next_tokens_target_is_that_of_the_next_column_below_and_above_the_edit(rule: str) -> None:
    nodes = [
        rh.Node(rh.LinearHead(3, target="t", shift=True), layer, positions=rule, name=f"at{layer}") for layer in (0, 2)
    ]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    check_exact(model, batch | {"t": batch["input_ids"] % 3})


@pytest.mark.parametrize("columns", [3, 12])
def test_a_target_for_each_output_is_not_taken_for_one_of_each_token(columns: int) -> None:
    what = rh.LinearHead(columns, target="y", loss="multi_label")
    nodes = [rh.Node(what, layer, positions="l1", name=f"at{layer}") for layer in (0, 2)]
    model, batch = intervened(base_of("llama"), *nodes, loreft(1)), usual_batch()
    assert batch["input_ids"].shape[1] == 12
    check_exact(model, batch | {"y": torch.randint(0, 2, (4, columns), generator=torch.Generator().manual_seed(0))})


# --- dropout of nodes -------------------------------------------------------------------------------------


def test_dropout_of_a_node_draws_as_in_the_plain_path_where_as_many_tokens_are_edited() -> None:
    with mock.patch.object(passes, "FEW", 0):  # else all tokens are edited, and chosen by a mask
        check_exact(intervened(base_of("llama"), loreft(1, "l1", dropout=0.5)), usual_batch())


def test_dropout_of_a_node_keeps_as_many_numbers_as_it_should() -> None:
    model, batch = intervened(base_of("llama"), loreft(1, "generated", dropout=0.25)), usual_batch()
    kept = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        kept.append(float((output != 0).double().mean()))

    handle = model.node("loreft_1").register_forward_hook(see)
    with model.reusing(ActivationStore(2**30)):
        losses = {float(model(**batch).loss) for _ in range(40)}
    handle.remove()
    assert len(losses) == 40  # drawn anew each time, although all else is replayed
    assert len(kept) == 40 and abs(sum(kept) / 40 - 0.75) < 0.02


# --- what is not understood takes the plain path ----------------------------------------------------------


def test_dropout_in_the_base_model_is_random_in_every_step() -> None:
    model = intervened(tiny_gpt2(**GPT2 | {"resid_pdrop": 0.1}).double(), loreft(1))
    assert "dropout in training mode" in check_plain(model, usual_batch())
    check_exact(model.eval(), usual_batch())


def test_noise_on_the_embeddings_is_random_in_every_step() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    handle = activate_neftune(model, 5.0)
    with model.reusing(ActivationStore(2**30)) as used:
        assert "noise" in used.eligibility.why_plain()
        assert len({float(model(**batch).loss.detach()) for _ in range(3)}) == 3
        assert used.eligibility.why_plain() is not None and model.eval() and used.eligibility.why_plain() is None
    handle.remove()


def test_weights_of_the_base_model_that_are_trained_change_what_is_below() -> None:
    model = intervened(base_of("llama"), loreft(1))
    model.get_base_model().model.embed_tokens.weight.requires_grad = True
    assert "are trained (model.embed_tokens.weight)" in check_plain(model, usual_batch())


def test_disabled_adapters_give_the_base_model() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    with model.disable_adapter():
        assert "disabled" in check_plain(model, batch)


@pytest.mark.parametrize("names", [["default", "__base__", "other", "__base__"], ["default", "other"] * 2])
def test_an_adapter_for_each_row_gives_the_plain_losses_and_gradients(names: list[str]) -> None:
    model, batch = intervened(base_of("llama"), loreft(1), training=False), usual_batch()
    model.add_adapter("other", rh.InterventionGraph(loreft(0)))
    model.double().tuner.set_adapter(["default", "other"])
    randomise(model)
    model.eval()
    batch["adapter_names"] = names  # type: ignore[assignment]
    plain = step(model, batch)
    assert len(plain.gradients) == 6
    for store in (ActivationStore(2**30), None):
        with model.reusing(store):
            check(step(model, batch), plain)
            check(step(model, batch), plain)


@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}, {"logits_to_keep": 1}]
)
def test_a_call_that_asks_for_more_takes_the_plain_path(options: dict[str, Any]) -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch(labels=False) | options
    plain = model(**batch)
    with model.reusing(ActivationStore(2**30)) as used:
        assert used(batch) is None
        got = model(**batch)
    assert torch.equal(got[0], plain[0]) and len(got) == len(plain)


def test_embeddings_in_place_of_tokens_take_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch["inputs_embeds"] = model.get_base_model().model.embed_tokens(batch.pop("input_ids")).detach()
    check_plain(model, batch)


def test_a_mask_of_four_dimensions_takes_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    mask = batch["attention_mask"].bool()
    batch["attention_mask"] = (mask[:, None, None, :] & torch.ones(12, 12).tril().bool()).double().log()
    batch["attention_mask"] = batch["attention_mask"].clamp(min=-1e30)
    check_plain(model, batch)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rows_padded_at_the_left_are_whole_unless_they_say_their_positions(name: str) -> None:
    model = intervened(base_of(name), loreft(1), loreft(2))
    for position_ids in (False, True)[: 1 + (name == "llama")]:
        batch = usual_batch(side="left", position_ids=position_ids)
        check_exact(model, batch)
        assert replayed(model, batch, blocks_of(model)[-1]) == [4 * 4 if position_ids else 4 * 12]


def test_batch_norms_in_training_mode_take_the_plain_path() -> None:
    base = base_of("llama")
    base.model.norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(32), nn.Unflatten(0, (4, -1))).double()
    base.requires_grad_(False)
    model = intervened(base, loreft(1))
    batch, store = usual_batch(), ActivationStore(2**30)
    with model.reusing(store) as used:
        assert "batch norms" in used.eligibility.why_plain() and used(batch) is None


def test_the_loss_of_a_router_takes_the_plain_path() -> None:
    model, batch = intervened(base_of("mixtral"), loreft(1)), usual_batch()
    check_exact(model, batch)
    model.get_base_model().config.output_router_logits = True
    assert "router" in check_plain(model, batch)


@pytest.mark.parametrize("rule", ["l1", "all"])
def test_activation_checkpointing_goes_without_a_prefix_but_skips_blocks(rule: str) -> None:
    model, batch = intervened(base_of("llama"), loreft(1, rule), head(0)), usual_batch(targets=True)
    model.gradient_checkpointing_enable()
    check_exact(model, batch)
    low, _, high = inside(model)
    assert replayed(model, batch, low) == [] and set(replayed(model, batch, high)) == {4 * 12}


def test_labels_on_padding_take_the_plain_path() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch["labels"] = batch["input_ids"].clone()
    check_plain(model, batch)


def test_a_classifier_of_padding_takes_the_plain_path() -> None:
    """As one does that looks at the first column of rows padded at the left."""
    model = intervened(base_of("bert"), loreft(1, "all"))
    batch = usual_batch(labels=False, side="left") | {"labels": torch.tensor([1, 0, 0, 1])}
    batch.pop("prompt_mask")
    check_plain(model, batch)


def test_labels_on_the_tokens_of_an_encoder_have_the_plain_gradients() -> None:
    model = intervened(from_config(CASES["bert"].config, tf.AutoModelForTokenClassification), loreft(1, "all"))
    batch = usual_batch(labels=False)
    batch.pop("prompt_mask")
    labels = batch["input_ids"] % 2
    check_exact(model, batch | {"labels": labels.where(batch["attention_mask"].bool(), -100)})
    check_plain(model, batch | {"labels": labels})


def test_a_label_behind_the_last_real_token_counts_once() -> None:
    model = intervened(base_of("llama"), loreft(1))
    batch = usual_batch()
    batch["labels"][1, 9] = 5  # the first column of the padding, which the last token predicts
    check_exact(model, batch)


def test_a_token_that_nothing_marks_as_padding_is_no_padding() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    batch.pop("attention_mask")
    check_exact(model, batch)


def test_ids_of_32_bits_are_ids_as_well() -> None:
    model, store = intervened(base_of("llama"), loreft(1)), ActivationStore(2**30)
    row = token_rows([(8, 3)])[0]
    same_bytes = [token for pair in zip(row, [0] * 8, strict=True) for token in pair][:8]
    batch, other = batch_of([row], [3]), batch_of([same_bytes], [3])
    other["input_ids"] = other["input_ids"].int()
    for one in (batch, other, batch):
        plain = step(model, one)
        with model.reusing(store):
            check(step(model, one), plain)
            check(step(model, one), plain)


def test_columns_of_one_content_but_other_meaning_are_told_apart() -> None:
    base = from_config(CASES["bert"].config, tf.AutoModel)
    model, store = intervened(base, head(1, "all"), training=False), ActivationStore(2**30)
    one = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]]), "y": torch.tensor([[0, 1]])}
    for name in ("token_type_ids", "position_ids"):
        batch = one | {name: torch.tensor([[1, 0]])}
        plain = step(model, batch)
        with model.reusing(store):
            check(step(model, batch), plain)


# --- nothing stale ----------------------------------------------------------------------------------------


def test_a_weight_changed_in_place_is_seen() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    with model.reusing(store) as used:
        before = step(model, batch)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.weight.add_(0.1)
    plain = step(model, batch)
    assert abs(float(plain.loss - before.loss)) > 1e-4
    with model.reusing(used):
        check(step(model, batch), plain)


def test_a_buffer_changed_in_place_is_seen() -> None:
    model, batch, store = intervened(base_of("llama"), loreft(1)), usual_batch(), ActivationStore(2**30)
    with model.reusing(store) as used:
        before = step(model, batch)
    with torch.no_grad():
        model.get_base_model().model.rotary_emb.inv_freq.mul_(0.5)
    plain = step(model, batch)
    assert abs(float(plain.loss - before.loss)) > 1e-6
    with model.reusing(used):
        check(step(model, batch), plain)


@pytest.mark.parametrize("column", ["input_ids", "position_ids", "attention_mask"])
def test_another_input_is_another_entry(column: str) -> None:
    model, store = intervened(base_of("llama"), loreft(1), head(0, "f1")), ActivationStore(2**30)
    batch = usual_batch(targets=True, position_ids=True)
    other = {name: value.clone() for name, value in batch.items()}
    other[column][:, 2] = {"input_ids": 5, "position_ids": 7, "attention_mask": 0}[column]
    with model.reusing(store) as used:
        step(model, batch)
    plain = step(model, other)
    with model.reusing(used):
        check(step(model, other), plain)


def test_models_of_other_weights_never_share_an_entry() -> None:
    batch, store = usual_batch(targets=True), ActivationStore(2**30)
    for seed in range(2):
        base = base_of("llama")
        with torch.no_grad():
            base.model.layers[0].mlp.down_proj.weight[0, 0] += seed
        model = intervened(base, loreft(1), head(0))
        plain, store.hits = step(model, batch), 0
        with model.reusing(store):
            check(step(model, batch), plain)
        assert store.hits == 0


def test_models_of_one_content_share_their_entries() -> None:
    batch, store = usual_batch(), ActivationStore(2**30)
    for _ in range(2):
        model = intervened(base_of("llama"), loreft(1))
        store.misses = 0
        with model.reusing(store):
            step(model, batch)
    assert store.misses == 0


def test_settings_that_no_weight_shows_are_told_apart() -> None:
    batch, store = usual_batch(), ActivationStore(2**30)
    for eps in (1e-6, 0.1):
        config = tf.LlamaConfig(**SMALL, rms_norm_eps=eps)
        model = intervened(from_config(config), loreft(1))
        plain, store.hits = step(model, batch), 0
        with model.reusing(store):
            check(step(model, batch), plain)
        assert store.hits == 0


def test_autocast_and_no_autocast_share_no_entry() -> None:
    model, batch, store = intervened(base_of("llama").float(), loreft(1)), usual_batch(), ActivationStore(2**30)
    for enabled in (False, True, False):
        store.hits = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plain = step(model, batch)
            with model.reusing(store):
                first = step(model, batch)
                check(first, plain, 0.05 if enabled else 1e-4)
                assert (store.hits > 0) == (not enabled and len(store) > 8)
                check(step(model, batch), first, 0)


def test_a_store_without_room_changes_nothing() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    plain = step(model, batch)
    for budget in (0, 1000, 20_000):
        store = ActivationStore(budget)
        with model.reusing(store), mock.patch.object(prefixes, "SHARED", 2):
            for _ in range(3):
                check(step(model, batch), plain)
        assert store.bytes <= budget


def test_what_is_on_disk_serves_a_second_run(tmp_path: Any) -> None:
    batch = usual_batch(targets=True)
    for run in range(2):
        model, store = intervened(base_of("llama"), loreft(1), head(0)), ActivationStore(0, tmp_path)
        plain = step(model, batch)
        with model.reusing(store):
            check(step(model, batch), plain)
        assert (store.misses == 0) == bool(run)


def test_reusing_ends_with_its_block_also_by_an_error() -> None:
    model, batch = intervened(base_of("llama"), loreft(1)), usual_batch()
    with pytest.raises(IndexError), model.reusing(None):
        model(**batch | {"input_ids": batch["input_ids"] + 1000})
    plain = step(model, batch)
    with model.reusing(None):
        check(step(model, batch), plain)
    assert plain.output.logits is not None and step(model, batch).output.logits is not None


def test_evaluation_without_gradient_gives_what_training_needs() -> None:
    model, batch = intervened(base_of("llama"), loreft(1), head(0)), usual_batch(targets=True)
    store = ActivationStore(2**30)
    plain = step(model, batch)
    with model.reusing(store), torch.inference_mode():
        torch.testing.assert_close(model(**batch).loss.clone(), plain.loss)
    with model.reusing(store):
        store.misses = 0
        check(step(model, batch), plain)
    assert store.misses == 0

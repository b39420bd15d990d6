"""One forward pass: batches against rows alone, where the prompt ends, checkpointing, hooks, copies, failures."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.idle import idle
from support.models import LAYERS, WIDTH, random_ids, randomise, tiny_bart, tiny_llama, tiny_t5
from support.passes import (
    MODELS,
    PROMPT,
    ROWS,
    RULES,
    alike,
    answer_loss,
    base_of,
    changes,
    close,
    gradients,
    intervened,
    labelled,
)
from support.processes import run_together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, DynamicCache, LlamaForSequenceClassification, StaticCache

import reftheads as rh

# --- batches against rows alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("training", [True, False])
def test_a_row_in_a_padded_batch_gives_what_it_gives_alone(name: str, side: str, rule: str, training: bool):
    base = base_of(name)
    model = intervened(base, rule).train(training)
    batch = labelled(side)
    found = oracle.real(model(**batch).logits, batch["attention_mask"])
    for logits, ids, prompt in zip(found, ROWS, PROMPT, strict=True):
        close(logits, oracle.logits(base, changes(model, rule, MODELS[name][1]), ids, prompt))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["l1", "f2+l2", "all"])
def test_without_labels_the_whole_input_is_the_prompt(side: str, rule: str):
    base = base_of()
    model = intervened(base, rule)
    batch = oracle.pad(ROWS, side)
    found = oracle.real(model(**batch).logits, batch["attention_mask"])
    for logits, ids in zip(found, ROWS, strict=True):
        close(logits, oracle.logits(base, changes(model, rule, "model.layers.{}"), ids, len(ids)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["l1", "f2+l2", "all"])
def test_gradients_of_a_batch_are_those_of_its_rows_together(name: str, side: str, rule: str):
    model = intervened(base_of(name), rule).train()
    batch = labelled(side)
    answer_loss(model(**batch).logits, batch["labels"]).backward()
    together = gradients(model)
    for row, prompt in zip(ROWS, PROMPT, strict=True):
        alone = labelled(side, [row], [prompt])
        answer_loss(model(**alone).logits, alone["labels"]).backward()
    alike(together, gradients(model))


def test_an_empty_selection_in_every_row_leaves_the_model_as_it_is():
    base = base_of()
    model = intervened(base, "f0")
    batch = labelled("left")
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    rule = intervened(base, "30")
    assert torch.equal(rule(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("rules", [("f2+l2", "generated"), ("l1", "l1"), ("all", "all")], ids="-".join)
def test_rows_through_an_encoder_and_decoder_give_what_they_give_alone(make: Any, rules: tuple[str, str]):
    base = make(dropout_rate=0.0, initializer_factor=2.0) if make is tiny_t5 else make(dropout=0.0, init_std=0.3)
    base = base.double()
    encoder = "encoder.block.1" if make is tiny_t5 else "model.encoder.layers.1"
    v, w = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4)).double() * 3
    graph = rh.InterventionGraph(
        rh.Node(rh.Steering(vector=v), 1, positions=rules[0], stack="encoder"),
        rh.Node(rh.Steering(vector=w), 1, positions=rules[1], stack="decoder"),
    )
    model = rh.InterventionModel(copy.deepcopy(base), graph).double().train()
    answers = [[30, 31], [32, 33, 34, 35], [36], [37, 38, 39]]
    inputs, labels = oracle.pad(ROWS, "right"), oracle.pad(answers, "right")
    target = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=target)
    start = base.config.decoder_start_token_id
    for i, (ids, answer) in enumerate(zip(ROWS, answers, strict=True)):
        made = [
            (encoder, lambda h, _: oracle.at(rules[0], oracle.adding(v.float().double()))(h, len(h))),
            (
                encoder.replace("encoder", "decoder"),
                lambda h, _: oracle.at(rules[1], oracle.adding(w.float().double()))(h, 1),
            ),
        ]
        fed = torch.tensor([[start, *answer[:-1]]])
        expected = oracle.logits(base, made, ids, len(ids), decoder_input_ids=fed)
        close(out.logits[i, : len(answer)], expected)


# --- where the prompt ends --------------------------------------------------------------------------------


def test_a_prompt_mask_comes_before_labels_and_labels_before_the_whole_input():
    base = base_of()
    model = intervened(base, "l1")
    batch = labelled("left")
    mask = batch["attention_mask"]
    prompt_mask = mask * (mask.cumsum(1) <= 1)

    def expect(prompts: list[int], **inputs: Tensor) -> None:
        found = oracle.real(model(**inputs).logits, mask)
        for logits, ids, prompt in zip(found, ROWS, prompts, strict=True):
            close(logits, oracle.logits(base, changes(model, "l1", "model.layers.{}"), ids, prompt))

    expect([1, 1, 1, 1], **batch, prompt_mask=prompt_mask)
    expect(PROMPT, **batch)
    del batch["labels"]
    expect([len(row) for row in ROWS], **batch)


@pytest.mark.parametrize("rule", ["l1", "f2+l2", "prompt", "generated", "-1", "2:4"])
def test_training_without_knowing_where_the_prompt_ends_is_refused(rule: str):
    model = intervened(base_of(), rule)
    batch = oracle.pad(ROWS, "left")
    model(**batch)
    model.train()
    with pytest.raises(ValueError, match="depend on where the prompt ends, and this batch does not say: pass labels"):
        model(**batch)
    model(**batch, prompt_mask=batch["attention_mask"])
    with model.disable_adapter():
        model(**batch)
    intervened(base_of(), "all").train()(**batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_training_on_labels_from_the_first_token_of_a_row_on_is_refused_where_nothing_would_be_selected(rule, side):
    model = intervened(base_of(), rule)
    batch = oracle.pad(ROWS, side)
    everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = batch["attention_mask"].cumsum(1) == 1
    some = everything.masked_fill(first & (torch.arange(len(ROWS)) != 2)[:, None], -100)
    model(**batch, labels=everything)
    model.train()
    model(**batch, labels=everything, prompt_mask=batch["attention_mask"])
    model(**batch, labels=everything.masked_fill(first, -100))
    if rule in ("all", "generated"):
        model(**batch, labels=everything)
        return
    with pytest.raises(ValueError, match="the labels of row 0 begin at its first token, as those of 4 of 4 rows do"):
        model(**batch, labels=everything)
    with pytest.raises(ValueError, match="of row 2 .* 1 of 4 rows .* assistant_only_loss=True"):
        model(**batch, labels=some)
    with model.disable_adapter():
        model(**batch, labels=everything)


def test_targets_of_a_head_say_that_rows_are_whole_inputs():
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(outputs=2, target="kind"), -1, positions="l1", name="kind"))
    model = rh.InterventionModel(base_of(), graph).double().train()
    batch = oracle.pad(ROWS, "left")
    out = model(**batch, kind=torch.tensor([0, 1, 1, 0]))
    last = model(**batch, output_hidden_states=True, kind=torch.tensor([0, 1, 1, 0])).hidden_states[-2][:, -1]
    assert out.predictions["kind"].shape == (4, 2) and last.shape == (4, WIDTH)
    with pytest.raises(ValueError, match="depend on where the prompt ends"):
        model(**batch)


@pytest.mark.parametrize("rule", RULES)
def test_an_answer_that_continues_a_cache_gets_the_same_edit(rule: str):
    model = intervened(base_of(), rule)
    batch = labelled("left")
    prompt_mask = batch["labels"] == -100
    known = 3  # every answer begins later
    model.requires_grad_(False)  # a cache with gradients cannot be copied
    whole = model(**batch).logits
    for make_cache in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)):
        cache = make_cache(config=model.config)
        first = {key: value[:, :known] for key, value in batch.items() if key != "labels"}
        rest = {key: value[:, known:] for key, value in batch.items()} | {"attention_mask": batch["attention_mask"]}
        given = model(**first, prompt_mask=prompt_mask, past_key_values=cache, use_cache=True).logits
        by_labels = model(**rest, past_key_values=copy.deepcopy(cache)).logits
        del rest["labels"]
        by_mask = model(**rest, past_key_values=cache, prompt_mask=prompt_mask).logits
        mask = batch["attention_mask"].bool()
        close(torch.cat([given, by_labels], 1)[mask], whole[mask])
        close(torch.cat([given, by_mask], 1)[mask], whole[mask])


def test_the_labels_of_a_classifier_say_nothing_of_the_prompt():
    torch.manual_seed(0)
    config = base_of().config
    config.num_labels = 3
    base = LlamaForSequenceClassification(config).double()
    model = intervened(base, "f2+l2").train()
    batch = oracle.pad(ROWS, "left")
    logits = model(**batch, labels=torch.tensor([0, 2, 1, 0])).logits
    for got, ids in zip(logits, ROWS, strict=True):
        close(got, oracle.logits(base, changes(model, "f2+l2", "model.layers.{}"), ids, len(ids)))


@pytest.mark.parametrize("rule", ["l1", "f2+l2", "all", "prompt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_through_an_encoder_give_what_they_give_alone(side: str, rule: str):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=24
    )
    base = BertForMaskedLM(BertConfig(**sizes, initializer_range=0.3)).double().eval()
    model = intervened(base, rule)
    batch = oracle.pad(ROWS, side)
    prompt_mask = batch["attention_mask"] * (batch["attention_mask"].cumsum(1) <= torch.tensor(PROMPT)[:, None])
    for given, prompts in (({}, list(map(len, ROWS))), ({"prompt_mask": prompt_mask}, PROMPT)):
        found = oracle.real(model(**batch, **given).logits, batch["attention_mask"])
        for logits, ids, prompt in zip(found, ROWS, prompts, strict=True):
            close(logits, oracle.logits(base, changes(model, rule, "bert.encoder.layer.{}"), ids, prompt))


@pytest.mark.parametrize("sign", [{"cu_seq_lens_q": [0, 3, 8]}, {"position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]]}], ids=str)
def test_packed_rows_are_refused_where_positions_count_from_the_prompt(sign: dict[str, Any]):
    ids = torch.tensor([ROWS[0]])
    packed: dict[str, Any] = dict(input_ids=ids, labels=ids, **{key: torch.tensor(v) for key, v in sign.items()})
    with pytest.raises(ValueError, match="positions 'l1' need one row a sequence, and these rows are packed"):
        intervened(base_of(), "l1")(**packed)
    intervened(base_of(), "all")(**packed)
    intervened(base_of(), "l1")(input_ids=ids, labels=ids, position_ids=torch.arange(8)[None])


# --- edits outside their positions, switched off, by adapter -----------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_nothing_before_the_edited_column_changes_by_a_bit(name: str):
    base = base_of(name)
    model = intervened(base, "3:5")
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        plain, edited = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (base, model))
    assert len(plain) == LAYERS + 1
    for before, after in zip(plain, edited, strict=True):
        assert torch.equal(before[:, :3], after[:, :3])
    assert torch.equal(plain[1][:, 5:], edited[1][:, 5:])
    assert (plain[1][:, 3:5] - edited[1][:, 3:5]).abs().min() > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_switched_off_adapter_is_the_base_bit_for_bit(name: str):
    base = base_of(name)
    model = intervened(base, "f2+l2")
    batch = labelled("left")
    edited = model(**batch)
    with model.disable_adapter():
        off = model(**batch)
    plain = base(**batch)
    assert torch.equal(off.logits, plain.logits) and torch.equal(off.loss, plain.loss)
    assert not torch.equal(edited.logits, plain.logits)
    assert torch.equal(model(**batch).logits, edited.logits)


def test_recorded_hidden_states_are_those_that_go_on_even_if_recording_came_first():
    base = base_of()
    ids = torch.tensor([ROWS[0]])
    base(input_ids=ids, output_hidden_states=True)  # transformers installs its recording hooks now
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.Ablate(), 1, positions="l1")))
    assert model(input_ids=ids, output_hidden_states=True).hidden_states[2][:, -1].abs().max() == 0


def test_every_row_goes_through_the_adapter_that_is_named_for_it():
    base = base_of()
    model = intervened(base, "f2+l2")
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)) * 3
    model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Steering(vector=v), 0, positions="l1")))
    model.double()
    batch = labelled("left")
    names = ["other", "default", "__base__", "other"]
    found = oracle.real(model(**batch, adapter_names=names).logits, batch["attention_mask"])
    expected = {
        "default": changes(model, "f2+l2", "model.layers.{}"),
        "other": [("model.layers.0", oracle.at("l1", oracle.adding(v.double())))],
        "__base__": [],
    }
    for logits, ids, prompt, name in zip(found, ROWS, PROMPT, names, strict=True):
        close(logits, oracle.logits(base, expected[name], ids, prompt))
    close(model(**batch).logits, intervened(base, "f2+l2")(**batch).logits)


# --- activation checkpointing -----------------------------------------------------------------------------


def deep_graph(inner: bool) -> rh.InterventionGraph:
    """Nodes at block outputs, which checkpointing leaves outside, or within blocks, which it computes twice."""
    blocks = [rh.Node(rh.LoReFT(rank=2), layer, positions="f2+l2") for layer in range(LAYERS)]
    reads = [rh.Node(rh.LinearHead(outputs=2, target="kind"), 1, positions="l1", name="outer")]
    if inner:
        blocks += [rh.Node(rh.LoReFT(rank=2), layer, "query_output", "l2", name=f"q{layer}") for layer in range(LAYERS)]
        blocks += [rh.Node(rh.DiReFT(rank=2), layer, "mlp_activation", name=f"m{layer}") for layer in range(LAYERS)]
        blocks += [rh.Node(rh.LoRA(rank=2), 1, "value_output", "prompt")]
        blocks += [rh.Node(rh.LoReFT(rank=2), layer, "mlp_output", share="tied", name=f"t{layer}") for layer in (0, 2)]
        reads += [rh.Node(rh.LinearHead(outputs=2, target="kind"), 1, "mlp_output", positions="l1", name="inner")]
        reads += [rh.Node(rh.LinearHead(outputs=1), 0, "attention_output", positions="l1", name="probe")]
        blocks += [rh.Node(rh.Gated(rh.LoReFT(rank=2)), 2, "attention_output", positions="all", source="probe")]
    return rh.InterventionGraph(*reads, *blocks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("between", ["nothing", "disabled", "other batch", "generate"])
def test_checkpointing_gives_the_gradients_of_the_plain_path(name: str, reentrant: bool, inner: bool, between: str):
    model = rh.InterventionModel(base_of(name), deep_graph(inner))
    randomise(model)
    model = model.double().train()
    batch = labelled("left") | {"kind": torch.tensor([0, 1, 1, 0])}
    model(**batch, use_cache=False).loss.backward()
    plain = gradients(model)
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(**batch, use_cache=False).loss
    with torch.no_grad():
        if between == "disabled":
            with model.disable_adapter():
                model(**batch, use_cache=False)
        elif between == "other batch":
            model(**{key: value[1:3] for key, value in labelled("right").items()}, use_cache=False)
        elif between == "generate":
            model.eval().generate(input_ids=torch.tensor([ROWS[0]]), max_new_tokens=2)
            model.train()
    loss.backward()
    alike(gradients(model), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_losses_through_one_checkpointed_model_add_up(reentrant: bool):
    model = rh.InterventionModel(base_of(), deep_graph(inner=True))
    randomise(model)
    model = model.double().train()
    batches = [labelled(side) | {"kind": torch.tensor([0, 1, 1, 0])} for side in ("left", "right")]
    sum(model(**batch, use_cache=False).loss for batch in batches).backward()
    plain = gradients(model)
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    first, second = (model(**batch, use_cache=False).loss for batch in batches)
    (second + first).backward()
    alike(gradients(model), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_what_the_encoder_told_the_decoder(reentrant: bool):
    base = tiny_t5(dropout_rate=0.0, initializer_factor=2.0).double()
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=1), 1, "mlp_output", positions="l1", stack="encoder", name="probe"),
        rh.Node(rh.Gated(rh.LoReFT(rank=2)), 1, "mlp_output", positions="all", stack="decoder", source="probe"),
    )
    model = rh.InterventionModel(base, graph)
    randomise(model)
    model = model.double().train()
    batch: dict[str, Any] = dict(input_ids=torch.tensor(ROWS[:1]), labels=torch.tensor([[30, 31, 32]]), use_cache=False)
    model(**batch).loss.backward()
    plain = gradients(model)
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch).loss.backward()
    alike(gradients(model), plain)


def test_unloading_gives_the_checkpoint_function_back():
    model = intervened(base_of(), "all").train()
    base = model.get_base_model()
    base.activation_checkpointing_enable()
    blocks = list(base.model.layers)
    before = [block._gradient_checkpointing_func for block in blocks]
    model(**labelled("left"), use_cache=False).loss.backward()
    model.unload()
    assert [block._gradient_checkpointing_func for block in blocks] == before


# --- hooks ------------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_are_installed_once_and_stay():
    model = intervened(base_of(), "f2+l2")
    model(**labelled("left"), output_hidden_states=True)
    before = hooks_of(model)
    for _ in range(3):
        model(**labelled("left"), output_hidden_states=True).loss.backward()
        model.generate(input_ids=torch.tensor([ROWS[0]]), max_new_tokens=2)
        with model.disable_adapter():
            model(**labelled("left"))
    assert hooks_of(model) == before


def test_hooks_of_the_user_survive_and_see_what_goes_on():
    base = base_of()
    seen: list[tuple[str, Tensor]] = []
    block = base.model.layers[1]
    block.register_forward_hook(lambda module, args, output: seen.append(("before", output)))
    plain = hooks_of(base)
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.Ablate(), 1, positions="l1")))
    block.register_forward_hook(lambda module, args, output: seen.append(("after", output)))
    ids = torch.tensor([ROWS[0]])
    model(input_ids=ids)
    assert [when for when, _ in seen] == ["before", "after"]
    assert all(h[:, -1].abs().max() == 0 and h[:, 0].abs().max() > 0 for _, h in seen)
    base = model.unload()
    assert hooks_of(base) == plain + 1
    base(input_ids=ids)
    assert len(seen) == 4


def test_a_copy_works_and_is_its_own():
    model = intervened(base_of(), "f2+l2").train()
    model.get_base_model().activation_checkpointing_enable()
    batch = labelled("left")
    model(**batch, use_cache=False).loss.backward()
    expected = gradients(model)
    twin = copy.deepcopy(model)
    before = model(**batch, use_cache=False).logits
    assert torch.equal(twin(**batch, use_cache=False).logits, before)
    with torch.no_grad():
        twin.node("steer").v.mul_(5)
        twin.node("reft").b.zero_()
    assert not torch.equal(twin(**batch, use_cache=False).logits, before)
    assert torch.equal(model(**batch, use_cache=False).logits, before)
    model(**batch, use_cache=False).loss.backward()
    alike(gradients(model), expected)
    ids = torch.tensor([ROWS[0]])
    generate = dict(input_ids=ids, max_new_tokens=4, do_sample=False)
    model.eval(), twin.eval()
    with twin.disable_adapter():
        assert torch.equal(model.generate(**generate), copy.deepcopy(model).generate(**generate))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1", "layers.1.mlp", "norm"])
def test_a_forward_that_fails_leaves_the_model_usable(where: str):
    model = intervened(base_of(), "f2+l2")
    batch = labelled("left")
    before = model(**batch).logits

    def fail(*args):
        raise RuntimeError("broken on purpose")

    handle = model.get_base_model().model.get_submodule(where).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        model(**batch, prompt_mask=torch.zeros_like(batch["labels"]))
    handle.remove()
    assert idle(model.tuner.layer)
    assert torch.equal(model(**batch).logits, before)


def test_a_refused_batch_leaves_the_model_usable():
    model = intervened(base_of(), "l1").train()
    batch = labelled("left")
    before = model(**batch).logits
    with pytest.raises(ValueError):
        model(input_ids=batch["input_ids"])
    assert idle(model.tuner.layer)
    assert torch.equal(model(**batch).logits, before)


class Waits(TorchDispatchMode):
    """Counts the operations for which a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["f2+l2", "l1", "generated", "all"])
def test_a_pass_waits_for_the_device_no_more_often_than_that_of_the_base(rule: str):
    base = base_of()
    model = intervened(base, rule)
    batch = labelled("left")
    model(**batch)
    counts = []
    for either in (base, model):
        with Waits() as waits:
            either(**batch)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_the_backbone_alone_gets_the_same_edit():
    base = base_of()
    model = intervened(base, "l1")
    batch = oracle.pad(ROWS, "left")
    expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.get_base_model().model(**batch).last_hidden_state, expected)


# --- what is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["f2+l2", "l3", "generated", "all", "0:9"])
def test_a_head_is_trained_on_the_targets_of_the_tokens_that_it_reads(side: str, rule: str):
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(outputs=3, target="tags"), 1, positions=rule, name="tagger"))
    model = rh.InterventionModel(base_of(), graph).double()
    batch = labelled(side)
    tags = torch.randint(0, 3, batch["input_ids"].shape, generator=torch.Generator().manual_seed(5))
    out = model(**batch, tags=tags, output_hidden_states=True)
    node, losses = model.node("tagger"), []
    mask = batch["attention_mask"]
    for h, t, n in zip(oracle.real(out.hidden_states[2], mask), oracle.real(tags, mask), PROMPT, strict=True):
        read = list(range(n))[0:9] if rule == "0:9" else oracle.columns(rule, n, len(h))
        losses.append(F.cross_entropy(h[read] @ node.W.T + node.b, t[read], reduction="none"))
    close(out.losses["tagger"], torch.cat(losses).mean())


def test_a_target_that_fits_no_tokens_is_refused():
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(outputs=3, target="tags"), 1, positions="f2+l2", name="tagger"))
    model = rh.InterventionModel(base_of(), graph).double()
    with pytest.raises(ValueError, match=r"target 'tags' of head 'tagger' has shape \(4, 3\), but the input \(4, 8\)"):
        model(**labelled("left"), tags=torch.zeros(4, 3, dtype=torch.long))


def test_collected_activations_are_those_at_the_selected_tokens():
    graph = rh.InterventionGraph(
        rh.Node(rh.Collect(), 1, positions="l3", name="three"), rh.Node(rh.Collect(), 1, positions="l1", name="one")
    )
    model = rh.InterventionModel(base_of(), graph)
    batch = labelled("left")
    out = model(**batch, output_hidden_states=True)
    states = oracle.real(out.hidden_states[2], batch["attention_mask"])
    assert out.collected["one"].shape == (4, WIDTH)
    for i, (h, n) in enumerate(zip(states, PROMPT, strict=True)):
        assert torch.equal(out.collected["one"][i], h[n - 1])
        assert torch.equal(out.collected["three"][i][out.selected["three"][i]], h[max(n - 3, 0) : n])
        assert out.collected["three"][i][~out.selected["three"][i]].abs().sum() == 0


# --- several processes ------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
from support.passes import answer_loss, base_of, gradients, intervened, labelled
from support.processes import leave
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = intervened(base_of(), "f2+l2").train()
parallel = torch.nn.parallel.DistributedDataParallel(model)
part = {key: value[rank::world] for key, value in labelled("left").items()}
answer_loss(parallel(**part).logits, part["labels"]).backward()
if rank == 0:
    torch.save(gradients(model), sys.argv[1])
leave()
"""


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_one(tmp_path):
    run_together(PROGRAM, tmp_path / "gradients")
    model = intervened(base_of(), "f2+l2").train()
    batch = labelled("left")
    answer_loss(model(**batch).logits, batch["labels"]).backward()
    shared = torch.load(tmp_path / "gradients", weights_only=True)
    alike({name: grad * 2 for name, grad in shared.items()}, gradients(model))  # DDP gives the mean of two parts


def test_an_edit_of_cross_attention_keys_reaches_every_token_of_the_encoder():
    path = "decoder.block.0.layer.1.EncDecAttention.k"
    base = tiny_t5().double()
    vector = torch.randn(base.get_submodule(path).out_features, dtype=torch.float64)
    ids, decoder_ids = random_ids(2, 7), random_ids(2, 4)
    mask = torch.ones_like(decoder_ids)
    mask[0, 2:] = 0  # padding of the decoder says nothing of the encoder's tokens

    handle = base.get_submodule(path).register_forward_hook(lambda module, args, output: output + vector)
    want = base(input_ids=ids, decoder_input_ids=decoder_ids, decoder_attention_mask=mask).logits
    handle.remove()
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.Steering(vector), component=path))).double()
    model.node(model.plan().graph.names[0]).assign(v=vector)
    got = model(input_ids=ids, decoder_input_ids=decoder_ids, decoder_attention_mask=mask).logits
    assert torch.allclose(got, want, atol=1e-10)

    with pytest.raises(ValueError, match="only positions 'all'"):
        rh.InterventionModel(tiny_t5(), rh.InterventionGraph(rh.Node(rh.Steering(), component=path, positions="l1")))


@pytest.mark.parametrize("path", ["k_proj", "v_proj"])
def test_what_reads_a_cross_attention_counts_no_padding_of_the_encoder(path: str):
    site = f"model.decoder.layers.0.encoder_attn.{path}"
    graph = rh.InterventionGraph(
        rh.Node(rh.Collect(), component=site, name="seen"),
        rh.Node(rh.LinearHead(2, pool="mean"), component=site, name="mean"),
    )
    model = rh.InterventionModel(tiny_bart().double(), graph).double().eval()
    ids, decoder_ids, mask = random_ids(2, 6), random_ids(2, 3), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
    alone = model(input_ids=ids[1:, :4], decoder_input_ids=decoder_ids[1:])
    assert out.selected["seen"].equal(mask.bool())
    close(out.collected["seen"][1, :4], alone.collected["seen"][0])
    close(out.predictions["mean"][1:], alone.predictions["mean"])


class AddsInPlace(nn.Module):
    """A layer that adds to what it gave, after those who look at it have looked."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        out = self.inner(h)
        out += 1
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", ["all", "prompt", "l1"])
def test_a_head_trains_where_the_model_adds_in_place_to_what_it_reads(positions: str, dtype: torch.dtype):
    """Its gradient is that of the tensor that it saw, as parallel blocks of Falcon have it."""
    base = tiny_llama().double()
    base.model.layers[0].mlp.down_proj = AddsInPlace(base.model.layers[0].mlp.down_proj)
    path = "model.layers.0.mlp.down_proj.inner"
    nodes = [
        rh.Node(rh.LinearHead(3, target="t", dtype=dtype), component=path, positions=positions, name="head"),
        rh.Node(rh.Collect(), component=path, positions=positions, name="seen"),
    ]
    model = rh.InterventionModel(base, rh.InterventionGraph(*nodes)).train()
    ids = random_ids(2, 6)
    head, tags = model.node("head").to(dtype), ids % 3
    out = model(input_ids=ids, prompt_mask=torch.ones_like(ids), t=tags)
    out.loss.backward()
    h = out.collected["seen"].reshape(-1, WIDTH).to(dtype)
    tags = tags[:, -1] if positions == "l1" else tags.flatten()
    W, b = (head.get_parameter(name).detach().requires_grad_() for name in "Wb")
    F.cross_entropy(h @ W.T + b, tags).backward()
    close(head.W.grad, W.grad)
    close(head.b.grad, b.grad)


@pytest.mark.parametrize("batch", [2, 20])  # 14 and 140 tokens: few are edited by a mask, many by slots
def test_a_gate_may_read_the_same_tokens_whatever_the_size_of_the_batch(batch):
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=1), layer=0, positions="f3", name="probe"),
        rh.Node(rh.Gated(rh.Steering()), layer=1, positions="f3", source="probe", name="edit"),
    )
    model = rh.InterventionModel(tiny_llama().double(), graph).double().eval()
    randomise(model)
    vector, probe = model.node("edit").v.detach(), model.node("probe")
    ids = random_ids(batch, 7)

    def steer(module, args, output):
        gate = torch.sigmoid(before[0][:, :3] @ probe.W.T + probe.b)
        return torch.cat([output[:, :3] + gate * vector, output[:, 3:]], dim=1)

    base, before = tiny_llama().double(), []
    base.model.layers[0].register_forward_hook(lambda module, args, output: before.append(output))
    base.model.layers[1].register_forward_hook(steer)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-10)

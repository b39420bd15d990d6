"""Passes within `generate` that are not its own next step: guidance, look-aheads, judgements, generations within.

Every one is compared with the same calls made outside of `generate`, of a second model with the same weights, without
a cache, with the prompt of each text said by `prompt_mask`.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.generation import MODELS, PROMPTS, close, edited, padded, told
from support.models import tiny_llama
from torch import Tensor
from transformers import DynamicCache

import reftheads as rh

NEGATIVE = [[21, 22, 23], [24, 25, 26, 27, 28], [29, 30], [31]]
RULES = ["f1", "l1", "f2+l2", "all", "generated", "prompt"]
NEW = 5
SCALE = 2.5


def unmasked(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """The same of a batch that is not padded, or of which the model is not told so."""
    return told(model, ids, torch.ones_like(ids), prompt)


def guided(model: Any, ids: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> list[Tensor]:
    """The scores of greedy decoding with guidance, each branch computed by calls of its own; and the tokens chosen."""
    prompt, other_prompt, scores = ids.shape[1], other.shape[1], []
    for _ in range(NEW):
        ones = mask.new_ones(len(mask), ids.shape[1] - prompt)
        conditional = told(model, ids, torch.cat([mask, ones], 1), prompt).log_softmax(-1)
        # transformers gives the positions of the second branch to nobody, so that padding counts in them
        full = torch.cat([other_mask, ones], 1)
        free = negative(model, other, full, other_prompt).log_softmax(-1)
        scores.append(SCALE * (conditional - free) + free)
        token = scores[-1].argmax(-1, keepdim=True)
        ids, other = torch.cat([ids, token], 1), torch.cat([other, token], 1)
    return [torch.stack(scores), ids[:, prompt:]]


def negative(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    prompt_mask = mask.bool() & (torch.arange(ids.shape[1]) < prompt)
    with torch.no_grad():
        return model(ids, attention_mask=mask, prompt_mask=prompt_mask, use_cache=False).logits[:, -1].float()


OPTIONS = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True)

# --- guidance by a second prompt ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("given", [True, False], ids=["negative prompt", "last token"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_each_branch_of_guidance_is_edited_at_its_own_prompt(name: str, rule: str, given: bool, use_cache: bool):
    model, alone = edited(name, rule), edited(name, rule)
    batch, other = padded(PROMPTS), padded(NEGATIVE)
    options: dict[str, Any] = {}
    if given:
        options = {"negative_prompt_ids": other["input_ids"], "negative_prompt_attention_mask": other["attention_mask"]}
    else:
        other = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": batch["attention_mask"][:, -1:]}
    out = model.generate(**batch, guidance_scale=SCALE, use_cache=use_cache, **options, **OPTIONS)
    scores, new = guided(alone, *batch.values(), *other.values())
    assert torch.equal(out.sequences[:, -NEW:], new)
    close(torch.stack(out.scores), scores)


def test_guidance_behind_gates_has_a_gate_for_each_branch():
    model, alone = edited(gated=True), edited(gated=True)
    batch, other = padded(PROMPTS), padded(NEGATIVE)
    options = {"negative_prompt_ids": other["input_ids"], "negative_prompt_attention_mask": other["attention_mask"]}
    out = model.generate(**batch, guidance_scale=SCALE, **options, **OPTIONS)
    scores, new = guided(alone, *batch.values(), *other.values())
    assert torch.equal(out.sequences[:, -NEW:], new)
    close(torch.stack(out.scores), scores)


class Guide(tf.LogitsProcessor):
    """What transformers does for guidance, but each pass of the second branch is a call of another model."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor):
        self.model, self.ids, self.mask, self.prompt, self.begun = model, ids, mask, ids.shape[1], False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.begun:
            self.ids = torch.cat([self.ids, input_ids[:, -1:]], 1)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.begun = True
        free = negative(self.model, self.ids, self.mask, self.prompt).log_softmax(-1)
        return SCALE * (scores.log_softmax(-1) - free) + free


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "way, times",
    [({"num_beams": 3}, 3), ({"do_sample": True, "top_k": 0, "num_return_sequences": 3}, 3)],
    ids=["beams", "several sequences"],
)
def test_guidance_of_beams_and_of_several_sequences(rule: str, way: dict[str, Any], times: int):
    model, alone = edited(rule=rule), edited(rule=rule)
    batch, other = padded(PROMPTS), {name: t.repeat_interleave(times, 0) for name, t in padded(NEGATIVE).items()}
    # without a cache, since transformers does not reorder the second branch's by beams
    options = {"negative_prompt_ids": other["input_ids"], "negative_prompt_attention_mask": other["attention_mask"]}
    torch.manual_seed(0)
    out = model.generate(**batch, guidance_scale=SCALE, use_cache=False, **options, **OPTIONS | way)
    torch.manual_seed(0)
    guide = Guide(alone, *other.values())
    expected = model.generate(**batch, logits_processor=[guide], use_cache=False, **OPTIONS | way)
    assert torch.equal(out.sequences, expected.sequences)
    close(torch.stack(out.scores), torch.stack(expected.scores))


def test_guidance_by_rows_of_several_adapters():
    model = edited(rule="l1")
    model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Ablate(), 1, positions="f1+l1")))
    batch, other = padded(PROMPTS), padded(NEGATIVE)
    names = ["other", "default", "__base__", "other"]
    mask = other["attention_mask"]
    options = {"guidance_scale": SCALE, **OPTIONS}
    out = model.generate(
        **batch,
        adapter_names=names,
        negative_prompt_ids=other["input_ids"],
        negative_prompt_attention_mask=mask,
        **options,
    )
    for i, name in enumerate(names):
        out_alone = model.generate(
            input_ids=torch.tensor([PROMPTS[i]]),
            adapter_names=[name],
            negative_prompt_ids=other["input_ids"][i : i + 1],
            negative_prompt_attention_mask=mask[i : i + 1],
            **options,
        )
        assert torch.equal(out.sequences[i, -NEW:], out_alone.sequences[0, -NEW:])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_second_prompt_that_begins_with_the_first_cannot_be_told_from_its_continuation(use_cache: bool):
    ids, other = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8, 9]])
    options = {"guidance_scale": SCALE, "negative_prompt_ids": other, "use_cache": use_cache, **OPTIONS}
    with pytest.raises(
        ValueError, match="positions 'l1' depend on where the prompt ends, and this call within generate"
    ):
        edited(rule="l1").generate(ids, **options)
    out = edited(rule="all").generate(ids, **options)  # which means the same tokens either way
    scores, _ = guided(edited(rule="all"), ids, torch.ones_like(ids), other, torch.ones_like(other))
    close(torch.stack(out.scores), scores)


# --- calls of the base model by logits processors and stopping criteria ---------------------------------------


class Calls(tf.LogitsProcessor):
    """A logits processor that calls the base model by `call`, and leaves the scores as they are."""

    def __init__(self, call: Callable[[Tensor], Tensor]):
        self.call = call
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.append((input_ids.clone(), self.call(input_ids)))
        return scores


def last(out: Any) -> Tensor:
    return out.logits[:, -1].float()


def mask_of(ids: Tensor) -> Tensor:
    """Of texts that begin with the prompts, which columns are tokens."""
    real = padded(PROMPTS)["attention_mask"]
    times = len(ids) // len(real)
    real = real.repeat_interleave(times, 0)
    return torch.cat([real, real.new_ones(len(ids), ids.shape[1] - real.shape[1])], 1)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
RELATIVE = ["l1", "f2+l2", "generated"]


def columns() -> int:
    return max(map(len, PROMPTS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RELATIVE)
def test_the_text_so_far_is_a_continuation_of_the_prompt(rule: str, way: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    base = model.get_base_model()
    calls = Calls(lambda ids: last(base(ids, attention_mask=mask_of(ids), position_ids=positions(ids))))
    plain = model.generate(**padded(PROMPTS), **OPTIONS, **WAYS[way])
    out = model.generate(**padded(PROMPTS), **OPTIONS, **WAYS[way], logits_processor=[calls])
    assert torch.equal(out.sequences, plain.sequences) and len(calls.seen) == NEW
    for ids, got in calls.seen:
        close(got, told(alone, ids, mask_of(ids), columns()))


def positions(ids: Tensor) -> Tensor:
    return (mask_of(ids).cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("rule", ["f1", "l1", "f2+l2"])
def test_padding_of_the_prompts_is_known_where_the_call_does_not_say_it(rule: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    base = model.get_base_model()
    calls = Calls(lambda ids: last(base(ids)))
    model.generate(**padded(PROMPTS), **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:  # the nodes know of the padding, though the attention does not
        prompt_mask = mask_of(ids).bool() & (torch.arange(ids.shape[1]) < columns())
        with torch.no_grad():
            close(got, last(alone(ids, prompt_mask=prompt_mask, use_cache=False)))


@pytest.mark.parametrize("rule", RELATIVE)
@pytest.mark.parametrize("pick", [[2], [3, 1], [1, 0, 3, 2], [0, 0, 1, 2, 3, 3]], ids=str)
def test_some_rows_of_the_text_in_any_order_are_known_by_their_tokens(rule: str, pick: list[int]):
    model, alone = edited(rule=rule), edited(rule=rule)
    base = model.get_base_model()

    def call(ids: Tensor) -> Tensor:
        rows, mask = ids[pick], mask_of(ids)[pick]
        first = int(mask.any(0).int().argmax())  # as one would cut what is padding in all of them
        return last(base(rows[:, first:], attention_mask=mask[:, first:], position_ids=positions(ids)[pick][:, first:]))

    calls = Calls(call)
    model.generate(**padded(PROMPTS), **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:
        close(got, told(alone, ids, mask_of(ids), columns())[pick])


@pytest.mark.parametrize("rule", RELATIVE)
def test_a_look_ahead_on_a_copy_of_the_cache_continues_the_prompt(rule: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    base, cache = model.get_base_model(), DynamicCache(config=model.get_base_model().config)
    token = torch.full((len(PROMPTS), 1), 33)

    def call(ids: Tensor) -> Tensor:
        mask = mask_of(torch.cat([ids, token], 1))
        return last(
            base(
                token,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=copy.deepcopy(cache),
            )
        )

    calls = Calls(call)
    model.generate(**padded(PROMPTS), **OPTIONS, past_key_values=cache, logits_processor=[calls])
    assert len(calls.seen) == NEW
    for ids, got in calls.seen:
        text = torch.cat([ids, token], 1)
        close(got, told(alone, text, mask_of(text), columns()))


@pytest.mark.parametrize("rule", RELATIVE)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_text_of_its_own_and_what_is_put_after_it_keep_its_prompt(rule: str, use_cache: bool):
    """A judge that reads another text, and then token by token what is generated."""
    model, alone = edited(rule=rule), edited(rule=rule)
    base, other = model.get_base_model(), torch.tensor([[40, 41, 42, 43]] * len(PROMPTS))
    state: dict[str, Any] = {"cache": None}

    def call(ids: Tensor) -> Tensor:
        new = ids[:, columns() :]
        text = torch.cat([other, new], 1)
        fed = text if state["cache"] is None else new[:, -1:]
        out = base(fed, use_cache=use_cache, past_key_values=state["cache"])
        state["cache"] = out.past_key_values
        return last(out)

    calls = Calls(call)
    model.generate(**padded(PROMPTS), **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:
        text = torch.cat([other, ids[:, columns() :]], 1)
        close(got, unmasked(alone, text, other.shape[1]))


@pytest.mark.parametrize("rule", RELATIVE)
def test_texts_that_begin_with_neither_are_prompts_of_their_own(rule: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    base, before = model.get_base_model(), torch.tensor([[40, 41]])
    calls = Calls(lambda ids: last(base(torch.cat([before.expand(len(ids), -1), ids[:, -3:].flip(1)], 1))))
    model.generate(**padded(PROMPTS), **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:
        text = torch.cat([before.expand(len(ids), -1), ids[:, -3:].flip(1)], 1)
        close(got, unmasked(alone, text, text.shape[1]))


def test_a_call_of_the_peft_model_and_one_with_a_prompt_mask_say_what_they_are():
    model, alone = edited(rule="l1"), edited(rule="l1")
    base, more = model.get_base_model(), torch.tensor([[40, 41]])

    def both(ids: Tensor) -> Tensor:
        text = torch.cat([ids, more], 1)
        prompt_mask = torch.arange(text.shape[1])[None] < ids.shape[1]
        return torch.cat([last(model(text)), last(base(text, prompt_mask=prompt_mask))])

    calls = Calls(both)
    model.generate(torch.tensor(PROMPTS[:1]), **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:
        text = torch.cat([ids, more], 1)
        close(got, torch.cat([unmasked(alone, text, text.shape[1]), unmasked(alone, text, ids.shape[1])]))


@pytest.mark.parametrize("what", ["a text", "embeddings", "a 4-D mask", "the backbone"])
def test_what_cannot_be_told_apart_is_an_error(what: str):
    model = edited(rule="l1")
    base: Any = model.get_base_model()
    more = torch.tensor([[40, 41]])

    def call(ids: Tensor) -> Tensor:
        text = torch.cat([ids, more], 1)
        if what == "embeddings":
            return last(base(inputs_embeds=base.get_input_embeddings()(text)))
        if what == "a 4-D mask":
            return last(base(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)))
        return base.model(text)[0][:, -1] if what == "the backbone" else last(base(text))

    with pytest.raises(
        ValueError, match="this call within generate could go on with its prompt or begin one of its own"
    ):
        model.generate(torch.tensor(PROMPTS[:1]), **OPTIONS, logits_processor=[Calls(call)])
    for rule in ("all", None):
        harmless = edited(rule=rule or "l1")
        base = harmless.get_base_model()
        if rule is None:
            harmless = rh.InterventionModel(tiny_llama().double(), rh.InterventionGraph(rh.Node(rh.Steering(), 0)))
            base = harmless.get_base_model()
        harmless.generate(torch.tensor(PROMPTS[:1]), **OPTIONS, logits_processor=[Calls(call)])


@pytest.mark.parametrize("rule", RELATIVE)
def test_a_generation_within_goes_on_with_the_prompt_or_begins_its_own(rule: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    base, other = model.get_base_model(), torch.tensor([[40, 41, 42]])
    options = dict(max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def call(ids: Tensor) -> Tensor:
        on = base.generate(ids, attention_mask=torch.ones_like(ids), **options)
        own = base.generate(other, attention_mask=torch.ones_like(other), **options)
        return torch.stack([on.logits[1][0], own.logits[1][0]])

    calls, prompt = Calls(call), torch.tensor(PROMPTS[:1])
    model.generate(prompt, **OPTIONS, logits_processor=[calls])
    for ids, got in calls.seen:
        expected = []
        for text, length in ((ids, prompt.shape[1]), (other, other.shape[1])):
            token = unmasked(alone, text, length).argmax(-1, keepdim=True)
            expected.append(unmasked(alone, torch.cat([text, token], 1), length)[0])
        close(got, torch.stack(expected))


@pytest.mark.parametrize("rule", RELATIVE)
def test_a_loop_of_ones_own_is_a_generation_too(rule: str):
    """As `custom_generate` takes one: with the model's preparation of inputs, and without."""
    model, alone = edited(rule=rule), edited(rule=rule)

    def prepared(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(NEW):
            inputs = model.prepare_inputs_for_generation(input_ids, use_cache=False)
            input_ids = torch.cat([input_ids, model(**inputs).logits[:, -1].argmax(-1, keepdim=True)], 1)
        return input_ids

    def plain(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache, fed = DynamicCache(config=model.config), input_ids
        for _ in range(NEW):
            fed = model(fed, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, fed], 1)
        return input_ids

    ids = torch.tensor(PROMPTS[:1])
    expected = ids
    for _ in range(NEW):
        token = unmasked(alone, expected, ids.shape[1]).argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], 1)
    for loop in (prepared, plain):
        out = model.generate(ids, custom_generate=loop, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, expected)

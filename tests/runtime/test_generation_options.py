"""What people ask of `generate` besides: caches of every kind, chats that go on, streamers, packed batches.

Every text is recomputed whole by a second model with the same weights, told where the prompt ends; or it is an error.
"""

from typing import Any

import pytest
import torch
import transformers as tf
from support import oracle
from support.generation import PROMPTS, close, edited, padded, told
from support.models import WIDTH, tiny_bart, tiny_gemma3, tiny_llama, tiny_t5
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import reftheads as rh

NEW = 5
OPTIONS = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
RULES = ["l1", "f2+l2", "all", "generated"]


def recomputed(model: Any, out: Any, mask: Tensor, prompt: int) -> None:
    """Every step's logits are those of the whole text before it, whose first columns are the prompt."""
    steps = len(out.logits)
    text = out.sequences
    full = torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - mask.shape[1])], 1)
    for i, logits in enumerate(out.logits):
        end = text.shape[1] - steps + i
        close(logits, told(model, text[:, :end], full[:, :end], prompt))


# --- caches ------------------------------------------------------------------------------------------------

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {"cache_implementation": "dynamic"},
    "offloaded": {"cache_implementation": "offloaded"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "compiled": {
        "cache_implementation": "static",
        "compile_config": tf.CompileConfig(backend="eager", fullgraph=False),
    },
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", ["f2+l2", "generated"])
def test_every_kind_of_cache_gives_what_recomputation_gives(rule: str, cache: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    batch = padded(PROMPTS)
    if cache == "compiled":
        CACHES[cache]["compile_config"]._compile_all_devices = True
    try:
        out = model.generate(**batch, **OPTIONS, **CACHES[cache])
    except (RuntimeError, AssertionError, ValueError) as error:  # some need an accelerator
        assert "offloaded" in cache and ("accelerator" in str(error) or "CUDA" in str(error) or "device" in str(error))
        pytest.skip(str(error))
    recomputed(alone, out, batch["attention_mask"], batch["input_ids"].shape[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_window_that_slides_past_the_prompt_keeps_its_edits(rule: str):
    models = []
    for _ in range(2):
        base = tiny_gemma3(initializer_range=0.3).double()
        base.generation_config.eos_token_id = None
        torch.manual_seed(3)
        steer = rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 3), 0, positions=rule)
        models.append(rh.InterventionModel(base, rh.InterventionGraph(steer)).double().eval())
    batch = padded(PROMPTS)
    for options in ({}, {"prefill_chunk_size": 3}, {"use_cache": False}):
        out = models[0].generate(**batch, **OPTIONS | {"max_new_tokens": 8}, **options)
        recomputed(models[1], out, batch["attention_mask"], batch["input_ids"].shape[1])


# --- a cache that is handed in -------------------------------------------------------------------------------


def turns(rule: str) -> tuple[Any, Any, Any, Tensor]:
    """A chat's first answer, then a second question; what is generated goes on with the cache of the first."""
    model, alone = edited(rule=rule), edited(rule=rule)
    first = model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS)
    text = torch.cat([first.sequences, torch.tensor([[40, 41, 42]])], 1)
    return model, alone, first.past_key_values, text


@pytest.mark.parametrize("only_new", [False, True], ids=["the whole text", "new tokens alone"])
@pytest.mark.parametrize("rule", ["all", "f2", "f1"])
def test_a_chat_goes_on_with_the_cache_where_a_rule_means_the_same_tokens_of_it(rule: str, only_new: bool):
    model, alone, cache, text = turns(rule)
    mask, given = torch.ones_like(text), text
    if only_new:
        given = text[:, cache.get_seq_length() :]
    out = model.generate(given, attention_mask=mask, past_key_values=cache, **OPTIONS)
    out.sequences = torch.cat([text, out.sequences[:, given.shape[1] :]], 1)
    recomputed(alone, out, mask, text.shape[1])


@pytest.mark.parametrize("rule", ["l1", "f2+l2", "generated", "prompt", "-1"])
def test_a_cache_with_edits_that_the_next_prompt_does_not_have_is_refused(rule: str):
    model, alone, cache, text = turns(rule)
    with pytest.raises(ValueError, match="act on other tokens of the cache .* leave past_key_values out"):
        model.generate(text, past_key_values=cache, **OPTIONS)
    out = model.generate(text, **OPTIONS)  # the way out
    recomputed(alone, out, torch.ones_like(text), text.shape[1])
    prompt_mask = torch.ones_like(text)
    prompt_mask[:, len(PROMPTS[0]) :] = 0  # the first prompt, still
    out = turns(rule)[0].generate(text, past_key_values=turns(rule)[2], prompt_mask=prompt_mask, **OPTIONS)
    recomputed(alone, out, torch.ones_like(text), len(PROMPTS[0]))


def test_a_cache_of_the_base_model_or_of_another_adapter_is_refused_where_nodes_act_on_it():
    text = torch.tensor([PROMPTS[0] + PROMPTS[3]])
    for fill in ("base", "disabled", "other"):
        for rule in ("f1", "l1"):
            model, alone = edited(rule=rule), edited(rule=rule)
            model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Ablate(), 1, positions="f2")))
            cache, begun = DynamicCache(config=model.config), text[:, :4]
            if fill == "other":
                model.set_adapter("other")
                model(begun, past_key_values=cache)
                model.set_adapter("default")
            else:
                with model.disable_adapter():
                    (model if fill == "disabled" else model.get_base_model())(begun, past_key_values=cache)
            if rule == "l1" and fill != "other":  # what is in the cache is left alone
                out = model.generate(text, past_key_values=cache, **OPTIONS)
                recomputed(alone, out, torch.ones_like(text), text.shape[1])
                continue
            with pytest.raises(ValueError, match="would act on other tokens of the cache than when it was filled"):
                model.generate(text, past_key_values=cache, **OPTIONS)


def test_a_cache_with_edits_is_refused_where_the_adapter_is_switched_off():
    model, _, cache, text = turns("all")
    with model.disable_adapter(), pytest.raises(ValueError, match="would act on other tokens of the cache"):
        model.generate(text, past_key_values=cache, **OPTIONS)


def test_gates_of_a_cache_are_those_of_its_prompt():
    model = edited(rule="f1", gated=True)
    first = model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS)
    text = torch.cat([first.sequences, torch.tensor([[40, 41, 42]])], 1)
    with pytest.raises(ValueError, match="would act on other tokens of the cache"):
        model.generate(text, past_key_values=first.past_key_values, **OPTIONS)


# --- how it is called ------------------------------------------------------------------------------------------


class Heard(tf.generation.BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_hears_the_edited_text():
    model, alone, heard = edited(), edited(), Heard()
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids, streamer=heard, **OPTIONS)
    assert heard.tokens == [*out.sequences[0].tolist(), -1]
    recomputed(alone, out, torch.ones_like(ids), ids.shape[1])


def test_options_may_be_given_by_position_and_by_a_configuration():
    base = tiny_llama(initializer_range=0.3)
    base.generation_config.eos_token_id = None
    model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.Collect(), 0, name="seen"))).eval()
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    out = model.generate(torch.tensor([PROMPTS[0]]), config, return_heads=True)
    assert out.collected["seen"].shape == (1, len(PROMPTS[0]) + 3, WIDTH) and config.return_dict_in_generate is not True


@pytest.mark.parametrize("rule", RULES)
def test_an_exit_before_the_last_block_drafts_the_same_text(rule: str):
    model, alone = edited(rule=rule), edited(rule=rule)
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids, assistant_early_exit=2, **OPTIONS)
    out.logits = out.logits[:NEW]
    recomputed(alone, out, torch.ones_like(ids), ids.shape[1])


# --- packed batches ----------------------------------------------------------------------------------------------


def packable(rule: str) -> rh.InterventionModel:
    base = tiny_llama(initializer_range=0.3, attn_implementation="sdpa")
    base.generation_config.update(eos_token_id=-1, max_new_tokens=4, do_sample=False)
    torch.manual_seed(0)
    steer = rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 2), 0, positions=rule, name="steer")
    return rh.InterventionModel(base, rh.InterventionGraph(steer)).eval()


@pytest.mark.slow
def test_continuous_batching_edits_every_token_of_its_packed_rows():
    model = packable("all")
    small = tf.ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)  # else it takes free memory
    out = model.generate_batch(PROMPTS[:3], continuous_batching_config=small)
    for i, prompt in enumerate(PROMPTS[:3]):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        assert out[f"req_{i}"].generated_tokens == expected.tolist()


@pytest.mark.parametrize("rule", ["l1", "f1", "prompt", "generated"])
def test_continuous_batching_is_refused_where_a_rule_asks_for_the_prompt(rule: str):
    model = packable(rule)
    with pytest.raises(ValueError, match="continuous batching packs prompts and tokens of several"):
        model.generate_batch(PROMPTS)
    with pytest.raises(ValueError, match="continuous batching packs prompts"):
        model.generate(torch.tensor(PROMPTS[:1]), cache_implementation="paged")
    with pytest.raises(ValueError, match="continuous batching packs prompts"):
        model.init_continuous_batching()


def test_continuous_batching_is_refused_where_its_thread_would_not_see_the_block():
    model = packable("all")
    with model.disable_adapter(), pytest.raises(ValueError, match="runs in a thread of its own, where disable_adapter"):
        model.generate_batch(PROMPTS)
    with pytest.raises(ValueError, match="generate_batch knows no adapter_names"):
        model.generate_batch(PROMPTS, adapter_names=["default"] * 4)
    for option in ({"prompt_mask": torch.ones(1, 7)}, {"return_heads": True}):
        with pytest.raises(ValueError, match="packs rows"):
            model.generate(torch.tensor(PROMPTS[:1]), cache_implementation="paged", **option)


# --- a decoder behind an encoder ----------------------------------------------------------------------------------


def seq2seq(name: str, rule: str) -> Any:
    base: Any = {"t5": lambda: tiny_t5(initializer_factor=2.0), "bart": lambda: tiny_bart(init_std=0.3)}[
        name
    ]().double()
    base.generation_config.eos_token_id = None
    torch.manual_seed(3)
    nodes = [
        rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 2), 0, positions=rule, stack="decoder", name="decoder"),
        rh.Node(rh.Steering(vector=torch.randn(WIDTH) * 2), 0, positions="l1", stack="encoder", name="encoder"),
    ]
    return rh.InterventionModel(base, rh.InterventionGraph(*nodes)).double().eval()


START = {"t5": 0, "bart": 2}
BEGUN = {
    "none": None,
    "with the start": [[True, 30, 31], [True, 32, 33]],
    "without the start": [[30, 31], [32, 33]],
}


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("rule", ["l1", "all", "f1+l1", "generated"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_that_begins_with_some_tokens_has_them_for_its_prompt(name: str, rule: str, begun: str, way: dict):
    model, batch = seq2seq(name, rule), padded(PROMPTS[:2])
    given = BEGUN[begun]
    rows = [[START[name] if token is True else token for token in row] for row in given or [[True], [True]]]
    options = {} if given is None else {"decoder_input_ids": torch.tensor(rows)}
    out = model.generate(**batch, **OPTIONS, **options, **way)
    prompt = len(rows[0]) + (begun == "without the start")
    assert out.sequences[0, prompt:].numel() == NEW and out.sequences[0, 0] == START[name]
    if "num_beams" in way:
        for i in range(2):
            own = {name: t[i : i + 1] for name, t in options.items()}
            one = model.generate(torch.tensor([PROMPTS[i]]), **OPTIONS, **way, **own)
            assert torch.equal(out.sequences[i], one.sequences[0])
        return
    labels = out.sequences
    for i in range(NEW):
        end = prompt + i
        text = labels[:, :end]
        expected = by_hand(name, rule, batch, text, prompt)
        close(out.logits[i], expected)


def by_hand(name: str, rule: str, batch: dict[str, Tensor], text: Tensor, prompt: int) -> Tensor:
    """The last logits, with edits at columns by hooks of a plain model."""
    model = seq2seq(name, rule)
    vectors = {one: model.node(one).v.detach().clone() for one in ("decoder", "encoder")}
    base = model.unload()
    paths = {"t5": ("encoder.block.0", "decoder.block.0"), "bart": ("model.encoder.layers.0", "model.decoder.layers.0")}
    columns = oracle.columns(rule, prompt, text.shape[1])

    def at(vector: Tensor, chosen: list[int]) -> Any:
        def after(module: Any, args: Any, output: Any) -> Any:
            h = (output if isinstance(output, Tensor) else output[0]).clone()
            h[:, chosen] += vector
            return h if isinstance(output, Tensor) else (h, *output[1:])

        return after

    last = [batch["input_ids"].shape[1] - 1]  # padded at the left
    handles = [
        base.get_submodule(paths[name][0]).register_forward_hook(at(vectors["encoder"], last)),
        base.get_submodule(paths[name][1]).register_forward_hook(at(vectors["decoder"], columns)),
    ]
    with torch.no_grad():
        logits = base(**batch, decoder_input_ids=text, use_cache=False).logits[:, -1].float()
    for handle in handles:
        handle.remove()
    return logits

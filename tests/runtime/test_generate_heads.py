"""What heads predict of generated text, against a row alone without padding or cache; edits at columns in lists."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support import oracle
from support.idle import idle
from support.models import VOCAB, WIDTH, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, TextGenerationPipeline

import reftheads as rh

MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma3": tiny_gemma3}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]
NEW = 5


class Case:
    """A model with a LoReFT at `f2+l2` of block 0, LoRA in block 1, and heads on its last and its middle block."""

    def __init__(self, name: str = "llama", *more: rh.Node):
        base = MODELS[name](initializer_range=0.3).double()
        base.generation_config.eos_token_id = None
        graph = rh.InterventionGraph(
            rh.Node(rh.LoReFT(rank=4), 0, positions="f2+l2", name="edit"),
            rh.Node(rh.LoRA(2, alpha=4), 1, "query_output", name="lora"),
            rh.Node(rh.LinearHead(2, dtype="float64"), -1, name="value"),
            rh.Node(rh.LinearHead(1, dtype="float64"), 1, positions="generated", name="new"),
            rh.Node(rh.MLPHead(3, hidden=4, dtype="float64"), 1, positions="l1", name="last"),
            rh.Node(rh.LinearHead(1, dtype="float64", pool="mean"), 0, name="mean"),
            *more,
        )
        self.model = rh.InterventionModel(base, graph).double().eval()
        self.base = base
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape))

    def generate(self, prompts: list[list[int]] | None = None, model: Any = None, **options) -> Any:
        batch = oracle.pad(PROMPTS if prompts is None else prompts, "left")
        del batch["position_ids"]
        torch.manual_seed(0)
        fixed = dict(max_new_tokens=NEW, do_sample=False, return_heads=True)
        return (self.model if model is None else model).generate(**{**batch, **fixed, **options})

    def alone(self, ids: list[int], prompt: int) -> Any:
        """The predictions of one row by itself, from a plain call."""
        mask = torch.arange(len(ids))[None] < prompt
        with torch.no_grad():
            return self.model(torch.tensor([ids]), prompt_mask=mask, use_cache=False)

    def check(self, out: Any, prompts: list[list[int]] | None = None, times: int = 1, ends: list[int] | None = None):
        """Of every row alone, up to where it `ends` (after so many new tokens), the predictions are those of `out`."""
        prompts = PROMPTS if prompts is None else prompts
        width = max(map(len, prompts))
        assert len(out.sequences) == len(prompts) * times
        for i, sequence in enumerate(out.sequences.tolist()):
            prompt = prompts[i // times]
            new = sequence[width:][: None if ends is None else ends[i]]
            real = torch.zeros(len(sequence), dtype=torch.bool)
            real[width - len(prompt) : width + len(new)] = True
            alone = self.alone([*prompt, *new], len(prompt)).predictions
            assert torch.equal(out.selected["value"][i], real)
            assert torch.equal(out.selected["new"][i], real & (torch.arange(len(sequence)) >= width))
            close(out.predictions["value"][i][real], alone["value"][0])
            close(out.predictions["new"][i][width : width + len(new)], alone["new"][0][len(prompt) :])
            close(out.predictions["last"][i], alone["last"][0])
            close(out.predictions["mean"][i], alone["mean"][0])
            assert not out.predictions["value"][i][~real].any()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, 1),
    "sampled": ({"do_sample": True, "top_k": 0, "num_return_sequences": 3}, 3),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, 2),
    "chunks": ({"prefill_chunk_size": 2}, 1),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, 1),
    "no cache": ({"use_cache": False}, 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_every_token_has_the_value_that_it_has_in_its_row_alone(name: str, way: str):
    options, times = WAYS[way]
    this = Case(name)
    this.check(this.generate(**options), times=times)


@pytest.mark.parametrize("way", WAYS)
def test_asking_for_heads_changes_nothing_of_what_is_generated(way: str):
    options, _ = WAYS[way]
    this = Case()
    plain = this.generate(return_heads=False, **options)
    assert torch.equal(this.generate(**options).sequences, plain)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_makes_no_difference(how: str):
    this = Case()
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    assistant = copy.deepcopy(this.base)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": assistant}
    out = this.generate([prompt], **options)
    assert torch.equal(out.sequences, this.generate([prompt]).sequences)
    this.check(out, [prompt])


def test_the_values_are_the_written_out_map_of_the_hidden_states():
    this = Case()
    node, seen = this.model.node("value"), {}
    w, b = node.W.detach(), node.b.detach()
    left, right = (this.model.node("lora").get_parameter(letter).detach() for letter in "AB")

    def query(module, args, output):
        return output + 2 * args[0] @ left.T @ right.T

    def last(h: Tensor, prompt: int) -> Tensor:
        seen["h"] = h
        return h

    changes = [
        ("model.layers.0", oracle.at("f2+l2", oracle.loreft(this.model.node("edit")))),
        ("model.layers.2", last),
    ]
    plain = tiny_llama(initializer_range=0.3).double()
    plain.get_submodule("model.layers.1.self_attn.q_proj").register_forward_hook(query)
    out = this.generate(PROMPTS[:1])
    oracle.logits(plain, changes, out.sequences[0].tolist(), len(PROMPTS[0]))
    close(out.predictions["value"][0], seen["h"] @ w.T + b)


def test_feeding_the_tokens_one_by_one_gives_the_same_values():
    this = Case()
    out = this.generate(PROMPTS[:1])
    ids, prompt = out.sequences, len(PROMPTS[0])
    cache, mask = DynamicCache(config=this.base.config), torch.arange(ids.shape[1])[None] < prompt
    with torch.no_grad():
        for t in range(ids.shape[1]):
            step = this.model(ids[:, t : t + 1], prompt_mask=mask, past_key_values=cache, use_cache=True)
            close(step.predictions["value"][0, 0], out.predictions["value"][0, t])


def test_values_are_those_of_a_call_on_what_was_generated():
    this = Case("llama", rh.Node(rh.LinearHead(1, dtype="float64"), 1, positions="f2+l2", name="few"))
    out = this.generate()
    mask = torch.cat([oracle.pad(PROMPTS, "left")["attention_mask"], torch.ones(len(PROMPTS), NEW).long()], 1)
    prompt_mask = mask * (torch.arange(mask.shape[1]) < mask.shape[1] - NEW)
    with torch.no_grad():
        again = this.model(
            input_ids=out.sequences,
            attention_mask=mask,
            prompt_mask=prompt_mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    assert out.predictions.keys() == again.predictions.keys() == {"value", "new", "last", "mean", "few"}
    assert out.selected.keys() == again.selected.keys()
    for name, value in again.predictions.items():
        close(out.predictions[name], value)
        assert torch.equal(out.selected[name], again.selected[name])


# --- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, "eos"])
def test_what_follows_the_end_of_a_row_is_not_selected(pad: int | str):
    this = Case()
    free = this.generate(return_heads=False)[:, -NEW:].tolist()
    eos = free[0][1]
    ends = [row.index(eos) + 1 if eos in row else NEW for row in free]
    assert ends[0] == 2 and max(ends) > 2
    out = this.generate(eos_token_id=[eos, VOCAB], pad_token_id=eos if pad == "eos" else pad)
    this.check(out, ends=ends)


def test_the_end_may_stand_in_a_generation_config(caplog):
    this = Case()
    free = this.generate(return_heads=False)[:, -NEW:].tolist()
    eos = free[0][1]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0)
    batch = oracle.pad(PROMPTS, "left")
    del batch["position_ids"]
    out = this.model.generate(**batch, generation_config=config, return_heads=True)
    this.check(out, ends=[row.index(eos) + 1 if eos in row else NEW for row in free])
    assert not config.return_dict_in_generate
    assert "deprecated" not in caplog.text  # as options beside a configuration are


def test_an_end_within_the_prompt_ends_nothing():
    this = Case()
    this.check(this.generate(eos_token_id=6, suppress_tokens=[6]))


def test_rows_that_a_criterion_has_stopped_end_there():
    this = Case()

    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.arange(len(input_ids)) == 0

    out = this.generate(eos_token_id=2, pad_token_id=0, suppress_tokens=[2], stopping_criteria=[FirstRow()])
    this.check(out, ends=[1, NEW, NEW, NEW])


# --- doors ------------------------------------------------------------------------------------------------


def test_every_door_gives_the_same():
    this = Case()
    expected = this.generate()
    config = rh.InterventionConfig(graph=this.model.plan().graph, task_type="CAUSAL_LM")
    plain = get_peft_model(tiny_llama(initializer_range=0.3).double(), config).double().eval()
    plain.load_state_dict(this.model.state_dict())
    plain.generation_config.eos_token_id = None
    for model in (this.base, plain, plain.base_model.model):
        out = this.generate(model=model)
        assert torch.equal(out.sequences, expected.sequences)
        for name, value in expected.predictions.items():
            close(out.predictions[name], value)
    assert not isinstance(plain, rh.InterventionModel)


def test_a_pipeline_hands_the_word_through(tokenizer):
    base = tiny_llama(vocab_size=len(tokenizer), eos_token_id=1)
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(1), -1, name="value"))
    model = rh.InterventionModel(base, graph).eval()
    seen: list[Any] = []

    class Pipeline(TextGenerationPipeline):
        def _forward(self, model_inputs, **generate_kwargs):
            seen.append(self.model.generate(input_ids=model_inputs["input_ids"], **generate_kwargs))
            return super()._forward(model_inputs, **generate_kwargs)

    pipe = Pipeline(model=model, tokenizer=tokenizer)
    text = pipe("a b c", max_new_tokens=3, min_new_tokens=3, do_sample=False, return_heads=True)
    assert text[0]["generated_text"].startswith("a b c")
    assert seen[0].predictions["value"].shape == (1, 6, 1)


def test_reusing_makes_no_difference():
    this = Case()
    expected = this.generate()
    with this.model.reusing(rh.ActivationStore()):
        for _ in range(2):
            out = this.generate()
            assert torch.equal(out.sequences, expected.sequences)
            for name, value in expected.predictions.items():
                close(out.predictions[name], value)


def test_the_pass_over_the_sequences_ends_with_the_deepest_head():
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(rh.Node(rh.LinearHead(1), 1, name="value"))).eval()
    passed: list[str] = []
    base: Any = model.get_base_model()
    for name in ("model.layers.0", "model.layers.1", "model.layers.2", "lm_head"):
        base.get_submodule(name).register_forward_hook(lambda *args, name=name: passed.append(name))
    ids = torch.tensor([PROMPTS[0]])
    model.generate(ids, max_new_tokens=3, min_new_tokens=3)
    alone, passed[:] = list(passed), []
    model.generate(ids, max_new_tokens=3, min_new_tokens=3, return_heads=True)
    assert passed == [*alone, "model.layers.0", "model.layers.1"]


def test_heads_that_read_what_enters_a_module_end_the_pass_before_it():
    node = rh.Node(rh.LinearHead(1, dtype="float64"), 1, "head_output", head=1, name="head")
    this = Case("llama", node)
    out = this.generate()
    ids, prompt = out.sequences[0].tolist(), len(PROMPTS[0])
    close(out.predictions["head"][0], this.alone(ids, prompt).predictions["head"][0])


def test_each_row_has_the_values_of_its_adapter():
    this = Case()
    other = rh.InterventionGraph(rh.Node(rh.LinearHead(2, dtype="float64"), 0, name="value"))
    this.model.add_adapter("other", other)
    this.model.double()
    names = ["other", "default", "__base__", "other"]
    out = this.generate(adapter_names=names, num_return_sequences=2, do_sample=True)
    assert out.predictions.keys() == {"default/value", "other/value", "new", "last", "mean"}
    for i, sequence in enumerate(out.sequences.tolist()):
        prompt, name = PROMPTS[i // 2], names[i // 2]
        start = len(sequence) - NEW - len(prompt)
        for adapter in ("default", "other"):
            real = torch.arange(len(sequence)) >= start
            expected = real if adapter == name else torch.zeros_like(real)
            assert torch.equal(out.selected[f"{adapter}/value"][i], expected)
        if name != "__base__":
            mask = torch.arange(len(sequence) - start)[None] < len(prompt)
            with torch.no_grad():
                ids = torch.tensor([sequence[start:]])
                alone = this.model(ids, prompt_mask=mask, adapter_names=[name]).predictions["value"][0]
            close(out.predictions[f"{name}/value"][i, start:], alone)


# --- what else was asked for ------------------------------------------------------------------------------


def test_log_probabilities_stand_beside_the_values():
    this = Case()
    out = this.generate(output_scores=True, output_logits=True, output_hidden_states=True)
    scores = this.base.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (len(PROMPTS), NEW) and len(out.hidden_states) == NEW
    for i, sequence in enumerate(out.sequences.tolist()):
        prompt, new = PROMPTS[i], sequence[-NEW:]
        logits = this.alone([*prompt, *new], len(prompt)).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1][range(NEW), new]
        torch.testing.assert_close(scores[i].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out["sequences"], out[0]) and {"predictions", "selected"} <= out.keys()


def test_collected_activations_come_along():
    out = Case("llama", rh.Node(rh.Collect(), 0, name="h")).generate()
    assert out.collected["h"].shape == (*out.sequences.shape, WIDTH)


def test_a_prompt_mask_says_which_part_of_the_input_is_the_prompt():
    this = Case()
    begun = [*PROMPTS[0], 30, 31]
    mask = torch.arange(len(begun))[None] < len(PROMPTS[0])
    out = this.generate([begun], prompt_mask=mask)
    alone = this.alone(out.sequences[0].tolist(), len(PROMPTS[0])).predictions
    close(out.predictions["value"][0], alone["value"][0])
    close(out.predictions["new"][0], alone["new"][0])
    assert out.selected["new"][0].sum() == NEW + 2


def test_generation_from_nothing_has_the_first_token_as_its_prompt():
    this = Case()
    out = this.model.generate(max_new_tokens=NEW, do_sample=True, num_return_sequences=2, return_heads=True)
    this.check(out, [[1]], times=2)


def test_training_mode_makes_no_difference():
    this = Case()
    this.model.train()
    out = this.generate()
    assert this.model.training
    this.model.eval()
    this.check(out)


def test_what_a_generation_knew_is_forgotten_afterwards():
    this = Case()
    this.generate()
    layer = this.model.tuner.layer
    assert idle(layer)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in this.base.modules()]
    this.check(this.generate())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in this.base.modules()]


# --- other nodes that read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gated", [False, True], ids=["collect alone", "a gate between"])
def test_activations_of_a_text_are_collected_without_any_head(way: str, gated: bool):
    options, times = WAYS[way]
    gate = [
        rh.Node(rh.Collect(), 0, "query_output", head=1, positions="l1", name="last"),
        rh.Node(rh.LinearHead(1, dtype="float64"), 0, positions="l1", name="probe"),
        rh.Node(rh.Gated(rh.Steering(vector=torch.randn(WIDTH))), 1, positions="generated", source="probe"),
    ]
    graph = rh.InterventionGraph(rh.Node(rh.Collect(), 1, name="seen"), *gate * gated)
    base = tiny_llama(initializer_range=0.3).double()
    base.generation_config.eos_token_id = None
    model = rh.InterventionModel(base, graph).double().eval()
    batch = oracle.pad(PROMPTS, "left")
    del batch["position_ids"]
    torch.manual_seed(0)
    out = model.generate(**batch, **dict(max_new_tokens=NEW, do_sample=False, return_heads=True) | options)
    assert len(out.sequences) == times * len(PROMPTS)
    width = max(map(len, PROMPTS))
    for i, sequence in enumerate(out.sequences.tolist()):
        prompt = PROMPTS[i // times]
        ids = [*prompt, *sequence[width:]]
        with torch.no_grad():
            alone = model(torch.tensor([ids]), prompt_mask=torch.arange(len(ids))[None] < len(prompt)).collected
        close(out.collected["seen"][i, width - len(prompt) :], alone["seen"][0])
        assert not out.collected["seen"][i, : width - len(prompt)].any()
        if gated:
            close(out.collected["last"][i], alone["last"][0])


# --- bad input --------------------------------------------------------------------------------------------


def test_a_graph_without_readers_is_refused():
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(rh.Node(rh.Steering(), 0))).eval()
    with pytest.raises(ValueError, match="return_heads=True, but no node that reads acts: add one"):
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, return_heads=True)


def test_an_adapter_that_is_switched_off_is_refused():
    this = Case()
    with this.model.disable_adapter(), pytest.raises(ValueError, match="no node that reads acts"):
        this.generate()


def test_an_encoder_is_refused():
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(1), 0, stack="decoder"))
    model = rh.InterventionModel(tiny_t5(), graph).eval()
    with pytest.raises(ValueError, match=r"return_heads=True is for models of one decoder.*decoder_input_ids"):
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, return_heads=True)


def test_embeddings_are_refused():
    this = Case()
    batch = oracle.pad(PROMPTS, "left")
    embeddings = this.base.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="generate was given inputs_embeds too"):
        this.generate(input_ids=None, inputs_embeds=embeddings)

"""Generation against a loop without cache that recomputes each row alone, with the edit at columns in lists."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import oracle
from support.idle import idle
from support.models import WIDTH, tiny_bart, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor
from transformers import DynamicCache, StaticCache

import reftheads as rh

MODELS: dict[str, tuple[Callable[..., Any], str, dict[str, float]]] = {
    "llama": (tiny_llama, "model.layers.{}", {"initializer_range": 0.3}),
    "gpt2": (tiny_gpt2, "transformer.h.{}", {"initializer_range": 0.3}),
    "gemma3": (tiny_gemma3, "model.layers.{}", {"initializer_range": 0.3}),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]
NEW = 6


def close(got: Tensor, expected: Tensor) -> None:
    """Equal as far as the float32 shows in which `generate` keeps logits; the models compute in float64."""
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-6, rtol=1e-6)


@dataclass
class Case:
    """A model under test, and what its rows should give."""

    model: rh.InterventionModel
    expected: Callable[[list[int], int], Tensor]  # ids, length of the prompt -> logits [tokens vocabulary]
    base: Any
    side: str = "left"

    def generate(self, prompts: list[list[int]] | None = None, **options) -> Any:
        batch = oracle.pad(PROMPTS if prompts is None else prompts, self.side)
        del batch["position_ids"]
        fixed = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return self.model.generate(**{**batch, **fixed, **options})

    def check(self, out: Any, prompts: list[list[int]] | None = None, times: int = 1, greedy: bool = True) -> None:
        """The logits of every step are those of the oracle, and a greedy choice takes the largest."""
        prompts = PROMPTS if prompts is None else prompts
        steps = len(out.logits)
        assert steps == NEW and len(out.sequences) == len(prompts) * times
        for i, sequence in enumerate(out.sequences.tolist()):
            prompt, new = prompts[i // times], sequence[-steps:]
            expected = self.expected(prompt + new, len(prompt))[len(prompt) - 1 : -1]
            close(torch.stack([step[i] for step in out.logits]), expected)
            assert not greedy or new == expected.argmax(1).tolist()


def case(name: str = "llama", first: str = "f2+l2", second: str = "generated") -> Case:
    """A strong LoReFT after block 0 at `first`, and a strong steering vector after block 1 at `second`."""
    make, block, options = MODELS[name]
    base = make(**options).double()
    base.generation_config.eos_token_id = None
    torch.manual_seed(3)
    v = torch.randn(WIDTH).double() * 2
    graph = rh.InterventionGraph(
        rh.Node(rh.LoReFT(rank=4), 0, positions=first, name="reft"),
        rh.Node(rh.Steering(vector=v), 1, positions=second, name="steer"),
    )
    model = rh.InterventionModel(copy.deepcopy(base), graph).double().eval()
    with torch.no_grad():
        model.node("reft").b.copy_(torch.randn(4) * 3)
        v = model.node("steer").v.clone()
    changes = [
        (block.format(0), oracle.at(first, oracle.loreft(model.node("reft")))),
        (block.format(1), oracle.at(second, oracle.adding(v))),
    ]
    return Case(model, lambda ids, prompt: oracle.logits(base, changes, ids, prompt), base)


RULES = [("f2+l2", "generated"), ("l1", "all"), ("prompt", "l3")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_rows_of_a_batch_generate_what_each_generates_alone_without_a_cache(name: str, rules: tuple[str, str]):
    this = case(name, *rules)
    this.check(this.generate())


def test_the_edits_of_these_tests_change_what_is_generated():
    for rules in RULES:
        this = case("llama", *rules)
        with this.model.disable_adapter():
            plain = this.generate()
        assert not torch.equal(plain.sequences, this.generate().sequences)
        expected = this.base.generate(input_ids=plain.sequences[:1, : len(PROMPTS[0])], max_new_tokens=NEW)
        assert torch.equal(plain.sequences[:1], expected)


@pytest.mark.parametrize("name", MODELS)
def test_no_cache_makes_no_difference(name: str):
    this = case(name)
    this.check(this.generate(use_cache=False))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_prompt_fed_in_chunks_makes_no_difference(name: str, size: int):
    this = case(name, "f2+l2", "generated")
    this.check(this.generate(prefill_chunk_size=size))


@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("size", [None, 2])
def test_a_static_cache_makes_no_difference(rules: tuple[str, str], size: int | None):
    this = case("llama", *rules)
    this.check(this.generate(cache_implementation="static", disable_compile=True, prefill_chunk_size=size))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("known", [1, 3, 6])
@pytest.mark.parametrize("rules", RULES[:2], ids="-".join)
def test_a_prefilled_cache_continues_the_same_prompt(name: str, known: int, rules: tuple[str, str]):
    this = case(name, *rules)
    batch = oracle.pad(PROMPTS, "left")
    cache = DynamicCache(config=this.base.config)
    with torch.no_grad():
        start = {key: value[:, :known] for key, value in batch.items()}
        this.model(**start, prompt_mask=batch["attention_mask"], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == known
    this.check(this.generate(past_key_values=cache))


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_sampled_sequences_of_a_row_all_get_its_edit(rules: tuple[str, str]):
    this = case("llama", *rules)
    torch.manual_seed(0)
    out = this.generate(do_sample=True, top_k=0, num_return_sequences=3)
    assert len(set(map(tuple, out.sequences.tolist()))) > len(PROMPTS)
    this.check(out, times=3, greedy=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_beams_are_scored_with_the_edit(name: str, options: dict[str, Any]):
    this = case(name)
    out = this.generate(num_beams=3, output_scores=True, **options)
    times = options.get("num_return_sequences", 1)
    assert len(out.sequences) == times * len(PROMPTS)
    for i, (sequence, score) in enumerate(zip(out.sequences.tolist(), out.sequences_scores, strict=True)):
        prompt, new = PROMPTS[i // times], sequence[-NEW:]
        log_p = this.expected(prompt + new, len(prompt)).log_softmax(1)[len(prompt) - 1 : -1]
        expected = log_p[range(NEW), new].sum() / NEW
        close(score, expected)


@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("how", ["assistant", "edited assistant", "lookup"])
def test_assisted_decoding_gives_what_plain_decoding_gives(rules: tuple[str, str], how: str):
    this = case("llama", *rules)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    if how == "lookup":
        options: dict[str, Any] = dict(prompt_lookup_num_tokens=3)
    else:
        assistant = case("llama", *rules).model if how == "edited assistant" else copy.deepcopy(this.base)
        options = dict(assistant_model=assistant)
    out = this.generate([prompt], **options)
    assert torch.equal(out.sequences, this.generate([prompt]).sequences)
    out.logits = out.logits[:NEW]
    this.check(out, [prompt])


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_embeddings_instead_of_ids_make_no_difference(rules: tuple[str, str]):
    this = case("llama", *rules)
    batch = oracle.pad(PROMPTS, "left")
    embeddings = this.base.get_input_embeddings()(batch["input_ids"])
    this.check(this.generate(input_ids=None, inputs_embeds=embeddings))


def test_padding_is_told_from_the_ids_where_no_mask_is_given():
    this = case("llama")
    this.check(this.generate(attention_mask=None))


def test_ids_may_be_given_by_position():
    this = case("llama")
    ids = torch.tensor([PROMPTS[0]])
    out = this.model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
    this.check(out, PROMPTS[:1])


def test_generation_from_nothing_has_the_first_token_as_its_prompt():
    this = case("llama", "l1", "generated")
    out = this.model.generate(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    this.check(out, [[1]])


def test_generation_in_training_mode_knows_its_prompts_too():
    this = case("llama")
    this.model.train()
    this.check(this.generate())


def test_a_prompt_mask_says_which_part_of_the_input_is_the_prompt():
    this = case("llama", "f2+l2", "generated")
    begun = [[*prompt, 30, 31] for prompt in PROMPTS]  # an answer that has begun already
    batch = oracle.pad(begun, "left")
    prompt_mask = batch["attention_mask"].clone()
    prompt_mask[:, -2:] = 0
    out = this.generate(begun, prompt_mask=prompt_mask)
    for i, (prompt, sequence) in enumerate(zip(PROMPTS, out.sequences.tolist(), strict=True)):
        ids = [*prompt, 30, 31, *sequence[-NEW:]]
        expected = this.expected(ids, len(prompt))[-NEW - 1 : -1]
        close(torch.stack([s[i] for s in out.logits]), expected)


def test_a_prompt_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"prompt_mask has shape \(1, 4\), but the input \(4, 7\)"):
        case("llama").generate(prompt_mask=torch.ones(1, 4))


def test_what_one_generation_knew_is_forgotten_by_the_next_pass():
    this = case("llama", "l1", "l2")
    this.generate()
    this.check(this.generate([PROMPTS[3]]), [PROMPTS[3]])
    with torch.no_grad():
        logits = this.model(torch.tensor([PROMPTS[0]])).logits[0]
    close(logits, this.expected(PROMPTS[0], len(PROMPTS[0])))


def test_a_generation_that_fails_leaves_the_model_usable():
    this = case("llama")

    def fail(*args):
        raise RuntimeError("broken on purpose")

    handle = this.model.base_model.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        this.generate()
    handle.remove()
    assert idle(this.model.tuner.layer)
    this.check(this.generate())


def test_a_switched_off_adapter_generates_as_the_base_does():
    this = case("llama")
    batch = oracle.pad(PROMPTS, "left")
    del batch["position_ids"]
    with this.model.disable_adapter():
        assert torch.equal(this.generate().sequences, this.base.generate(**batch, max_new_tokens=NEW, do_sample=False))


# --- several adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}, {"use_cache": False}], ids=str)
def test_every_row_generates_with_the_adapter_that_is_named_for_it(options: dict[str, Any]):
    this = case("llama", "f2+l2", "generated")
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)) * 3
    this.model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Steering(vector=v), 0, positions="l1")))
    this.model.double()
    change = [("model.layers.0", oracle.at("l1", oracle.adding(v.double())))]
    expected = {
        "default": this.expected,
        "other": lambda ids, prompt: oracle.logits(this.base, change, ids, prompt),
        "__base__": lambda ids, prompt: oracle.logits(this.base, [], ids, prompt),
    }
    names = ["other", "default", "__base__", "other"]
    out = this.generate(adapter_names=names, **options)
    out = {"logits": out.logits, "sequences": out.sequences}
    for i, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True)):
        row = type(
            "Row", (), {"logits": [s[i : i + 1] for s in out["logits"]], "sequences": out["sequences"][i : i + 1]}
        )
        Case(this.model, expected[name], this.base).check(row, [prompt])


def test_beams_keep_the_adapter_of_their_row():
    this = case("llama")
    this.model.add_adapter("other", rh.InterventionGraph(rh.Node(rh.Ablate(), 0, positions="l1")))
    names = ["other", "default", "__base__", "default"]
    together = this.generate(adapter_names=names, num_beams=3).sequences[:, -NEW:]
    for row, prompt, name in zip(together, PROMPTS, names, strict=True):
        alone = this.generate([prompt], adapter_names=[name], num_beams=3).sequences[0, -NEW:]
        assert torch.equal(row, alone)


# --- nodes that read --------------------------------------------------------------------------------------


def gated(positions: str, source_positions: str = "l1") -> Case:
    """A probe after block 0 that gates a strong steering vector after block 1."""
    base = tiny_llama(initializer_range=0.3).double()
    base.generation_config.eos_token_id = None
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)) * 3
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=1), 0, positions=source_positions, name="probe"),
        rh.Node(rh.Gated(rh.Steering(vector=v)), 1, positions=positions, source="probe", name="edit"),
    )
    model = rh.InterventionModel(copy.deepcopy(base), graph).double().eval()
    with torch.no_grad():
        model.node("probe").W.copy_(torch.randn(1, WIDTH) * 3)
    w, b = (model.node("probe").get_parameter(name).detach() for name in "Wb")

    def expected(ids: list[int], prompt: int) -> Tensor:
        seen: dict[str, Tensor] = {}

        def probe(h: Tensor, prompt: int) -> Tensor:
            read = oracle.columns(source_positions, prompt, len(h))
            seen["gate"] = torch.sigmoid(h[read] @ w.T + b)
            return h

        changes = [
            ("model.layers.0", probe),
            (
                "model.layers.1",
                lambda h, prompt: oracle.at(positions, lambda h: h + seen["gate"] * v.double())(h, prompt),
            ),
        ]
        return oracle.logits(base, changes, ids, prompt)

    return Case(model, expected, base)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 2}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=str,
)
@pytest.mark.parametrize("rules", [("generated", "l1"), ("l1", "l1"), ("all", "f1")], ids="-".join)
def test_a_gate_stays_as_the_prompt_set_it(options: dict[str, Any], rules: tuple[str, str]):
    this = gated(*rules)
    this.check(this.generate(**options))


def test_a_gate_over_the_whole_prompt_is_set_by_its_last_token():
    this = gated("all", "l1")
    this.check(this.generate())


def test_a_gate_that_hangs_on_a_token_of_a_later_chunk_is_refused():
    with pytest.raises(ValueError, match="node 'edit' at all reads 'probe' at l1, which may lie behind this chunk"):
        gated("all", "l1").generate(prefill_chunk_size=2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rules", [("all", "0"), ("all", "f1"), ("generated", "l1")], ids="-".join)
def test_a_gate_that_hangs_on_a_token_of_an_earlier_chunk_is_refused_outside_of_generate(rules: Any, kind: str):
    model, ids = gated(*rules).model, torch.arange(12).view(2, 6)
    static = StaticCache(config=model.config, max_cache_len=8)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else static
    prompt = torch.arange(6).expand_as(ids) < 3
    inputs = {"prompt_mask": prompt, "past_key_values": cache, "use_cache": True}
    model(ids[:, :3], **inputs)
    with pytest.raises(ValueError, match="'edit' reads 'probe', which has not run in this pass: its tokens lie before"):
        model(ids[:, 3:], **inputs)


def test_a_gate_whose_token_lies_in_the_same_chunk_acts_as_in_the_whole():
    model, ids = gated("l2", "l1").model, torch.arange(12).view(2, 6)
    inputs = {"prompt_mask": torch.ones_like(ids), "past_key_values": DynamicCache(config=model.config)}
    model.base_model.model.model(ids[:, :3], past_key_values=inputs["past_key_values"], use_cache=True)
    torch.testing.assert_close(model(ids[:, 3:], **inputs).logits, model(ids).logits[:, 3:])


def test_every_sampled_sequence_has_the_gate_of_its_row():
    this = gated("generated")
    torch.manual_seed(0)
    this.check(this.generate(do_sample=True, top_k=0, num_return_sequences=3), times=3, greedy=False)


def test_a_gate_whose_token_a_row_does_not_have_stays_closed():
    this = gated("generated", "l1")
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=1), 0, positions="3", name="probe"),
        rh.Node(rh.Gated(rh.Ablate()), 1, positions="generated", source="probe"),
    )
    model = rh.InterventionModel(copy.deepcopy(this.base), graph).double().eval()
    out = Case(model, this.expected, this.base).generate()
    plain = Case(model, lambda ids, prompt: oracle.logits(this.base, [], ids, prompt), this.base)
    for i, prompt in enumerate(PROMPTS):
        row = type("Row", (), {"logits": [s[i : i + 1] for s in out.logits], "sequences": out.sequences[i : i + 1]})
        if len(prompt) < 4:
            plain.check(row, [prompt])
        else:
            with pytest.raises(AssertionError):
                plain.check(row, [prompt])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}, {"use_cache": False}], ids=str)
def test_heads_that_read_along_change_nothing(options: dict[str, Any]):
    this = case("llama")
    graph = this.model.plan().graph + rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=2), -1, positions="l1"),
        rh.Node(rh.LinearHead(outputs=2), -1, positions="generated"),
        rh.Node(rh.Collect(), 0, positions="all"),
    )
    model = rh.InterventionModel(copy.deepcopy(this.base), graph).double().eval()
    for name in ("reft", "steer"):
        model.node(name).load_state_dict(this.model.node(name).state_dict())
    expected = this.generate(**options).sequences
    assert torch.equal(Case(model, this.expected, this.base).generate(**options).sequences, expected)


# --- encoder and decoder ----------------------------------------------------------------------------------


PAIRS: dict[str, tuple[Callable[..., Any], str, str, dict[str, float]]] = {
    "t5": (tiny_t5, "encoder.block.{}", "decoder.block.{}", {"initializer_factor": 2.0}),
    "bart": (tiny_bart, "model.encoder.layers.{}", "model.decoder.layers.{}", {"init_std": 0.3}),
}


def pair(name: str, encoder_rule: str, decoder_rule: str) -> Case:
    """A strong steering vector on either side."""
    make, encoder, decoder, options = PAIRS[name]
    base = make(**options).double()
    base.generation_config.eos_token_id = None
    v, w = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(4)) * 3
    graph = rh.InterventionGraph(
        rh.Node(rh.Steering(vector=v), 1, positions=encoder_rule, stack="encoder"),
        rh.Node(rh.Steering(vector=w), 1, positions=decoder_rule, stack="decoder"),
    )
    model = rh.InterventionModel(copy.deepcopy(base), graph).double().eval()

    def expected(ids: list[int], prompt: int) -> Tensor:
        source, answer = ids[:prompt], [base.config.decoder_start_token_id, *ids[prompt:]]
        changes = [
            (encoder.format(1), lambda h, _: oracle.at(encoder_rule, oracle.adding(v.double()))(h, len(h))),
            (decoder.format(1), lambda h, _: oracle.at(decoder_rule, oracle.adding(w.double()))(h, 1)),
        ]
        logits = oracle.logits(base, changes, source, prompt, decoder_input_ids=torch.tensor([answer]))
        return torch.cat([logits.new_zeros(prompt - 1, logits.shape[1]), logits])

    return Case(model, expected, base, side="right")  # BART counts its positions from the first column


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("rules", [("f2+l2", "generated"), ("l1", "l1"), ("all", "all")], ids="-".join)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_both_sides_of_an_encoder_and_decoder_are_edited(name: str, rules: tuple[str, str], options: dict[str, Any]):
    this = pair(name, *rules)
    torch.manual_seed(0)
    greedy = "do_sample" not in options
    this.check(this.generate(**options), times=1 if greedy else 2, greedy=greedy)


@pytest.mark.parametrize("name", PAIRS)
def test_beams_of_an_encoder_and_decoder_are_scored_with_the_edit(name: str):
    this = pair(name, "f2+l2", "generated")
    out = this.generate(num_beams=3, output_scores=True)
    for prompt, sequence, score in zip(PROMPTS, out.sequences.tolist(), out.sequences_scores, strict=True):
        new = sequence[-NEW:]
        log_p = this.expected(prompt + new, len(prompt)).log_softmax(1)[len(prompt) - 1 : -1]
        close(score, log_p[range(NEW), new].sum() / NEW)


def test_an_encoder_that_has_run_already_makes_no_difference():
    this = pair("t5", "all", "generated")
    batch = oracle.pad(PROMPTS, this.side)
    with torch.no_grad():
        encoded = this.model.get_base_model().get_encoder()(batch["input_ids"], batch["attention_mask"])
    this.check(this.generate(input_ids=None, encoder_outputs=encoded))


def test_a_prompt_mask_of_an_encoder_and_decoder_is_about_the_encoder():
    this = pair("t5", "l1", "generated")
    batch = oracle.pad(PROMPTS, this.side)
    mask = batch["attention_mask"]
    prompt_mask = mask * (mask.cumsum(1) < mask.sum(1, keepdim=True))  # without the last token
    this.check(this.generate(prompt_mask=batch["attention_mask"]))
    out = this.generate(prompt_mask=prompt_mask)
    with torch.no_grad():
        inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], prompt_mask=prompt_mask)
        first = this.model(**inputs, decoder_input_ids=torch.zeros(len(PROMPTS), 1, dtype=torch.long)).logits[:, 0]
    close(out.logits[0], first)
    with pytest.raises(AssertionError):
        this.check(out)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_a_probe_of_the_encoder_gates_an_edit_of_the_decoder(options: dict[str, Any]):
    base = tiny_t5(initializer_factor=2.0).double()
    graph = rh.InterventionGraph(
        rh.Node(rh.LinearHead(outputs=1), 0, positions="l1", stack="encoder", name="probe"),
        rh.Node(rh.Gated(rh.Ablate()), 1, positions="all", stack="decoder", source="probe"),
    )
    model = rh.InterventionModel(base, graph).double().eval()
    model.generation_config.eos_token_id = None
    this = Case(model, lambda *_: torch.empty(0), base)
    torch.manual_seed(0)
    together = this.generate(**options)
    for i, prompt in enumerate(PROMPTS):
        if "do_sample" in options:
            rows = together.sequences[2 * i : 2 * i + 2]
            with torch.no_grad():
                out = model(torch.tensor([prompt] * 2), decoder_input_ids=rows).logits
            expected = torch.stack(together.logits, 1)[2 * i : 2 * i + 2]
            close(out[:, :-1], expected)
        else:
            assert torch.equal(together.sequences[i], this.generate([prompt], **options).sequences[0])

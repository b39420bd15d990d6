"""Few-shot learning: modes, prompts, greedy answers, likelihoods, tasks, scores."""

import json
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from filelock import Timeout
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support.models import randomise, tiny_bart, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5, word_tokenizer
from support.paths import DATA
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import reftheads as rh
import reftheads.fewshot as fs
from reftheads.interop.peft_lora import merged

SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1}


def gpt2(layers: int) -> tf.GPT2LMHeadModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=layers, n_head=2, **SMALL))


def bert(cls=tf.BertForSequenceClassification, **options):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return cls(tf.BertConfig(**shape, vocab_size=40, **options))


HEAD = rh.Node(rh.LinearHead(3, target="label"), layer=-1, positions="f1", name="head")

# --- modes --------------------------------------------------------------------------------------------------


def test_the_modes_select_as_many_tensors_as_the_course_says():
    assert len(fs.parameters_to_fine_tune(bert(tf.BertLMHeadModel, is_decoder=True), "all")) == 42  # bert-tiny
    medium = gpt2(24)  # the depth of gpt2-medium
    for mode in ("first", "middle", "last"):
        assert len(fs.parameters_to_fine_tune(medium, mode)) == 24
    assert len(fs.parameters_to_fine_tune(fs.fine_tuning_model(medium, "lora4:cs330"), "lora4")) == 144


def names(model: torch.nn.Module, mode: str) -> list[str]:
    chosen = set(fs.parameters_to_fine_tune(model, mode))
    return [name for name, p in model.named_parameters() if p in chosen]


@pytest.mark.parametrize(
    "mode, blocks",
    [("first", {0, 1}), ("last", {4, 5}), ("middle", {2, 3}), ("last:3", {3, 4, 5}), ("middle:4", {1, 2, 3, 4})],
)
def test_a_mode_of_blocks_selects_whole_blocks(mode, blocks):
    base = gpt2(6)
    chosen = names(base, mode)
    assert {int(name.split(".")[2]) for name in chosen} == blocks
    assert len(chosen) == 12 * len(blocks)
    assert all(p.requires_grad for p in base.parameters())


def test_blocks_are_found_in_encoders_and_in_both_stacks():
    assert {name.split(".")[3] for name in names(bert(), "last:1")} == {"1"}
    two = names(tiny_bart(), "last:1")
    assert any("encoder" in name for name in two) and any("decoder" in name for name in two)


def test_biases_and_output_layers():
    assert all(name.endswith("bias") for name in names(gpt2(2), "bitfit"))
    assert len(names(gpt2(2), "bitfit")) == 2 * 6 + 1
    assert names(bert(), "head") == ["classifier.weight", "classifier.bias"]
    assert names(tiny_llama(), "head") == ["lm_head.weight"]


@pytest.mark.parametrize("make", [lambda: gpt2(2), bert, tiny_llama], ids=["gpt2", "bert", "llama"])
@pytest.mark.parametrize("mode", ["all", "first:1", "lora2", "lora2:cs330", "loreft2", "probe", "loreft2:all"])
def test_what_a_mode_does_not_train_is_frozen_and_the_head_is_trained_in_all(make, mode):
    model = fs.fine_tuning_model(make(), mode, HEAD)
    chosen = set(fs.parameters_to_fine_tune(model, mode))
    assert {p for p in model.parameters() if p.requires_grad} == chosen
    assert set(model.node("head").parameters()) <= chosen
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "label": torch.tensor([1])}
    for _ in range(2):  # the first moves B of LoRA, the second A
        model(**batch).loss.backward()
        with torch.no_grad():
            for p in chosen:
                p -= 0.1 * p.grad if p.grad is not None else 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= {name for name, p in model.named_parameters() if p in chosen}


def test_lora_begins_at_the_base_exactly_and_its_first_gradient_flows():
    base, ids = gpt2(2).eval(), torch.tensor([[5, 6, 7]])
    expected = base(ids).logits.detach()
    model = fs.fine_tuning_model(base, "lora2:cs330").eval()
    logits = model(ids).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    of = {name: p.grad.abs().sum() for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad > 0 for name, grad in of.items() if name.endswith("B")) and len(of) == 12


@pytest.mark.parametrize(
    "mode, message",
    [
        ("lst", "unknown mode 'lst': use all, first, middle"),
        ("lora", "unknown mode"),
        ("first:9", "'first:9' asks for more blocks than there are, 2"),
        ("head", "tied to its embeddings"),
        ("lora4", "no such nodes. Build the model by"),
        ("probe", "it has no heads"),
    ],
)
def test_modes_that_are_not_known_or_select_nothing_are_errors(mode, message):
    with pytest.raises(ValueError, match=message):
        fs.parameters_to_fine_tune(gpt2(2), mode)


def test_quantised_weights_are_not_trained_and_what_stands_beside_them_is():
    base = tiny_llama()
    projection = base.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    for mode in ("all", "last:2", "middle"):
        with pytest.raises(ValueError, match=f"mode '{mode}' selects quantised weights, which cannot be trained"):
            fs.parameters_to_fine_tune(base, mode)
    assert fs.parameters_to_fine_tune(base, "last:1") == list(base.model.layers[2].parameters())
    model = fs.fine_tuning_model(base, "loreft2", HEAD)
    assert not any(p.requires_grad for p in base.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.node("head").parameters())


def test_blocks_without_attention_get_lora_too_and_biases_count_under_whatever_name():
    base = recurrent_lfm2()
    model = fs.fine_tuning_model(base, "lora2:cs330")
    beside = {str(node.name) for node in model.tuner.layer.plans["default"].graph.nodes}
    assert "lora_model_layers_0_conv_in_proj" in beside and "lora_model_layers_1_self_attn_out_proj" not in beside
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    deberta = tf.DebertaModel(tf.DebertaConfig(**shape, vocab_size=40))
    names = {name for name, p in deberta.named_parameters() if p in set(fs.parameters_to_fine_tune(deberta, "bitfit"))}
    assert names == {name for name, _ in deberta.named_parameters() if name.endswith("bias")} and any(
        name.endswith("q_bias") for name in names
    )


def test_no_biases_are_an_error():
    with pytest.raises(ValueError, match="'bitfit' selects nothing"):
        fs.parameters_to_fine_tune(tiny_llama(), "bitfit")


# --- LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gpt2(2), tiny_llama], ids=["Conv1D", "Linear"])
def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(make):
    model = fs.fine_tuning_model(make(), "lora3:cs330").double().eval()
    randomise(model)
    base, ids = model.get_base_model(), torch.tensor([[5, 6, 7, 8]])
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    expected = model(ids).logits
    with merged(model):
        torch.testing.assert_close(base(ids).logits, expected, atol=1e-10, rtol=0)
        assert not torch.equal(base(ids).logits, model.get_base_model()(ids * 0 + 9).logits)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert torch.equal(model(ids).logits, expected)


def test_merging_that_fails_leaves_the_weights():
    model = fs.fine_tuning_model(gpt2(2), "lora3:cs330")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), merged(model):
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lora_costs_what_the_formula_says():
    model = fs.fine_tuning_model(gpt2(1), "lora2:cs330")
    lines = fs.lora_table(model).columns
    assert fs.lora_ratio(2, 16, 48) == 2 * (16 + 48) / (16 * 48)
    assert list(lines[5].cells)[0] == f"{2 * (16 + 48) / (16 * 48):.2%}"  # c_attn
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert list(lines[4].cells)[-1] == f"{total:,}" and list(lines[6].cells)[-1] == f"{4 * total / 1024:.1f}"
    with pytest.raises(ValueError, match="1 or more"):
        fs.lora_ratio(0, 4, 4)


# --- batches ------------------------------------------------------------------------------------------------


def gpt2_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Of a few words, with the ids that GPT-2 has for them."""
    ids = {
        "Who": 8241, " is": 318, " the": 262, " singer": 14015, " for": 329, " band": 4097, " Queen": 7542, "?": 30,
        " Fred": 30847, "die": 11979, " Mercury": 21673, "What": 2061, " capital": 3139, " of": 286, " France": 4881,
        " Paris": 40313, "<|endoftext|>": 50256,
    }  # fmt: skip
    by_id = {i: word for word, i in ids.items()}
    pieces = [(by_id.get(i, f"<{i}>"), 0.0 if i in by_id else -100.0) for i in range(50257)]
    made = Tokenizer(models.Unigram(pieces, unk_id=50256))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\?"), "isolated")
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def test_batches_are_those_of_the_worked_example():
    questions = ["Who is the singer for the band Queen?", "What is the capital of France?"]
    tokenizer = gpt2_tokenizer()
    rows = rh.encode_pairs(tokenizer, questions, [" Freddie Mercury", " Paris"], add_eos=False)
    batch = rh.Collator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [
        [8241, 318, 262, 14015, 329, 262, 4097, 7542, 30, 30847, 11979, 21673],
        [2061, 318, 262, 3139, 286, 4881, 30, 40313, 50256, 50256, 50256, 50256],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 8 + [0] * 4]
    assert batch["labels"].tolist() == [[-100] * 9 + [30847, 11979, 21673], [-100] * 7 + [40313] + [-100] * 4]


def test_the_shifted_loss_is_that_of_the_model_and_of_two_dimensions_the_plain_one():
    base, ids = tiny_llama().double().eval(), torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 4, -100, -100]])
    out = base(ids, labels=labels)
    torch.testing.assert_close(fs.shifted_cross_entropy(out.logits, labels), out.loss.double(), atol=1e-6, rtol=0)
    right = [bool(out.logits[i, j - 1].argmax() == labels[i, j]) for i, j in ((0, 2), (0, 3), (1, 1))]
    assert fs.masked_accuracy(out.logits, labels) == pytest.approx(sum(right) / 3)
    logits, classes = torch.randn(3, 5), torch.tensor([1, -100, 4])
    torch.testing.assert_close(
        fs.shifted_cross_entropy(logits, classes), F.cross_entropy(logits[[0, 2]], classes[[0, 2]])
    )
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(2,\)"):
        fs.shifted_cross_entropy(logits, classes[:2])
    with pytest.raises(ValueError, match="all targets are -100"):
        fs.masked_accuracy(logits, torch.full((3,), -100))


# --- prompts ------------------------------------------------------------------------------------------------


def test_the_formats_are_those_of_the_course():
    def prompt(form):
        return fs.icl_prompts(["a?", "b?"], ["1", "2"], "c?", form, shuffle=False)

    assert prompt("qa") == "a? In the 1. b? In the 2. c? In the"
    assert prompt("none") == "a? 1 b? 2 c?"
    assert prompt("tldr") == "a? TL;DR: 1 b? TL;DR: 2 c? TL;DR:"
    assert prompt("custom") not in {prompt(form) for form in ("qa", "none", "tldr")}
    assert [turn["content"] for turn in prompt("chat")] == ["a?", "1", "b?", "2", "c?"]
    assert [turn["role"] for turn in prompt("chat")] == ["user", "assistant"] * 2 + ["user"]
    assert prompt(fs.Format("{x}={y}", "{x}=", between=";")) == "a?=1;b?=2;c?="


@given(
    pairs=st.lists(st.tuples(st.text("abc ", max_size=4), st.text("xyz", min_size=1, max_size=3)), max_size=6),
    seed=st.integers(0, 99),
    form=st.sampled_from(["qa", "none", "tldr", "custom", "rating"]),
)
def test_pairs_stay_together_in_one_permutation_that_the_seed_decides(pairs, seed, form):
    inputs, labels = [x for x, _ in pairs], [y for _, y in pairs]
    np.random.seed(seed)
    prompt = fs.icl_prompts(inputs, labels, "?", form)
    np.random.seed(seed)
    order = np.random.permutation(len(pairs))
    kept = [fs.icl_prompts([inputs[i]], [labels[i]], "", form, shuffle=False) for i in order]
    expected = fs.icl_prompts([inputs[i] for i in order], [labels[i] for i in order], "?", form, shuffle=False)
    assert prompt == expected == prompt.rstrip()
    assert all(one.rstrip()[: len(one.rstrip()) // 2] in prompt for one in kept)
    again = fs.icl_prompts(inputs, labels, "?", form, rng=np.random.RandomState(seed))
    assert again == prompt


def test_a_budget_leaves_out_the_first_examples_and_says_how_many(tokenizer):
    options = {"format": "none", "shuffle": False, "tokenizer": tokenizer}
    with pytest.warns(UserWarning, match="left out 2 of 3 examples, so that prompts fit into 4 tokens"):
        assert fs.icl_prompts(["a", "b", "c"], ["x", "y", "z"], "d", budget=4, **options) == "c z d"
    assert fs.icl_prompts(["a"], ["x"], "d", budget=3, **options) == "a x d"
    with pytest.raises(ValueError, match="alone makes a prompt of 3 tokens, over the budget of 2: shorten it"):
        fs.icl_prompts(["a"], ["x"], "d e f", budget=2, **options)
    with pytest.raises(ValueError, match="tokenizer and budget together"):
        fs.icl_prompts(["a"], ["x"], "d", budget=2)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), k=st.integers(0, 6), budget=st.integers(5, 24))
def test_prompts_of_several_tests_show_the_same_examples_as_many_as_fit_before_the_longest(lengths, k, budget):
    tokenizer, tests = word_tokenizer(), [" ".join("t" * n) for n in lengths]
    support, labels = [f"a {letter}" for letter in "bcdefg"[:k]], ["x"] * k
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = fs.icl_prompts(support, labels, tests, "none", shuffle=False, tokenizer=tokenizer, budget=budget)
    room = min(k, (budget - max(lengths)) // 3)
    assert prompts == fs.icl_prompts(support[k - room :], labels[k - room :], tests, "none", shuffle=False)
    assert prompts == [
        fs.icl_prompts(support[k - room :], labels[k - room :], test, "none", shuffle=False) for test in tests
    ]


def test_prompts_that_cannot_be_made_are_errors():
    with pytest.raises(ValueError, match="unknown format 'json': use qa, none, tldr"):
        fs.icl_prompts([], [], "x", "json")
    with pytest.raises(ValueError, match="got 1 inputs, 0 labels"):
        fs.icl_prompts(["a"], [], "x")
    with pytest.raises(ValueError, match="ends in a space"):
        fs.Format("{x} {y}", "{x} ")
    assert fs.icl_prompts([], [], "x", "qa") == "x In the"


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=30), k=st.integers(0, 4), seed=st.integers(0, 9))
def test_k_of_each_class_are_drawn_without_replacement(labels, k, seed):
    counts = Counter(labels)
    if any(k > n for n in counts.values()):
        with pytest.raises(ValueError, match="take a smaller k"):
            fs.k_shot(labels, k, seed=seed)
        return
    chosen = fs.k_shot(labels, k, seed=seed)
    assert len(set(chosen)) == len(chosen) and Counter(labels[i] for i in chosen) == Counter(
        {label: k for label in counts if k}
    )
    assert chosen == fs.k_shot(labels, k, seed=seed)


def test_examples_can_only_be_drawn_where_there_are_some():
    for labels, k in (([], 1), (["a"], -1)):
        with pytest.raises(ValueError, match="k must be 0 or more, and some examples there to draw from"):
            fs.k_shot(labels, k)
    with pytest.raises(ValueError, match="class 'b' has 0 of them: take a smaller k"):
        fs.k_shot(["a"], 1, classes=["a", "b"])
    with pytest.raises(ValueError, match="the label 'c' is none of the classes 'a', 'b'"):
        fs.k_shot(["a", "c"], 1, classes=["a", "b"])


def test_the_order_with_the_largest_entropy_is_found():
    def predict(order):  # the first example decides how sure the model is
        sure = [0.9, 0.6, 0.99][order[0]]
        return torch.tensor([[sure, 1 - sure], [1 - sure, sure] if order[0] else [sure, 1 - sure]])

    rng = np.random.RandomState(0)
    assert fs.order_by_entropy(3, predict, by="local", rng=rng)[0] == 1
    assert fs.order_by_entropy(3, predict, by="global", rng=rng)[0] in (1, 2)  # they predict both labels
    with pytest.raises(ValueError, match="at least one example"):
        fs.order_by_entropy(0, predict)


# --- answers ------------------------------------------------------------------------------------------------

ROWS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 9, 10]]


def windowed_mistral(**options) -> tf.MistralForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 50} | options
    return tf.MistralForCausalLM(tf.MistralConfig(**shape, sliding_window=4))


def static_llama(**options) -> tf.LlamaForCausalLM:
    model = tiny_llama(**options)
    model.generation_config.cache_implementation = "static"
    return model


def recurrent_lfm2(**options) -> tf.Lfm2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 50} | options
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**shape, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma3, windowed_mistral, static_llama, recurrent_lfm2])
@pytest.mark.parametrize("edited", [False, True])
def test_greedy_answers_are_those_of_generate_without_prompt_and_end(make, edited):
    model = make(initializer_range=0.5).eval()
    if edited:
        node = rh.Node(rh.LoReFT(rank=2), 1, positions="l1+generated")
        model = rh.InterventionModel(model, rh.InterventionGraph(node)).eval()
        randomise(model)
    free = [
        model.generate(
            input_ids=torch.tensor([row]), do_sample=False, max_new_tokens=8, eos_token_id=-1, pad_token_id=0
        )
        for row in ROWS
    ]
    free = [ids[0, len(row) :].tolist() for ids, row in zip(free, ROWS, strict=True)]
    assert fs.greedy_sample(model, ROWS, [], 8) == free
    stop = free[0][3]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert fs.greedy_sample(model, ROWS, [stop], 8) == expected
    assert fs.greedy_sample(model, torch.tensor(ROWS[:1]), [stop], 8) == expected[:1]


def test_what_rows_begin_with_is_computed_once():
    model, lengths = tiny_llama().eval(), []
    model.model.layers[0].register_forward_hook(lambda m, args, out: lengths.append(tuple(args[0].shape[:2])))
    begun = [[5] * 20 + row for row in ROWS]
    whole = fs.greedy_sample(model, begun, [], 2)
    assert lengths == [(1, 22), (3, 4), (3, 1)]
    lengths.clear()
    assert fs.greedy_sample(model, begun, [], 2, batch_size=2) == whole
    assert lengths == [(1, 22), (2, 2), (2, 1), (1, 4), (1, 1)]


def test_prompts_over_the_context_are_an_error(tokenizer):
    model = tiny_gpt2(n_positions=8)
    assert len(fs.greedy_sample(model, [[5] * 6], [], 3)[0]) == 3  # the last one is not read
    with pytest.raises(ValueError, match="take 9 tokens, over the model's context of 8: shorten the prompt"):
        fs.greedy_sample(model, [[5] * 6], [], 4)
    with pytest.raises(ValueError, match="take 9 tokens, over the model's context of 8"):
        fs.score_labels(model, tokenizer, ["a b c d e f g"], ["x", "y z"])


def test_rows_that_are_empty_are_an_error():
    for rows, most in (([], 3), ([[5], []], 3), ([[5]], 0)):
        with pytest.raises(ValueError, match="give at least one row, each with a token"):
            fs.greedy_sample(tiny_llama(), rows, [], most)


@pytest.mark.parametrize("make", [tiny_t5, bert])
def test_models_that_are_no_decoders_are_an_error(tokenizer, make):
    with pytest.raises(ValueError, match="this (t5|bert) is none: take another model"):
        fs.greedy_sample(make(), [[5]], [], 1)
    with pytest.raises(ValueError, match="this (t5|bert) is none: take another model"):
        fs.score_labels(make(), tokenizer, ["a"], ["x"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, windowed_mistral, recurrent_lfm2])
@pytest.mark.parametrize("edited", [False, True])
def test_scores_are_the_sums_of_log_probabilities(tokenizer, make, edited):
    model = make(vocab_size=40, initializer_range=0.5).double().eval()
    if edited:
        node = rh.Node(rh.LoReFT(rank=2, dtype="float64"), 1, positions="l1")
        model = rh.InterventionModel(model, rh.InterventionGraph(node)).eval()
        randomise(model)
    prompts, labels = ["a b c", "a b d e"], ["x", "y z", "w"]
    scores = fs.score_labels(model, tokenizer, prompts, labels, batch_size=4)
    means = fs.score_labels(model, tokenizer, prompts, labels, normalise=True)
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            ids, end = (tokenizer(text)["input_ids"] for text in (prompt, label))
            given = {"prompt_mask": torch.tensor([[1] * len(ids) + [0] * len(end)])} if edited else {}
            log_p = model(torch.tensor([ids + end]), **given).logits[0].detach().log_softmax(-1)
            expected = sum(float(log_p[len(ids) - 1 + t, token]) for t, token in enumerate(end))
            assert float(scores[i, j]) == pytest.approx(expected, abs=1e-5)
            assert float(means[i, j]) == pytest.approx(expected / len(end), abs=1e-5)


def test_labels_answer_a_conversation_where_its_template_begins_the_answer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}z{% endif %}"
    )
    model = tiny_llama(vocab_size=40, initializer_range=0.5)
    turns = fs.icl_prompts(["a", "b"], ["x", "y"], "c", "chat", shuffle=False)
    scores = fs.score_labels(model, tokenizer, [turns], ["x", "y"])
    torch.testing.assert_close(scores, fs.score_labels(model, tokenizer, ["a x b y c z"], ["x", "y"]))
    assert fs.score_labels(model, tokenizer, [turns, "a x b y"], ["x", "y"]).shape == (2, 2)


def test_scores_of_prompts_that_are_cut_are_those_of_what_is_left(tokenizer):
    model = tiny_llama(vocab_size=40, initializer_range=0.5)
    cut = fs.score_labels(model, tokenizer, ["a b c d", "e"], ["x", "y z"], max_length=4)
    torch.testing.assert_close(cut, fs.score_labels(model, tokenizer, ["c d", "e"], ["x", "y z"]))
    with pytest.raises(ValueError, match="max_length=2 leaves no room for a prompt before the longest label"):
        fs.score_labels(model, tokenizer, ["a"], ["y z"], max_length=2)


@pytest.mark.parametrize("positions", ["l1", "l1+generated", "f1+l1"])
def test_a_graph_is_seen_in_whatever_model_holds_it(tokenizer, tmp_path, positions):
    model = rh.InterventionModel(
        tiny_llama(vocab_size=40, initializer_range=0.5),
        rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 1, positions=positions)),
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_llama(vocab_size=40, initializer_range=0.5), str(tmp_path))
    assert not isinstance(plain, rh.InterventionModel)
    answers, scores = (
        [f(some) for some in (model, plain, model.get_base_model())]
        for f in (
            lambda some: fs.greedy_sample(some, ROWS, [], 5),
            lambda some: fs.score_labels(some, tokenizer, ["a b", "a b c d"], ["x", "y z"]),
        )
    )
    assert answers[0] == answers[1] == answers[2]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


def test_prompts_or_labels_without_tokens_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"each with a token: got prompts of \[0, 1\] tokens"):
        fs.score_labels(tiny_llama(vocab_size=40), tokenizer, ["", "a"], ["x"])
    with pytest.raises(ValueError, match="takes lists of prompts and labels, got a text"):
        fs.score_labels(tiny_llama(vocab_size=40), tokenizer, "abc", ["x"])
    with pytest.raises(ValueError, match="one label, each with a token: got prompts of"):
        fs.score_labels(tiny_llama(vocab_size=40), tokenizer, ["a"], ["x", ""])


# --- tasks and scores ---------------------------------------------------------------------------------------


def test_tasks_are_read_from_their_own_forms_and_from_tables(tmp_path):
    (tmp_path / "fine.train").write_text("3 good film .\n0 bad film .\n")
    (tmp_path / "fine.test").write_text("4 wonderful .\n")
    task = fs.load_task("rating", str(tmp_path))
    assert task.train == [("good film .", ("good",)), ("bad film .", ("terrible",))] and task.labels == fs.RATINGS

    qa = tmp_path / "qa"
    qa.mkdir()
    story = "1 Mary went home.\n2 Where is Mary? \tmilk,football\t1\n3 Mary left.\n4 Who left? \tMary\t3\n"
    story += "1 New.\n2 What? \tnew\t1\n"
    for split in ("train", "test"):
        (qa / f"qa1_{split}.txt").write_text(story)
    (qa / "latest.txt").write_text("neither of the two")
    examples = fs.load_task("qa", str(qa)).train
    assert examples[0] == ("Mary went home. Where is Mary?", ("milk, football",))  # a list is one answer
    assert [e.input for e in examples[1:]] == ["Mary went home. Mary left. Who left?", "New. What?"]

    pairs = tmp_path / "e2e.txt"
    pairs.write_text("".join(f"name : {i} || {i} is a place .\n" for i in range(20)))
    task = fs.load_task("summary", str(pairs))
    assert (len(task.train), len(task.test)) == (18, 2) and task.test[-1] == ("name : 19", ("19 is a place .",))

    rows = [{"input": "a", "answer": ["b", "c"]}, {"input": "d", "answer": "e"}] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert fs.load_task("qa", str(tmp_path / "rows.jsonl")).train[0] == ("a", ("b", "c"))
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "fine,2\n" * 10)
    assert fs.load_task("rating", str(tmp_path / "rows.csv")).test == [("fine", ("okay",))]
    (tmp_path / "lines.csv").write_text("passage,question,answer\n" + '"Mary\nleft.",Who left?,Mary\n' * 10)
    assert fs.load_task("qa", str(tmp_path / "lines.csv")).train[0] == ("Mary\nleft. Who left?", ("Mary",))
    (tmp_path / "odd.jsonl").write_text('{"input": "a\u2028b", "answer": "c"}\n' * 10)
    assert fs.load_task("qa", str(tmp_path / "odd.jsonl")).test == [("a\u2028b", ("c",))]


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data at {DATA}")
def test_real_data_are_read_whole():
    rating = fs.load_task("rating", str(DATA / "sst5"))
    assert (len(rating.train), len(rating.test)) == (8544, 2210)
    assert {example.answer for example in rating.train} == set(fs.RATINGS)
    assert len(fs.k_shot([example.answer for example in rating.train], 128)) == 5 * 128
    qa = fs.load_task("qa", str(DATA / "babi_qa1"))
    assert (len(qa.train), len(qa.test)) == (10000, 1000)
    places = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert {example.answer for example in qa.test} == places and all("?" in example.input for example in qa.test)
    pairs = fs.load_task("summary", str(DATA / "e2e" / "valid.txt"))
    assert len(pairs.train) + len(pairs.test) == 4672 and pairs.train[0].input.startswith("name : ")
    assert pairs.score([example.answer for example in pairs.test], [e.answers for e in pairs.test]) == 1


def test_tasks_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'math': use rating, qa or summary"):
        fs.load_task("math", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file with 'train' in its name"):
        fs.load_task("qa", str(tmp_path))
    (tmp_path / "x.csv").write_text("text,label\n" + "fine,7\n" * 10)
    with pytest.raises(ValueError, match="the rating '7' is neither 0 to 4 nor one of terrible, bad"):
        fs.load_task("rating", str(tmp_path / "x.csv"))
    (tmp_path / "y.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="a row has no input or no answer under these names, but {'a': '1'"):
        fs.load_task("qa", str(tmp_path / "y.csv"))
    (tmp_path / "z.jsonl").write_text("")
    (tmp_path / "stsa.train").write_text("3 fine\nfine\n")
    with pytest.raises(ValueError, match="the line 'fine' has no ' ' between two parts"):
        fs.load_task("rating", str(tmp_path / "stsa.train"))
    (tmp_path / "broken.jsonl").write_text('{"input": ')
    with pytest.raises(ValueError, match="broken.jsonl is not JSON lines: Expecting value"):
        fs.load_task("qa", str(tmp_path / "broken.jsonl"))
    for answer in (None, []):
        (tmp_path / "none.jsonl").write_text(json.dumps({"input": "a", "answer": answer}))
        with pytest.raises(ValueError, match="a row has no input or no answer under these names, but {'input': 'a'"):
            fs.load_task("qa", str(tmp_path / "none.jsonl"))
    two = tmp_path / "two"
    two.mkdir()
    for file in ("a.train", "b.train", "a.test"):
        (two / file).write_text("3 fine\n")
    with pytest.raises(ValueError, match="has several files for train, a.train, b.train: leave one there"):
        fs.load_task("rating", str(two))
    with pytest.raises(ValueError, match="no examples for train"):
        fs.load_task("qa", str(tmp_path / "z.jsonl"))


def test_tasks_come_from_the_hub_too(monkeypatch):
    rows = {
        "qa": [{"passage": "Mary left.", "question": "Who left?", "answer": "Mary"}],
        "rating": [{"text": "fine", "label": 3, "label_text": "positive"}],
        "summary": [{"document": "A long text.", "summary": "A text.", "id": "1"}],
    }
    expected = {"qa": "Mary left. Who left?", "rating": "fine", "summary": "A long text."}
    for name, some in rows.items():
        made = datasets.DatasetDict({split: datasets.Dataset.from_list(some) for split in ("train", "test")})
        monkeypatch.setattr(datasets, "load_dataset", lambda where, made=made: made)
        task = fs.load_task(name, "owner/name")
        assert task.train == task.test and task.train[0].input == expected[name]
        assert task.train[0].answer == {"qa": "Mary", "rating": "good", "summary": "A text."}[name]
    del made["test"]
    with pytest.raises(ValueError, match="'owner/name' has the splits train, and train and test are needed"):
        fs.load_task("summary", "owner/name")


def test_scores():
    assert fs.accuracy(["a", "b"], ["a", "c"]) == fs.accuracy(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    # as SQuAD's own script has it: punctuation goes without a trace, then articles do
    assert fs.exact_match(["US", "its", "9 m", "An office!"], ["U.S.", "it's", "9 a.m.", "the office"]) == 0.75
    assert fs.exact_match(["The Hallway.", "an office", "x"], ["hallway", ("room", "Office"), "y"]) == pytest.approx(
        2 / 3
    )
    scores = fs.rouge(["the cats sat"], ["the cat sat down"])
    assert scores["rouge1"] == pytest.approx(2 * 1 * 0.75 / 1.75) and scores["rouge2"] == pytest.approx(2 * 2 / 5)
    assert fs.ngram_overlap(["a b a", ""], ["a b c", "d"]) == pytest.approx((2 / 3 + 0) / 2)
    assert fs.ngram_overlap(["a b c"], ["b c d"], n=2) == 0.5
    for metric in (fs.accuracy, fs.exact_match, fs.rouge, fs.ngram_overlap):
        with pytest.raises(ValueError, match="got 0 predictions"):
            metric([], [])
        with pytest.raises(ValueError, match="1 predictions and 2 targets"):
            metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="n must be 1 or more"):
        fs.ngram_overlap(["a"], ["a"], n=0)


def test_training_stops_when_a_logged_metric_is_beyond_its_bound(tokenizer, tmp_path):
    rows = rh.encode_pairs(tokenizer, ["a b"], ["c"])
    args = tf.TrainingArguments(
        str(tmp_path), max_steps=200, learning_rate=0.1, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def train(stop):
        model = rh.InterventionModel(tiny_llama(vocab_size=40), rh.InterventionGraph(rh.Node(rh.LoReFT(rank=2), 1)))
        trainer = rh.InterventionTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[stop])
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = train(fs.StopWhen("loss", below=3.52, patience=2))
    assert len(losses) < 200 and max(losses[-2:]) < 3.52 <= min(losses[:-2])
    with pytest.raises(ValueError, match="'accuracy' is not logged: there are loss"):
        train(fs.StopWhen("accuracy", above=0.5))
    with pytest.raises(ValueError, match="give below or above"):
        fs.StopWhen("loss")


# --- studies ------------------------------------------------------------------------------------------------

CELLS = [
    {"model": "some/path", "mode": mode, "k": k, "seed": seed} for mode in ("a", "b") for k in (1, 8) for seed in (0, 1)
]


def test_a_study_that_stops_goes_on_without_losing_or_repeating_a_cell(tmp_path):
    ran = []

    def measure(model, mode, k, seed):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((mode, k, seed))
        return {"score": k + seed + (mode == "b")}

    study = fs.Study(tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        study.run(CELLS, measure)
    assert len(list((tmp_path / "results").glob("*.json"))) == 3
    ran_before, ran[:] = list(ran), []
    with pytest.raises(KeyboardInterrupt):
        study.run(CELLS, measure)
    results = fs.Study(tmp_path / "results").run(
        CELLS, lambda **cell: {"score": cell["k"] + cell["seed"] + (cell["mode"] == "b")}
    )
    assert not set(ran) & set(ran_before)
    assert [result["score"] for result in results] == [1, 2, 8, 9, 2, 3, 9, 10]
    assert fs.over_seeds(results, ["mode"], "k")["b",][8] == (9.5, pytest.approx(0.5**0.5))
    table = fs.table_of(results, ["model", "mode"], "k")
    assert list(table.columns[0].cells) == ["path", "path"] and list(table.columns[3].cells)[0] == "8.500 ± 0.707"
    fs.plot(results, tmp_path / "plot.png", ["mode"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_a_study_stand_in_its_files_and_others_are_not_mixed_with_them(tmp_path):
    results = fs.Study(tmp_path, steps=30).run(CELLS[:1], lambda **cell: {"score": 1})
    assert results == [{**CELLS[0], "steps": 30, "score": 1}]
    with pytest.raises(ValueError, match="of another run, with {'steps': 30}: take another folder"):
        fs.Study(tmp_path, steps=60).run(CELLS[:1], lambda **cell: {"score": 2})


def test_settings_and_scores_of_a_study_are_read_as_they_were_given(tmp_path):
    study = fs.Study(tmp_path, factors=(0.3, 1))
    found = study.run(CELLS[:2], lambda **cell: {"score": np.float32(0.5), "loss": torch.tensor(2.0)})
    assert found == fs.Study(tmp_path, factors=(0.3, 1)).run(CELLS[:2], lambda **cell: pytest.fail("ran again"))
    assert (found[0]["score"], found[0]["loss"]) == (0.5, 2)
    with pytest.raises(ValueError, match="of another run, with {'steps': None}: take another folder"):
        fs.Study(tmp_path, steps=60).result(CELLS[0])

    def wait(**cell):
        raise Timeout("something else")

    with pytest.raises(Timeout, match="something else"):
        study.run(CELLS[2:], wait)


def test_two_who_run_a_study_at_the_same_time_share_its_cells(tmp_path):
    both = Barrier(2, timeout=60)

    def run(_):
        ran = []

        def measure(**cell):
            if not ran:
                both.wait()  # nobody goes on before both have a cell
            ran.append(cell)
            return {"score": cell["k"]}

        return ran, fs.Study(tmp_path).run(CELLS, measure)

    with ThreadPoolExecutor(2) as pool:
        (first, results), (second, again) = pool.map(run, range(2))
    assert first and second and sorted(map(str, first + second)) == sorted(map(str, CELLS))
    assert results == again and [result["score"] for result in results] == [cell["k"] for cell in CELLS]


def test_files_of_a_study_that_are_damaged_or_of_other_cells_are_errors(tmp_path):
    study = fs.Study(tmp_path)
    study.run([{"model": "a/b", "k": 1}], lambda **cell: {"score": 0})
    with pytest.raises(ValueError, match="is the result of another run, with {'model': 'a/b'}: take another folder"):
        study.result({"model": "a-b", "k": 1})
    study.path({"model": "a/b", "k": 1}).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        study.result({"model": "a/b", "k": 1})
    with pytest.raises(ValueError, match="no results"):
        fs.over_seeds([], ["model"], "k")

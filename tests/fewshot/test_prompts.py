"""Prompts of demonstrations: their forms, their order, what fits into a budget; and their batches."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from support.models import word_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import reftheads as rh
import reftheads.fewshot as fs


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


# --- batches --------------------------------------------------------------------------------------------------


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

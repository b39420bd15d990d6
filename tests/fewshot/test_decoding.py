"""Answers that are generated greedily, and labels that are scored by their likelihood."""

import pytest
import torch
import transformers as tf
from peft import PeftModel
from support.models import randomise, recurrent_lfm2, tiny_bert, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_t5

import reftheads as rh
import reftheads.fewshot as fs

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


@pytest.mark.parametrize("make", [tiny_t5, tiny_bert])
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

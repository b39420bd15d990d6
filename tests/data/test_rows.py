"""Rows and batches: what is learnt, what is padding, and that prompts are those of generation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reftheads as rh
from reftheads.data.rows import complete, prompts_only


def test_labels_are_the_answer_and_its_end_and_nothing_else(tokenizer):
    row = rh.encode_pairs(tokenizer, ["a b c"], ["d e"])[0]
    learnt = [label for label in row["labels"] if label != -100]
    assert learnt == tokenizer("d e", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert row["input_ids"][: sum(row["prompt_mask"])] == tokenizer("a b c")["input_ids"]
    assert [mask == 1 for mask in row["prompt_mask"]] == [label == -100 for label in row["labels"]]


def test_without_add_eos_the_answer_ends_where_it_ends(tokenizer):
    row = rh.encode_pairs(tokenizer, ["a"], ["d e"], add_eos=False)[0]
    assert row["labels"][-1] == tokenizer("e", add_special_tokens=False)["input_ids"][0]


def test_truncation_takes_the_left_of_the_prompt_and_says_how_many_rows(tokenizer):
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        long, short = rh.encode_pairs(tokenizer, ["a b c d e", "a"], ["d e", "d"], max_length=5)
    assert len(long["input_ids"]) == 5
    assert tokenizer.decode(long["input_ids"]) == "d e d e </s>"
    assert tokenizer.decode(short["input_ids"]) == "a d </s>"


def test_an_answer_that_leaves_no_room_for_a_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="answer of 4 tokens leaves no room"):
        rh.encode_pairs(tokenizer, ["a"], ["a b c"], max_length=4)


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [([], [], "no pairs"), (["a"], [], "1 prompts and 0 answers")],
)
def test_pairs_must_be_some_and_complete(tokenizer, prompts, answers, message):
    with pytest.raises(ValueError, match=message):
        rh.encode_pairs(tokenizer, prompts, answers)


def test_an_empty_answer_without_an_end_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="nothing to learn"):
        rh.encode_pairs(tokenizer, ["a"], [""], add_eos=False)


def test_the_prompt_of_a_chat_is_what_generation_is_given(tokenizer):
    tokenizer.chat_template = TEMPLATE
    conversation = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    row = rh.encode_chat(tokenizer, [conversation])[0]
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
    assert row["input_ids"][: sum(row["prompt_mask"])] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(answer) == "c </s>"


def test_a_chat_needs_a_template_and_an_answer(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        rh.encode_chat(tokenizer, [[{"role": "user", "content": "a"}]])
    tokenizer.chat_template = TEMPLATE
    answer = {"role": "assistant", "content": "a"}
    for conversation in ([], [answer], [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match="end with an answer"):
            rh.encode_chat(tokenizer, [conversation])
    with pytest.raises(ValueError, match="no conversations"):
        rh.encode_chat(tokenizer, [])


def made(model, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_answers_go_on_behind_their_prompts_where_every_text_of_its_own_begins_with_a_space():
    words = ["</s>", "<unk>", "▁", "▁a", "▁big", "▁dog", "big", "\n"]
    unigram = models.Unigram([(word, -float(word == "<unk>")) for word in words], unk_id=1)
    tokenizer = made(unigram, pre_tokenizers.Metaspace(prepend_scheme="always"))
    row = rh.encode_pairs(tokenizer, ["a"], [" big dog"], add_eos=False)[0]
    assert row["input_ids"] == tokenizer("a big dog")["input_ids"] and row["labels"][0] == -100
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["▁a", "▁big", "▁dog"]
    glued = rh.encode_pairs(tokenizer, ["a"], ["big"], add_eos=False)[0]
    assert tokenizer.convert_ids_to_tokens(glued["input_ids"]) == ["▁a", "big"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("big")["input_ids"]) == ["▁big"]


def test_prompts_end_where_they_end_in_generation_though_a_tokenizer_would_merge_across():
    vocabulary = {word: i for i, word in enumerate(["</s>", "a", "b", "ab", "\n", "\nb"])}
    tokenizer = made(models.BPE(vocabulary, [("a", "b"), ("\n", "b")]))
    assert tokenizer("ab")["input_ids"] == [3] and tokenizer("\nb")["input_ids"] == [5]
    row = rh.encode_pairs(tokenizer, ["a"], ["b"])[0]
    assert row["input_ids"] == [1, 2, 0] and row["prompt_mask"] == [1, 0, 0] and row["labels"] == [-100, 2, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_attended_learnt_or_prompt(tokenizer, side):
    rows = rh.encode_pairs(tokenizer, ["a b c", "a"], ["d", "e d"])
    rows = [{**row, "label": i, "scores": [0.5] * len(row["input_ids"])} for i, row in enumerate(rows)]
    batch = rh.Collator(tokenizer, padding_side=side, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].shape == (2, 8)
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == row["input_ids"]
        assert batch["labels"][i][real].tolist() == row["labels"]
        assert batch["prompt_mask"][i][real].tolist() == row["prompt_mask"]
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right")
        assert (batch["input_ids"][i][~real] == tokenizer.pad_token_id).all()
        assert (batch["labels"][i][~real] == -100).all() and not batch["prompt_mask"][i][~real].any()
        assert batch["scores"][i][~real].isnan().all()
    assert batch["label"].tolist() == [0, 1]


def test_a_tokenizer_without_pad_token_is_told_what_to_do(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
        rh.Collator(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [True, False])
def test_prompts_only_gives_left_padded_prompts(tokenizer, side, explicit):
    prompts = ["a b c", "a", "d e"]
    rows = rh.encode_pairs(tokenizer, prompts, ["d", "e d", "a b c"])
    batch = rh.Collator(tokenizer, padding_side=side)(rows)
    if not explicit:
        del batch["prompt_mask"]
    got = prompts_only(batch, tokenizer.pad_token_id)
    want = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.equal(got["attention_mask"], want["attention_mask"])


def test_rows_without_masks_get_one_and_token_types_are_padded_with_a_valid_one(tokenizer):
    rows = [{"input_ids": [3, 4, 5], "token_type_ids": [0, 0, 1]}, {"input_ids": [3], "token_type_ids": [0]}]
    batch = rh.Collator(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]


# --- several tasks, pairs ----------------------------------------------------------------------------------


def test_targets_that_some_rows_lack_are_missing_and_not_zero(tokenizer):
    rows = [
        {"input_ids": [3, 4], "grade": 2, "score": None, "tags": [0, 1], "pair": [0.5, 1.0, 2.0]},
        {"input_ids": [5, 6, 7], "score": 0.5},
    ]
    batch = rh.Collator(tokenizer)(rows)
    assert batch["grade"].tolist() == [2, -100]
    assert batch["score"].isnan().tolist() == [True, False] and batch["score"][1] == 0.5
    assert batch["tags"].tolist() == [[0, 1, -100], [-100, -100, -100]]
    assert batch["pair"][0].tolist() == [0.5, 1.0, 2.0] and batch["pair"][1].isnan().all()


def test_a_column_that_no_row_of_a_batch_has_is_left_out(tokenizer):
    assert "grade" not in rh.Collator(tokenizer)([{"input_ids": [3], "grade": None}, {"input_ids": [4]}])


def test_a_row_without_prompt_mask_beside_others_is_prompt_as_a_whole(tokenizer):
    chat = rh.encode_pairs(tokenizer, ["a b"], ["c"])[0]
    batch = rh.Collator(tokenizer)([chat, {"input_ids": [3, 4], "grade": 1}])
    assert batch["prompt_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [-100] * 4


def test_inputs_that_only_some_rows_have_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="some rows have 'token_type_ids' and some do not"):
        rh.Collator(tokenizer)([{"input_ids": [3], "token_type_ids": [0]}, {"input_ids": [4]}])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    length=st.integers(0, 60),
)
def test_a_mix_has_its_length_its_shares_and_every_row_of_a_task_as_often_as_the_others(sizes, shares, length):
    tasks = {f"t{i}": [{"input_ids": [i], f"y{i}": j} for j in range(n)] for i, n in enumerate(sizes)}
    weights = {f"t{i}": shares[i] for i in range(len(sizes))}
    rows = rh.mix(tasks, weights, length=length, seed=3)
    assert len(rows) == length
    for i, n in enumerate(sizes):
        own = [row[f"y{i}"] for row in rows if row["input_ids"] == [i]]
        assert abs(len(own) - length * shares[i] / sum(shares[: len(sizes)])) <= 1
        counts = [own.count(j) for j in range(n)]
        assert max(counts) - min(counts) <= 1
        assert all(row[f"y{i}"] == -100 for row in rows if row["input_ids"] != [i] and own)


def test_temperature_makes_the_shares_more_equal(tokenizer):
    tasks = {"large": [{"input_ids": [3]}] * 1000, "small": [{"input_ids": [4]}] * 10}

    def share(**options) -> float:
        return sum(row["input_ids"] == [4] for row in rh.mix(tasks, **options)) / 1010

    assert share() == pytest.approx(10 / 1010)
    assert share(temperature=2) == pytest.approx(1 / 11, abs=1e-3)  # √10 : √1000
    assert rh.mix(tasks, seed=1) == rh.mix(tasks, seed=1) != rh.mix(tasks, seed=2)


@pytest.mark.parametrize(
    "given, message",
    [
        (({},), "at least one task"),
        (({"a": []},), r"rows for each: got \{'a': 0\}"),
        (({"a": [{"input_ids": [3]}]}, {"b": 1}), r"a positive number to each of a, got \{'b': 1\}"),
        (({"a": [{"input_ids": [3]}]}, {"a": 0}), "positive number"),
    ],
)
def test_tasks_that_cannot_be_mixed_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        rh.mix(*given)


def test_a_pair_of_preferences_lands_in_one_batch_under_one_number(tokenizer):
    pairs = rh.encode_preferences(tokenizer, ["a", "b c"], ["d", "e"], ["f g", "h"])
    batch = rh.Collator(tokenizer)(pairs[::-1])
    assert batch["preference"].tolist() == [2, -2, 1, -1]
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    assert [tokenizer.decode(ids[real]) for ids, real in rows] == ["b c e </s>", "b c h </s>", "a d </s>", "a f g </s>"]
    assert "labels" not in batch and "prompt_mask" not in batch


def test_conversations_make_pairs_too_and_numbers_that_differ_are_an_error(tokenizer):
    tokenizer.chat_template = TEMPLATE
    [(chosen, rejected)] = rh.encode_preferences(tokenizer, [[{"role": "user", "content": "a"}]], ["b"], ["c"])
    assert chosen["input_ids"][:-2] == rejected["input_ids"][:-2] and chosen["input_ids"] != rejected["input_ids"]
    with pytest.raises(ValueError, match="got 1 prompts, 2 and 1 answers"):
        rh.encode_preferences(tokenizer, ["a"], ["b", "c"], ["d"])


def test_shares_belong_to_tasks_in_whatever_order_they_are_given():
    tasks = {"a": [{"input_ids": [3]}] * 10, "b": [{"input_ids": [4]}] * 10}
    rows = rh.mix(tasks, {"b": 1, "a": 3}, length=100)
    assert sum(row["input_ids"] == [3] for row in rows) == 75


def test_a_number_is_missing_as_nan_if_any_of_its_column_is_a_float(tokenizer):
    rows = [{"input_ids": [3], "score": 5}, {"input_ids": [3], "score": 4.5}, {"input_ids": [3]}]
    assert rh.Collator(tokenizer)(rows)["score"].isnan().tolist() == [False, False, True]


def test_what_rows_lack_does_not_hang_on_lengths_that_happen_to_agree(tokenizer):
    rows = [{"input_ids": [3, 4, 5], "tags": [1, 0, 1]}, {"input_ids": [3] * 5, "tags": [0, 1, 1]}, {"input_ids": [3]}]
    assert rh.Collator(tokenizer)(rows)["tags"].tolist()[2] == [-100] * 3


def test_every_value_is_looked_at_once_however_many_rows_lack_it(monkeypatch):
    seen, convert = [], torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda value: (seen.append(value), convert(value))[1])
    grades = [{"input_ids": [3], "grade": grade} for grade in range(50)]
    assert complete([*grades, *({"input_ids": [4]} for _ in range(50))])[-1] == {"input_ids": [4], "grade": -100}
    assert seen == list(range(50))


def test_a_prompt_ends_at_the_first_label_where_no_mask_says_so(tokenizer):
    chat = rh.encode_pairs(tokenizer, ["a b"], ["c"])[0]
    other = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    assert rh.Collator(tokenizer)([chat, other])["prompt_mask"][1].tolist() == [1, 0, 0, 0]


def test_texts_that_only_some_rows_have_are_left_alone_and_pairs_are_not_mixed(tokenizer):
    assert complete([{"input_ids": [3], "source": "web"}, {"input_ids": [4]}])[1] == {"input_ids": [4], "source": None}
    with pytest.raises(ValueError, match="takes rows, not pairs of rows"):
        rh.mix({"a": rh.encode_preferences(tokenizer, ["a"], ["b"], ["c"])})

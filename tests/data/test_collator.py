"""Batches: what is padding, what is missing, and where prompts end."""

import pytest
import torch
from support.models import TEMPLATE

import reftheads as rh
from reftheads.data.collator import prompts_only


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


def test_a_pair_of_preferences_lands_in_one_batch_under_one_number(tokenizer):
    pairs = rh.encode_preferences(tokenizer, ["a", "b c"], ["d", "e"], ["f g", "h"])
    batch = rh.Collator(tokenizer)(pairs[::-1])
    assert batch["preference"].tolist() == [2, -2, 1, -1]
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    assert [tokenizer.decode(ids[real]) for ids, real in rows] == ["b c e </s>", "b c h </s>", "a d </s>", "a f g </s>"]
    assert "labels" not in batch and "prompt_mask" not in batch


def test_a_number_is_missing_as_nan_if_any_of_its_column_is_a_float(tokenizer):
    rows = [{"input_ids": [3], "score": 5}, {"input_ids": [3], "score": 4.5}, {"input_ids": [3]}]
    assert rh.Collator(tokenizer)(rows)["score"].isnan().tolist() == [False, False, True]


def test_what_rows_lack_does_not_hang_on_lengths_that_happen_to_agree(tokenizer):
    rows = [{"input_ids": [3, 4, 5], "tags": [1, 0, 1]}, {"input_ids": [3] * 5, "tags": [0, 1, 1]}, {"input_ids": [3]}]
    assert rh.Collator(tokenizer)(rows)["tags"].tolist()[2] == [-100] * 3


def test_a_prompt_ends_at_the_first_label_where_no_mask_says_so(tokenizer):
    chat = rh.encode_pairs(tokenizer, ["a b"], ["c"])[0]
    other = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    assert rh.Collator(tokenizer)([chat, other])["prompt_mask"][1].tolist() == [1, 0, 0, 0]


MARKED = TEMPLATE.replace(
    "{{ m.content }}</s>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}",
)


def test_masks_of_a_chat_template_make_the_labels_of_all_turns(tokenizer):
    tokenizer.chat_template = MARKED
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    talk = [{"role": role, "content": content} for role, content in turns]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    rows = [dict(tokenizer.apply_chat_template(part, **options)) for part in (talk, talk[:2])]
    assert all("assistant_masks" in row for row in rows)
    batch = rh.Collator(tokenizer)(rows)
    want = rh.Collator(tokenizer)(rh.encode_chat(tokenizer, [talk, talk[:2]], turns="all"))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(batch[name], want[name]) for name in batch)
    assert torch.equal(prompts_only(batch, 0)["input_ids"], prompts_only(want, 0)["input_ids"])


def test_a_token_is_learnt_where_all_masks_mark_it_and_a_label_of_ones_own_stays(tokenizer):
    row = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]}
    assert rh.Collator(tokenizer)([row])["labels"].tolist() == [[-100, -100, 5, 6]]
    own = {**row, "labels": [3, 4, 9, -100]}
    assert rh.Collator(tokenizer)([own])["labels"].tolist() == [[-100, -100, 9, -100]]
    beside = rh.Collator(tokenizer)([row, {"input_ids": [3, 4], "grade": 1}])
    assert beside["labels"][1].tolist() == [-100] * 4 and beside["grade"].tolist() == [-100, 1]


def test_a_mask_that_marks_nothing_or_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="assistant_masks mark no token .* no {% generation %} around answers"):
        rh.Collator(tokenizer)([{"input_ids": [3, 4], "assistant_masks": [0, 0]}])
    with pytest.raises(ValueError, match="completion_mask has 1 entries in a row of 2 tokens"):
        rh.Collator(tokenizer)([{"input_ids": [3, 4], "completion_mask": [1]}])


def test_text_beside_the_tokens_is_left_out(tokenizer):
    rows = [
        {"input_ids": [3], "text": "a", "words": ["a"], "messages": [{"role": "user", "content": "a"}], "grade": 1},
        {"input_ids": [4], "text": None, "words": ["b", "c"], "messages": [], "grade": 0},
        {"input_ids": [5]},
    ]
    assert rh.Collator(tokenizer)(rows).keys() == {"input_ids", "attention_mask", "grade"}

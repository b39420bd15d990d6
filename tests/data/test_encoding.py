"""What is learnt of a text, and that prompts are those of generation."""

import pytest
from support.models import TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reftheads as rh


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


TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


def test_all_turns_of_a_chat_are_learnt_and_the_prompt_ends_before_the_first(tokenizer):
    tokenizer.chat_template = TEMPLATE
    [row], [last] = (rh.encode_chat(tokenizer, [TALK], turns=turns) for turns in ("all", "last"))
    whole = tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == last["input_ids"] == whole
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "c </s> e f </s>"
    assert tokenizer.decode([label for label in last["labels"] if label != -100]) == "e f </s>"
    [first] = rh.encode_chat(tokenizer, [TALK[:2]])
    assert sum(row["prompt_mask"]) == sum(first["prompt_mask"]) == row["labels"].index(tokenizer.vocab["c"])
    with pytest.raises(ValueError, match="turns must be 'last' or 'all', got 'first'"):
        rh.encode_chat(tokenizer, [TALK], turns="first")


def test_all_turns_of_a_template_that_rewrites_earlier_ones_are_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else 'x' }}")
    with pytest.raises(ValueError, match="cut behind it, with turns='last'"):
        rh.encode_chat(tokenizer, [TALK], turns="all")
    assert rh.encode_chat(tokenizer, [TALK])


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


def test_conversations_make_pairs_too_and_numbers_that_differ_are_an_error(tokenizer):
    tokenizer.chat_template = TEMPLATE
    [(chosen, rejected)] = rh.encode_preferences(tokenizer, [[{"role": "user", "content": "a"}]], ["b"], ["c"])
    assert chosen["input_ids"][:-2] == rejected["input_ids"][:-2] and chosen["input_ids"] != rejected["input_ids"]
    with pytest.raises(ValueError, match="got 1 prompts, 2 and 1 answers"):
        rh.encode_preferences(tokenizer, ["a"], ["b", "c"], ["d"])


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("turn", [0, 1])
def test_a_message_that_says_nothing_is_an_error(turn, content):
    _, tokenizer = rh.load_base("tiny-chat")
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    messages[turn] = messages[turn] | {"content": content}
    with pytest.raises(ValueError, match=f"message {turn} of a conversation says nothing"):
        rh.encode_chat(tokenizer, [messages])


def test_a_row_that_is_longer_than_the_model_takes_is_an_error_unless_it_is_cut():
    _, tokenizer = rh.load_base("tiny-chat")
    with pytest.raises(ValueError, match=r"row 1 has \d+ tokens, and the model takes 512: give max_length"):
        rh.encode_pairs(tokenizer, ["Hi.", "dogs " * 600], ["Yes.", "No."])
    with pytest.warns(UserWarning, match="cut the prompts of 1 of 2 rows"):
        rows = rh.encode_pairs(tokenizer, ["Hi.", "dogs " * 600], ["Yes.", "No."], max_length=512)
    assert len(rows[1]["input_ids"]) == 512

"""Mixing tasks, and what rows lack."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reftheads as rh
from reftheads.data.rows import complete


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


def test_shares_belong_to_tasks_in_whatever_order_they_are_given():
    tasks = {"a": [{"input_ids": [3]}] * 10, "b": [{"input_ids": [4]}] * 10}
    rows = rh.mix(tasks, {"b": 1, "a": 3}, length=100)
    assert sum(row["input_ids"] == [3] for row in rows) == 75


def test_every_value_is_looked_at_once_however_many_rows_lack_it(monkeypatch):
    seen, convert = [], torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda value: (seen.append(value), convert(value))[1])
    grades = [{"input_ids": [3], "grade": grade} for grade in range(50)]
    assert complete([*grades, *({"input_ids": [4]} for _ in range(50))])[-1] == {"input_ids": [4], "grade": -100}
    assert seen == list(range(50))


def test_texts_that_only_some_rows_have_are_left_alone_and_pairs_are_not_mixed(tokenizer):
    assert complete([{"input_ids": [3], "source": "web"}, {"input_ids": [4]}])[1] == {"input_ids": [4], "source": None}
    with pytest.raises(ValueError, match="takes rows, not pairs of rows"):
        rh.mix({"a": rh.encode_preferences(tokenizer, ["a"], ["b"], ["c"])})

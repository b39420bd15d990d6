"""Targets of rows: the trainer and the probes ask the same functions whether they can be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reftheads as rh
from reftheads.data.targets import check_column, check_items, read_target

CLASSES = rh.LinearHead(3, "grade")
LABELS = rh.LinearHead(2, "tags", "multi_label")


@given(st.lists(st.lists(st.sampled_from([-100, 0, 1, 2, 3]), min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_first_row_that_cannot_be_is_named_whatever_the_lengths_of_the_others(rows):
    wrong = next((i for i, row in enumerate(rows) if 3 in row), None)
    if wrong is None:
        assert check_column(CLASSES, rows) == any(value != -100 for row in rows for value in row)
    else:
        with pytest.raises(ValueError, match=rf"target 'grade' in row {wrong} of train is 3, .* from 0 to 2"):
            check_column(CLASSES, rows, "row {row} of train")


@pytest.mark.parametrize(
    "head, column, there",
    [
        (CLASSES, [0, 2.0, -100], True),
        (CLASSES, [-100, float("nan")], False),
        (CLASSES, [None, None], False),
        (CLASSES, [], False),
        (CLASSES, [None, torch.tensor([1, -100])], True),
        (LABELS, [[0, 1], [-100, 1]], True),
        (LABELS, [[[0, 1], [1, 1]], None, [[-100, -100]]], True),
        (LABELS, [[-100, -100]], False),
    ],
)
def test_a_column_of_numbers_or_lists_has_a_target_or_has_none(head, column, there):
    assert check_column(head, column) is there


@pytest.mark.parametrize(
    "head, column, message",
    [
        (CLASSES, [0, "1"], "'grade' in row 1 is '1': give a number, or a list of numbers"),
        (CLASSES, [0, [[1], [1, 2]]], "row 1 is .*: give a number, or a list of numbers"),
        (LABELS, [[0, 1], 1], "'tags' in row 1 is 1: give 2 numbers, one per output"),
        (LABELS, [[0, 1], [0, 1, 1]], r"'tags' in row 1 is \[0, 1, 1\]: give 2 numbers"),
        (LABELS, [[0, 1], None, [[0, 1], [0, 5]]], "'tags' in row 2 is 5, .* 0, 1 or a probability"),
        (rh.LinearHead(1, "stars", "mse"), [1.0, float("inf")], "'stars' in row 1 is inf, .* a finite number"),
    ],
)
def test_what_cannot_be_a_target_is_named_with_its_row(head, column, message):
    with pytest.raises(ValueError, match=message):
        check_column(head, column)


def test_items_of_several_rows_are_looked_at_together_and_named_by_their_row():
    values, row = torch.tensor([0, 1, 2, 7]), torch.tensor([0, 0, 4, 4])
    assert check_items(CLASSES, values[:3], row[:3])
    with pytest.raises(ValueError, match="row 4 is 7"):
        check_items(CLASSES, values, row)


def test_a_row_without_a_target_has_none():
    assert read_target(CLASSES, None, "row 0") is None
    assert torch.equal(read_target(LABELS, [0, 1], "row 0"), torch.tensor([0, 1]))

"""Where the tokens of a batch lie when their prefixes are in a cache: nothing is lost, and distances are true."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reftheads.graph.positions import Positions
from reftheads.reuse.fingerprint import content
from reftheads.reuse.layout import Layout, Rows

rows = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 9)).flatmap(
        lambda row: st.tuples(st.just(row[0]), st.just(row[1]), st.integers(0, row[1] - 1))
    ),
    min_size=1,
    max_size=5,
)  # padding at the left, tokens, tokens of the prefix


def laid_out(rows: list[tuple[int, int, int]]) -> Layout:
    starts, lengths, prefixes = zip(*rows, strict=True)
    return Layout.behind(prefixes, lengths, starts)


def test_a_whole_layout_is_the_batch_itself() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    layout = Layout.whole(mask)
    values = torch.arange(6).view(2, 3)
    assert torch.equal(layout.pick(values), values)
    assert torch.equal(layout.attention_mask, mask.long())
    assert layout.past == 0


def test_the_rests_of_rows_stand_at_the_left_behind_their_prefixes() -> None:
    layout = Layout.behind([1, 3], [3, 4], [0, 2])
    assert layout.columns.tolist() == [[1, 2], [5, 5]]
    assert layout.real.tolist() == [[True, True], [True, False]]
    assert layout.past == 3
    assert layout.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert layout.position_ids[layout.real].tolist() == [1, 2, 3]


@given(rows)
def test_each_token_behind_a_prefix_is_computed_once_and_in_order(rows: list[tuple[int, int, int]]) -> None:
    layout = laid_out(rows)
    for (start, length, prefix), columns, real in zip(rows, layout.columns, layout.real, strict=True):
        assert columns[real].tolist() == list(range(start + prefix, start + length))
        assert start <= int(columns.min()) and int(columns.max()) < start + length  # fillers are tokens of the row


@given(rows)
def test_the_tokens_of_a_row_are_consecutive_and_each_distance_is_true(rows: list[tuple[int, int, int]]) -> None:
    layout = laid_out(rows)
    for (_, length, prefix), mask, real, positions in zip(
        rows, layout.attention_mask, layout.real, layout.position_ids, strict=True
    ):
        columns = mask.nonzero()[:, 0]
        assert len(columns) == length
        assert columns.tolist() == list(range(int(columns[0]), int(columns[0]) + length))
        assert int(columns[0]) == layout.past - prefix
        computed = (real.nonzero()[:, 0] + layout.past).tolist()
        assert computed == columns.tolist()[prefix:]
        assert positions[real].tolist() == list(range(prefix, length))
        assert int(positions.max()) < length  # a filler asks for no position that the model may not have


@given(rows)
def test_picking_takes_the_values_at_the_columns(rows: list[tuple[int, int, int]]) -> None:
    layout = laid_out(rows)
    values = torch.randn(len(rows), 14, 2)
    picked = layout.pick(values)
    for value, one, columns in zip(values, picked, layout.columns, strict=True):
        assert torch.equal(one, value[columns])


def batch(rows: list[tuple[int, int, int]], divided: bool) -> tuple[Rows, Positions, Tensor]:
    starts, lengths, _ = (list(values) for values in zip(*rows, strict=True))
    ids = torch.arange(14 * len(rows)).view(-1, 14)
    start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    real = (torch.arange(14) >= start) & (torch.arange(14) < start + length)
    rule = Positions("all")
    layout = laid_out(rows) if divided else Layout.whole(real)
    contents = [content(row[there]) for row, there in zip(ids, real, strict=True)]
    masks = {rule: real & (ids % 3 == 0)}
    return Rows({"input_ids": ids}, contents, layout, masks, frozenset(), starts, lengths, divided), rule, ids


@given(rows, st.booleans(), st.data())
def test_some_of_the_rows_are_as_they_were_among_all(
    rows: list[tuple[int, int, int]], divided: bool, data: st.DataObject
) -> None:
    every, rule, _ = batch(rows, divided)
    some = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    part = every.of(some)
    for j, i in enumerate(some):
        assert part.ids[j] == every.ids[i]
        assert torch.equal(part.fed["input_ids"][j], every.fed["input_ids"][i])
        assert torch.equal(part.tokens[j], every.tokens[i])
        assert torch.equal(part.selected(rule)[j], every.selected(rule)[i])
        there, here = (r.layout.columns[k][r.layout.real[k]] for r, k in ((every, i), (part, j)))
        assert torch.equal(here, there)


@given(rows, st.booleans())
def test_tokens_and_selections_count_from_the_first_token(rows: list[tuple[int, int, int]], divided: bool) -> None:
    every, rule, ids = batch(rows, divided)
    for i, (start, length, _) in enumerate(rows):
        assert torch.equal(every.tokens[i], ids[i, start : start + length])
        chosen = every.tokens[i][every.selected(rule)[i]]
        assert chosen.tolist() == [token for token in every.tokens[i].tolist() if token % 3 == 0]

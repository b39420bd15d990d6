"""Every rule against lists of Python, row by row: whole, in chunks, with padding and gaps anywhere."""

import copy
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rules as rules_of_lists
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reftheads as rh
from reftheads.graph.positions import Positions
from reftheads.graph.selection import Selection
from reftheads.graph.tokens import Tokens

FEW = settings(max_examples=150, deadline=None)


@dataclass
class Rows:
    """Rows of one width; of each, which columns hold tokens and which of these belong to the prompt."""

    real: list[list[bool]]
    prompt: list[list[bool]] | None
    ids: list[list[int]]
    masked: bool

    @property
    def width(self) -> int:
        return len(self.real[0])

    def columns(self) -> list[tuple[list[int], list[int]]]:
        """Of every row, in order, the columns that hold tokens and those of its prompt."""
        out = []
        for i, there in enumerate(self.real):
            real = [c for c in range(self.width) if there[c]]
            prompt = real if self.prompt is None else [c for c in real if dict(enumerate(self.prompt[i])).get(c)]
            out.append((real, prompt))
        return out

    def tokens(
        self, start: int = 0, stop: int | None = None, tensor_past: bool = False, known: int | None = None
    ) -> Tokens:
        """Columns `start` to `stop`; the attention mask reaches to column `known`, or to the end."""
        stop = self.width if stop is None else stop
        return Tokens.of(
            (len(self.real), stop - start),
            torch.tensor(start) if tensor_past else start,
            torch.tensor(self.real)[:, :known].long() if self.masked else None,
            None if self.prompt is None else torch.tensor(self.prompt),
            torch.tensor(self.ids)[:, start:stop],
        )


def oracle(rule: str, rows: Rows) -> list[list[int]]:
    return [rules_of_lists.selected(rule, *row) for row in rows.columns()]


def chosen(selection: Selection | None, batch: int, chunk: int, start: int = 0) -> list[list[int]]:
    """The absolute columns of a selection; every column at most once."""
    if selection is None:
        return [[] for _ in range(batch)]
    if selection.columns is None:
        mask = torch.ones(batch, chunk, dtype=torch.bool) if selection.mask is None else selection.mask
        assert mask.shape == (batch, chunk)
        return [[start + c for c in range(chunk) if mask[i, c]] for i in range(batch)]
    assert selection.valid is not None and selection.valid.shape == selection.columns.shape
    for row in selection.columns.tolist():
        assert len(set(row)) == len(row), "slots of a row must be distinct columns"
    rows = zip(selection.columns.tolist(), selection.valid.tolist(), strict=True)
    found = [[start + c for c, valid in zip(columns, there, strict=True) if valid] for columns, there in rows]
    assert all(row == sorted(row) for row in found)
    return found


def resolve(rule: Positions, rows: Rows, start: int = 0, stop: int | None = None, **how) -> list[list[int]]:
    tokens = rows.tokens(start, stop, **how)
    batch, chunk = tokens.in_prompt.shape
    selection = rule.select(tokens)
    if selection is not None and selection.columns is not None:
        assert rule.bound is not None and selection.columns.shape[1] == rule.bound
    return chosen(selection, batch, chunk, start)


@st.composite
def row_batches(draw) -> Rows:
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    masked = draw(st.booleans())
    real, ids = [], []
    for _ in range(batch):
        left = draw(st.integers(0, width - 1)) if masked else 0
        right = draw(st.integers(0, width - 1 - left)) if masked else 0
        gaps = draw(st.sets(st.integers(0, width - 1), max_size=2)) if masked else set()
        real.append([left <= c < width - right and c not in gaps for c in range(width)])
        ids.append(draw(st.lists(st.integers(0, 9), min_size=width, max_size=width)))
    prompt = None
    if draw(st.booleans()):
        ends = draw(st.integers(1, width))  # the mask may end before the rows do
        kind = draw(st.sampled_from(["prefix", "any"]))
        prompt = [
            [c < stop for c in range(ends)]
            if kind == "prefix"
            else draw(st.lists(st.booleans(), min_size=ends, max_size=ends))
            for stop in (draw(st.integers(0, width)) for _ in range(batch))
        ]
    return Rows(real, prompt, ids, masked)


ends = st.one_of(st.none(), st.integers(-9, 9))
terms = st.one_of(
    st.integers(0, 9).map(lambda n: f"f{n}"),
    st.integers(0, 9).map(lambda n: f"l{n}"),
    st.sampled_from(["all", "prompt", "generated"]),
    st.integers(-9, 9).map(str),
    st.tuples(ends, ends).map(lambda e: f"{'' if e[0] is None else e[0]}:{'' if e[1] is None else e[1]}"),
)
sums = st.lists(terms, min_size=1, max_size=3).map("+".join)
parts = st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()).map(
    lambda p: f"{f'f{p[0]}' if p[2] else f'l{p[1]}'} of f{p[0]}+l{p[1]}"
)
rules = st.one_of(sums, parts)


@FEW
@given(rules, row_batches())
def test_a_rule_selects_what_python_slicing_selects(rule: str, rows: Rows):
    assert resolve(Positions(rule), rows) == oracle(rule, rows)


@FEW
@given(rules, row_batches(), st.data())
def test_chunks_together_select_what_the_whole_row_selects(rule: str, rows: Rows, data):
    if rows.prompt is None:
        rows.masked = True  # a chunk alone does not know how long the row will be
    cuts = data.draw(st.sets(st.integers(1, max(rows.width - 1, 1))))
    bounds = [0, *sorted(c for c in cuts if c < rows.width), rows.width]
    together: list[list[int]] = [[] for _ in rows.real]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        tensor_past = data.draw(st.booleans())  # static caches count in a tensor
        for row, part in zip(
            together, resolve(Positions(rule), rows, start, stop, tensor_past=tensor_past), strict=True
        ):
            row.extend(part)
    assert together == oracle(rule, rows)


@FEW
@given(rules, row_batches(), st.data())
def test_a_chunk_needs_no_mask_of_the_columns_behind_it(rule: str, rows: Rows, data):
    if rows.prompt is None:
        rows.prompt = rows.real  # who feeds chunks says where the prompt ends
    start = data.draw(st.integers(0, rows.width - 1))
    stop = data.draw(st.integers(start + 1, rows.width))
    known = data.draw(st.integers(stop, rows.width))
    expected = [[c for c in row if start <= c < stop] for row in oracle(rule, rows)]
    assert resolve(Positions(rule), rows, start, stop, known=known) == expected


@FEW
@given(rules, row_batches(), st.integers(0, 40))
def test_slots_and_masks_select_the_same(rule: str, rows: Rows, few: int):
    selection = Positions(rule).select(rows.tokens(), few)
    assert chosen(selection, len(rows.real), rows.width) == oracle(rule, rows)


@FEW
@given(row_batches(), st.data())
def test_every_so_manyth_token_of_the_prompt_is_a_function_of_its_rank(rows: Rows, data):
    start = data.draw(st.integers(0, rows.width - 1))
    if rows.prompt is None:
        rows.masked = True
    for step, rule in ((2, rules_of_lists.every_second), (3, rules_of_lists.every_third)):
        expected = [rules_of_lists.every(step, *row) for row in rows.columns()]
        assert resolve(Positions.parse(rule), rows) == expected
        assert resolve(Positions.parse(rule), rows, start) == [[c for c in row if c >= start] for row in expected]


@FEW
@given(rules, row_batches())
def test_what_a_rule_says_of_itself_holds_in_every_row(rule: str, rows: Rows):
    positions = Positions(rule)
    for (real, prompt), selected in zip(rows.columns(), oracle(rule, rows), strict=True):
        if positions.begins_with_first and len(prompt) > 1 and selected:
            assert prompt[0] in selected
        if not positions.needs_prompt:
            assert selected == rules_of_lists.selected(rule, real, [])


@FEW
@given(st.lists(terms, min_size=1, max_size=3, unique=True).map("+".join), row_batches())
def test_a_graph_that_is_not_tied_has_a_node_for_each_part_of_a_sum(rule: str, rows: Rows):
    parts = {node.positions for node in rh.InterventionGraph.over(rh.Steering(), [0], rule, tied=False)}
    together = zip(*(resolve(part, rows) for part in parts), strict=True)
    assert [sorted({c for columns in row for c in columns}) for row in together] == oracle(rule, rows)


@FEW
@given(rules, row_batches())
def test_no_row_gets_more_tokens_than_the_bound(rule: str, rows: Rows):
    bound = Positions(rule).bound
    if bound is not None:
        assert max(map(len, oracle(rule, rows))) <= bound


@FEW
@given(rules, row_batches())
def test_a_rule_that_stays_in_the_prompt_says_so(rule: str, rows: Rows):
    if Positions(rule).in_prompt:
        prompts = oracle("prompt", rows)
        assert all(set(got) <= set(prompt) for got, prompt in zip(oracle(rule, rows), prompts, strict=True))


@FEW
@given(st.integers(0, 9), st.integers(0, 9), row_batches())
def test_the_parts_of_a_capped_sum_are_disjoint_and_make_up_the_sum(first: int, last: int, rows: Rows):
    rule = Positions(f"f{first}+l{last}")
    heads, tails = (resolve(part, rows) for part in rule.parts)
    for head, tail, whole in zip(heads, tails, resolve(rule, rows), strict=True):
        assert not set(head) & set(tail)
        assert sorted(head + tail) == whole


def test_f7_and_l7_take_half_a_short_prompt_each_as_pyreft_does():
    def pyreft(prompt_length: int, n: int) -> list[int]:
        cap = min(prompt_length // 2, n)
        return [*range(cap), *range(prompt_length - cap, prompt_length)]

    for length in range(1, 20):
        rows = Rows([[True] * length], None, [[0] * length], False)
        assert resolve(Positions("f7+l7"), rows) == [pyreft(length, 7)]


@FEW
@given(st.sets(st.integers(0, 9), min_size=1), row_batches(), st.integers(0, 11))
def test_where_selects_real_tokens_with_one_of_the_ids(ids: set[int], rows: Rows, start: int):
    columns = zip(rows.columns(), rows.ids, strict=True)
    expected = [rules_of_lists.with_ids(ids, real, row) for (real, _), row in columns]
    assert resolve(Positions.where(token_ids=sorted(ids)), rows) == expected
    start = min(start, rows.width - 1)
    assert resolve(Positions.where(sorted(ids)), rows, start) == [[c for c in row if c >= start] for row in expected]


@FEW
@given(row_batches())
def test_a_callable_selects_what_it_says_but_no_padding(rows: Rows):
    expected = [[c for c, there in enumerate(real) if there and c % 2] for real in rows.real]
    rule = Positions.parse(lambda tokens: torch.arange(tokens.in_prompt.shape[1]) % 2 == torch.ones_like(tokens.rank))
    assert resolve(rule, rows) == expected


def test_a_callable_is_asked_whatever_its_name_is():
    def generated(tokens: Tokens) -> Tensor:
        return tokens.rank == 1

    def all(tokens: Tokens) -> Tensor:
        return tokens.rank == 2

    rows = Rows([[True] * 4], None, [[0] * 4], False)
    assert resolve(Positions.parse(generated), rows) == [[1]]
    assert resolve(Positions.parse(all), rows) == [[2]]


@FEW
@given(rules, row_batches(), st.integers(0, 2**20))
def test_scatter_of_gather_changes_the_selected_tokens_alone_and_bit_for_bit(rule: str, rows: Rows, seed: int):
    selection = Positions(rule).select(rows.tokens())
    if selection is None:
        return
    h = torch.randn(len(rows.real), rows.width, 3, generator=torch.Generator().manual_seed(seed))
    picked = selection.gather(h)
    assert torch.equal(selection.scatter(h, picked, picked), h)
    new = selection.scatter(h, picked, picked * 2 + 1)
    mask = torch.zeros(h.shape[:2], dtype=torch.bool)
    for i, columns in enumerate(oracle(rule, rows)):
        mask[i, columns] = True
    assert torch.equal(new, torch.where(mask[..., None], h * 2 + 1, h))
    assert selection.validity(h).sum() == mask.sum()


@FEW
@given(rules, row_batches(), st.integers(0, 2**20))
def test_gradients_pass_through_slots_once(rule: str, rows: Rows, seed: int):
    selection = Positions(rule).select(rows.tokens())
    if selection is None:
        return
    torch.manual_seed(seed)
    h = torch.randn(len(rows.real), rows.width, 2, dtype=torch.float64, requires_grad=True)
    weight, slope = torch.randn_like(h), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    picked = selection.gather(h)
    (selection.scatter(h, picked, slope * picked.square()) * weight).sum().backward()
    mask = torch.zeros(*h.shape[:2], 1, dtype=torch.float64)
    for i, columns in enumerate(oracle(rule, rows)):
        mask[i, columns] = 1
    assert h.grad is not None and slope.grad is not None
    torch.testing.assert_close(h.grad, weight * (mask * 6 * h.detach() + 1 - mask))
    torch.testing.assert_close(slope.grad, (weight * mask * h.detach().square()).sum())


@FEW
@given(rules, row_batches(), st.data())
def test_a_selection_restricted_to_some_rows_is_empty_in_the_others(rule: str, rows: Rows, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows.real), max_size=len(rows.real)))
    selection = Positions(rule).select(rows.tokens())
    if selection is None:
        return
    restricted = selection.rows(torch.tensor(keep), rows.width)
    expected = [row if kept else [] for row, kept in zip(oracle(rule, rows), keep, strict=True)]
    assert chosen(restricted, len(rows.real), rows.width) == expected


# --- reading and writing ----------------------------------------------------------------------------------


@FEW
@given(rules)
def test_a_rule_survives_json(rule: str):
    positions = Positions.parse(rule)
    assert Positions.parse(positions.to_json()) == positions
    assert hash(Positions.parse(positions.to_json())) == hash(positions)
    assert str(positions) == rule


def test_ids_and_numbers_survive_json():
    where = Positions.where(token_ids=[7, 9])
    assert where.to_json() == {"token_ids": [7, 9]}
    assert Positions.parse({"token_ids": [7, 9]}) == where
    assert Positions.parse(-1) == Positions.parse("-1")
    assert Positions.parse(where) is where


def test_blanks_make_no_difference():
    assert Positions(" f7 + l7 ") == Positions("f7+l7")
    assert Positions("f7  of f7 + l7") == Positions("f7 of f7+l7")
    rows = Rows([[True] * 3], None, [[0] * 3], False)
    assert resolve(Positions(" all "), rows) == [[0, 1, 2]]


def test_a_function_cannot_be_saved_and_says_so():
    def odd(tokens: Tokens) -> Tensor:
        return tokens.rank % 2 == 1

    with pytest.raises(ValueError, match="positions given by the function 'odd' cannot be saved: use a rule in words"):
        Positions.parse(odd).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "", "f", "f-1", "l1.5", "first", "f7+", "+l7", "f7,l7", "F7", "-", "-:", ":-", "1:2:3", "--1", "3 to 5", "of",
        "0 1", "f 7", "- 1", "1 :3", "1_0", "f١", "１", "²", "f7off7+l7", "9" * 10, "1:" + "9" * 10,
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_the_rules_that_are(text: str):
    with pytest.raises(ValueError, match=r"cannot read positions .*: use f3, l1, f7\+l7, all, prompt, generated"):
        Positions.parse(text)


@pytest.mark.parametrize("text", [" f7+l7", "f7 + l7 ", "\tf7+\nl7", "f7 of f7 + l7"])
def test_space_between_terms_means_nothing(text: str):
    assert Positions.parse(text) == Positions.parse(text.strip().replace(" + ", "+").replace("\n", ""))


def test_a_sum_of_a_thousand_terms_is_read_and_what_is_longer_is_refused():
    assert Positions("+".join(map(str, range(1000)))).bound == 1000
    with pytest.raises(ValueError, match="cannot read positions '999"):
        Positions.parse("9" * 5000)
    for count in (1001, 10**6):
        with pytest.raises(ValueError, match=f"a sum of at most 1000 terms, got {count:,}: use slices"):
            Positions.parse("+".join(["0"] * count))


@pytest.mark.parametrize("ids", ["79", {"7": 1}, 7, None, [True], [1.0], ["7"], [-1], [2**63], [None], [[1]]])
def test_token_ids_that_are_no_whole_numbers_are_refused(ids):
    with pytest.raises(ValueError, match="token_ids must be"):
        Positions.where(ids)


@pytest.mark.parametrize("ids", [(7, 9), range(7, 9), torch.tensor([7, 9]), {7}])
def test_token_ids_may_be_whole_numbers_of_any_kind(ids):
    assert Positions.where(ids).token_ids == tuple(int(i) for i in ids)


@pytest.mark.parametrize("text", ["f7 of f6+l7", "all of f7+l7", "f7 of f7", "of f7+l7", "f7 of f7+all"])
def test_a_part_of_no_sum_is_refused(text: str):
    with pytest.raises(ValueError, match="is no part of a sum"):
        Positions.parse(text)


@pytest.mark.parametrize("spec", [None, True, 1.5, [0, 1], {"tokens": [1]}])
def test_what_is_no_text_is_refused(spec):
    with pytest.raises(ValueError, match=re.escape(f"cannot read positions {spec!r}: use f3")):
        Positions.parse(spec)


def test_where_needs_ids_and_tokens():
    with pytest.raises(ValueError, match="needs at least one token id, got none"):
        Positions.where(token_ids=[])
    with pytest.raises(ValueError, match="look at token ids, but the model was given embeddings only"):
        Positions.where(token_ids=[3]).select(Tokens.of((1, 4)))


def test_a_selection_fits_chunks_of_any_length():
    columns, valid = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[True, True], [True, False]])
    selection = Selection(columns=columns, valid=valid)
    for chunk in (3, 5, 4, 3):
        h = torch.arange(2.0 * chunk).view(2, chunk, 1)
        assert selection.gather(h)[..., 0].tolist() == [[0, 2], [chunk + 1, chunk]]
        changed = selection.scatter(h, selection.gather(h), torch.full((2, 2, 1), -1.0))
        assert (changed == -1).nonzero()[:, :2].tolist() == [[0, 0], [0, 2], [1, 1]]


# --- rules as keys -------------------------------------------------------------------------------------------


class Every:
    """A callable rule that says of itself that it equals all others, and that has no hash."""

    def __init__(self, step: int):
        self.step = step

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, tokens: Tokens) -> Tensor:
        return tokens.rank % self.step == 0


def test_equal_rules_are_one_key_and_callables_are_told_apart():
    second, third = Every(2), Every(3)
    rules = ["f7+l7", " f7 + l7", {"token_ids": [7]}, Positions.where([7]), second, second, third]
    keys = dict.fromkeys(map(Positions.parse, rules))
    assert [str(key) for key in keys] == ["f7+l7", "where token_ids in [7]", "callable", "callable"]
    assert Positions("all") != "all" and Positions("l1") != Positions("-1")


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
@pytest.mark.parametrize("spec", ["f7 of f7+l7", "-4:", {"token_ids": [7, 9]}])
def test_a_copied_rule_is_the_same_key(spec, remake):
    rule = Positions.parse(spec)
    hash(rule)
    again = remake(rule)
    assert again == rule and {rule: 1}[again] == 1 and again.bound == rule.bound
    assert remake(Positions.parse(len)).rule is len


_OTHER_PROCESS = """
import pickle, sys
from reftheads.graph.positions import Positions
print({Positions("f7+l7"): "there"}[pickle.loads(bytes.fromhex(sys.argv[1]))])
"""


def test_a_rule_that_was_sent_to_another_process_is_the_same_key_there():
    rule = Positions("f7+l7")
    hash(rule)  # texts have another hash in every process
    command = [sys.executable, "-W", "ignore", "-c", _OTHER_PROCESS, pickle.dumps(rule).hex()]
    run = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "there"


# --- cost -------------------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Counts operations and raises on those for which a device would have to be waited for."""

    waits = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.waits:
            raise AssertionError(f"{name} waits for the device")
        if name.startswith("index") and any(isinstance(a, Tensor) and a.dtype == torch.bool for a in (args[1] or ())):
            raise AssertionError("an index by booleans waits for the device")
        self.count += 1
        return func(*args, **(kwargs or {}))


@FEW
@given(rules, row_batches(), st.booleans())
def test_resolving_never_waits_for_the_device_and_loops_over_no_rows(rule: str, rows: Rows, tensor_past: bool):
    def operations(times: int) -> int:
        mask = torch.tensor(rows.real).long().repeat(times, 1) if rows.masked else None
        prompt = None if rows.prompt is None else torch.tensor(rows.prompt).repeat(times, 1)
        past = torch.tensor(0) if tensor_past else 0
        positions = Positions(rule)
        with Watched() as watched:
            tokens = Tokens.of((len(rows.real) * times, rows.width), past, mask, prompt)
            selection = positions.select(tokens)
            if selection is not None:
                h = torch.zeros(len(rows.real) * times, rows.width, 2)
                selection.scatter(h, selection.gather(h), selection.gather(h))
        return watched.count

    assert operations(1) == operations(17)


def test_ids_are_sent_to_the_device_once():
    rule, tokens = Positions.where(token_ids=[3, 4]), Tokens.of((1, 4), input_ids=torch.tensor([[1, 3, 4, 5]]))
    rule.select(tokens)
    with Watched():
        selection = rule.select(tokens)
    assert chosen(selection, 1, 4) == [[1, 2]]

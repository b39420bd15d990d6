"""Random graphs on random batches do what their rows alone say; `python -m tests.fuzz` runs any number of them.

The reference in `tests/fuzz` uses nothing of the runtime: rows without padding, hooks by hand, loops over tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz.draw import describe, draw_case
from fuzz.places import ARCHS
from fuzz.reference import Row, tokens_of
from fuzz.run import Covered, run_case

import reftheads as rh
from reftheads.graph import positions
from reftheads.interventions.heads import MappingHead
from reftheads.runtime import acting, frame, node_module, roster

SEED, PARTS, IN_EACH = 4, 10, 15


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs_on_random_batches_do_what_their_rows_alone_say(part: int):
    for number in range(part * IN_EACH, (part + 1) * IN_EACH):
        case = draw_case(SEED, number)
        outcome = run_case(case)
        assert not outcome.faults, f"{outcome.faults}\n{describe(case)}"


def test_what_is_drawn_covers_every_model_component_and_type():
    covered = Covered()
    for number in range(600):
        case = draw_case(SEED, number)
        covered.note(case)
    kinds = {name for name in rh.interventions.__all__ if _is_a_node_type(getattr(rh.interventions, name))}
    assert kinds <= covered.counts["type"].keys()
    assert {*rh.graph.site.COMPONENTS} <= covered.counts["component"].keys()
    assert covered.counts["model"].keys() == ARCHS.keys() and len(covered.counts["mistake"]) > 25


def _is_a_node_type(kind: Any) -> bool:
    abstract = kind in (rh.interventions.LowRank, MappingHead)
    return isinstance(kind, type) and issubclass(kind, rh.graph.Intervention) and not abstract


def test_a_case_is_the_same_whatever_came_before_it():
    first = draw_case(SEED, 7)
    draw_case(SEED, 8)
    assert describe(draw_case(SEED, 7)) == describe(first)


def test_the_reference_knows_the_rules_by_heart():
    row = Row({"decoder": [1, 2, 3, 4]}, {"decoder": [9, 5, 6, 5, 7, 8]})
    known = {"f1+l1": [1, 4], "f3 of f3+l3": [1, 2], "-3:": [2, 3, 4], "generated": [0, 5], "0+-1": [1, 4], "4": []}
    assert {rule: tokens_of(rh.Positions(rule), row, "decoder", 6) for rule in known} == known
    assert tokens_of(rh.Positions.where([5]), row, "decoder", 6) == [1, 3]


# --- a fault would show -----------------------------------------------------------------------------------------


def uncapped(patch: Any) -> None:
    patch.setattr(positions, "capped", lambda terms: False)


def no_prompts(patch: Any) -> None:
    patch.setattr(frame, "_given_mask", lambda *given: None)


def another_scale(patch: Any) -> None:
    patch.setattr(rh.LoRA, "scaling", property(lambda lora: 1.0))


def gates_that_add(patch: Any) -> None:
    def edit(gated: Any, p: Any, h: torch.Tensor, context: Any) -> torch.Tensor:
        return h + torch.sigmoid(context.source.to(h.dtype)) * gated.inner.edit(p, h, context)

    patch.setattr(rh.Gated, "edit", edit)


def every_row_in_each_adapter(patch: Any) -> None:
    patch.setattr(roster, "_rows_of", lambda adapter, names, tokens: torch.ones(len(tokens), dtype=torch.bool))


def the_other_order(patch: Any) -> None:
    def in_turn(run: Any, nodes: Any, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for node in reversed(nodes):
            h = acting._act(run, node, h, x)
        return h

    patch.setattr(acting, "_act_in_turn", in_turn)


def probes_that_train_the_model(patch: Any) -> None:
    def apply(what: Any, p: Any, h: torch.Tensor, context: Any) -> torch.Tensor:
        return what.edit(p, h, context) if hasattr(what, "edit") else what.read(p, h, context)

    patch.setattr(node_module, "apply", apply)


def losses_without_weights(patch: Any) -> None:
    patch.setattr(MappingHead, "weighted", lambda head, loss, count, p: loss)


PLANTED: dict[Callable, str] = {
    uncapped: "plain",
    no_prompts: "plain",
    another_scale: "plain",
    gates_that_add: "plain",
    every_row_in_each_adapter: "by row",
    the_other_order: "plain",
    probes_that_train_the_model: "step",
    losses_without_weights: "step",
}  # and a pass in which each shows


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_fault_that_is_planted_shows(plant: Callable, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    cases = (draw_case(SEED, number) for number in range(150))
    cases = (replace(case, passes=[PLANTED[plant]]) for case in cases if PLANTED[plant] in case.passes)
    assert any(run_case(case).faults for case in cases)

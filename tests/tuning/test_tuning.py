"""Searching where to edit: candidates are runs of their own, a killed search goes on, what is no search is an error."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import causal_loss, exact_loss
from support.training import arguments, llama, rows_of
from transformers.trainer_callback import PrinterCallback

import reftheads as rh
from reftheads.reuse.eligibility import Eligibility
from reftheads.tuning import Candidate, Tuning, search
from reftheads.tuning.halving import Pace, affordable, rungs, seconds_of
from reftheads.tuning.passes import Passes

STEPS = 4
EXACT = partial(rh.LoReFT, dtype="float64")
LORA = partial(rh.LoRA, dtype="float64")
HEAD = rh.LinearHead(outputs=2, target="label", dtype="float64")


@dataclass(frozen=True)
class Broken(rh.LoReFT):
    """An edit that gives no numbers."""

    def edit(self, p, h, context):
        return super().edit(p, h, context) * float("nan")


BROKEN = partial(Broken, dtype="float64")


def space(**options: Any) -> rh.Space:
    return rh.Space(**{"positions": ["l1", "l2", "f1+l1", "all"], "rank": (1, 4), "lr": (1e-3, 1e-1)} | options)


@pytest.fixture(autouse=True)
def in_float64():
    with causal_loss(exact_loss):
        yield


@dataclass
class Setting:
    """A search, and the runs that its candidates stand for."""

    tokenizer: Any
    folder: Path
    rows: list[dict[str, Any]]
    eval_rows: list[dict[str, Any]]

    def tune(self, **options: Any) -> Tuning:
        given = {"space": space(kinds=EXACT), "trials": 8, "args": arguments(self.folder / "tune", max_steps=STEPS)}
        given |= options
        return rh.tune(given.pop("base", None) or llama().double(), self.tokenizer, self.rows, self.eval_rows, **given)

    def alone(self, candidate: Candidate, seed: int = 0) -> tuple[rh.InterventionModel, float]:
        base = llama().double()
        torch.manual_seed(seed)
        model = rh.InterventionModel(base, candidate.graph)
        args = arguments(
            self.folder / "alone", max_steps=candidate.steps, learning_rate=candidate.learning_rate, disable_tqdm=True
        )
        trainer = rh.InterventionTrainer(
            model, args, train_dataset=self.rows, processing_class=self.tokenizer, reuse="off"
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model, trainer.evaluate(self.eval_rows)["eval_loss"]

    def check(self, found: Tuning, seed: int = 0) -> None:
        """Every candidate has the score, and the best one the weights, of a run of its own."""
        for candidate in found:
            if not candidate.diverged:
                assert self.alone(candidate, seed)[1] == pytest.approx(candidate.score, rel=1e-9), candidate
        other, _ = self.alone(found.best, seed)
        assert apart(found.model, other) < 1e-9
        assert found.best.score == min(c.score for c in found if c.steps == STEPS and not c.diverged)


def apart(model: rh.InterventionModel, other: rh.InterventionModel) -> float:
    a, b = (
        dict(m.tuner.layer.rh_nodes[m.active_adapter].named_parameters())  # type: ignore[index]
        for m in (model, other)
    )
    assert a.keys() == b.keys() and a
    return max(float(((a[name] - b[name]).abs().max() / b[name].abs().max()).detach()) for name in a)


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


@pytest.fixture
def setting(tokenizer, tmp_path) -> Setting:
    rows = [without(rows_of(tokenizer, 6, seed), "label") for seed in (0, 1)]
    return Setting(tokenizer, tmp_path, *rows)


def places(found: Tuning) -> list[tuple]:
    return [(c.layers, c.positions, c.rank, c.learning_rate, c.steps, c.score) for c in found]


# --- candidates are runs of their own -----------------------------------------------------------------------


def test_candidates_of_several_layers_positions_and_ranks_are_runs_of_their_own(setting):
    found = setting.tune()
    assert len({c.graph for c in found}) > 6
    assert sorted(c.steps for c in found) == [1] * 6 + [STEPS] * 2
    setting.check(found)


def test_several_nodes_and_kinds_are_runs_of_their_own(setting):
    wide = space(kinds=[EXACT, LORA], components="mlp_output", nodes=(1, 3), layers=[-1, 0, 1])
    found = setting.tune(space=wide, together=3, seed=1)
    assert {c.kind for c in found} == {"LoReFT(dtype='float64')", "LoRA(dtype='float64')"}
    assert all(len(set(c.layers)) == len(c.layers) for c in found) and max(len(c.layers) for c in found) > 1
    assert {layer for c in found for layer in c.layers} == {0, 1, 2}
    setting.check(found, seed=1)


@pytest.mark.parametrize("labels", [True, False], ids=["beside the answers", "alone"])
@pytest.mark.parametrize("layer", [0, -1], ids=["below", "above"])
def test_heads_beside_the_edits_are_trained_with_each(setting, tokenizer, labels, layer):
    parts = [rows_of(tokenizer, 6, seed) for seed in (0, 1)]
    setting.rows, setting.eval_rows = parts if labels else [without(rows, "labels") for rows in parts]
    head = rh.InterventionGraph(rh.Node(HEAD, layer, positions="l1", name="head"))
    setting.check(setting.tune(space=space(kinds=EXACT, layers=[1, 2], beside=head)))


def test_a_searched_head_is_a_run_of_its_own(setting, tokenizer):
    setting.rows, setting.eval_rows = (without(rows_of(tokenizer, 6, seed), "labels") for seed in (0, 1))
    heads = space(kinds=lambda rank: HEAD, positions=["l1", "f1"])  # as with probes, where to read
    setting.check(setting.tune(space=heads))


def test_where_nothing_can_be_reused_they_take_turns_and_are_runs_of_their_own(setting, monkeypatch):
    monkeypatch.setattr(Eligibility, "why_plain", lambda self, call=None: "the base model has dropout")
    setting.check(setting.tune(trials=3))


def test_rows_of_adapters_with_other_graphs_see_nothing_of_each_other(setting):
    found = setting.tune(space=space(kinds=[EXACT, BROKEN], positions=["l1", "l2"]), together=8)
    assert 0 < sum(c.diverged for c in found) < len(found)
    assert {c.kind.split("(")[0] for c in found if c.diverged} == {"Broken"}
    setting.check(found)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_search_of_which_every_candidate_diverges_says_so_and_leaves_the_model_as_it_was(setting):
    base = llama().double()
    modules, ids = [name for name, _ in base.named_modules()], torch.arange(6)[None]
    logits = base(ids).logits
    with pytest.raises(FloatingPointError, match="each of the 4 candidates .* became NaN or infinite: lower"):
        setting.tune(base=base, space=space(kinds=BROKEN), trials=4)
    assert [name for name, _ in base.named_modules()] == modules
    assert torch.equal(base(ids).logits, logits)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"budget": 0}, "a budget is a time above 0"),
        ({"budget": "ten minutes"}, "such as '10min', '90s'.*got 'ten minutes'"),
        ({"budget": True}, "a budget is a time above 0"),
        ({"trials": 0}, "trials must be a whole number from 1 up, got 0"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"together": 0}, "together must be a whole number"),
        ({"direction": "up"}, "direction must be 'minimize' or 'maximize', got 'up'"),
        ({"direction": "maximize"}, "the held-out loss is minimised"),
        ({"metric": lambda *given: 0.0}, "a metric needs a direction"),
        ({"space": rh.Space(layers=[0, 7])}, "the space has layer 7, but the model has 3: use -3 to 2"),
        ({"space": rh.Space(layers=[-4])}, "the space has layer -4"),
        ({"space": rh.Space(layers=[0], nodes=2)}, "nodes=2 at 1 layers"),
        ({"space": rh.Space(rank=(1, 99))}, "rank 99 is over the width 32"),
        ({"space": rh.Space(kinds=rh.LoRA)}, "LoRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_is_no_search_is_an_error_before_anything_runs(setting, options, says):
    base = llama().double()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=says):
        setting.tune(base=base, **options)
    assert [name for name, _ in base.named_modules()] == modules


@pytest.mark.parametrize(
    "options, says",
    [
        ({"positions": ["l1", "last"]}, "cannot read positions 'last'"),
        ({"positions": []}, "positions of a space is empty"),
        ({"layers": []}, "layers of a space is empty"),
        ({"layers": ["1"]}, "layers of a space must be integers"),
        ({"layers": 1.5}, "layers of a space must be a list"),
        ({"rank": (8, 2)}, "rank of a space must be one of, or a rising pair of, whole numbers from 1 up"),
        ({"rank": 0}, "rank of a space"),
        ({"lr": (0, 1e-2)}, "lr of a space must be one of, or a rising pair of, numbers above 0"),
        ({"lr": float("nan")}, "lr of a space"),
        ({"kinds": [rh.LoReFT(rank=2)]}, "kinds of a space must be classes"),
        ({"kinds": rh.LinearHead}, "LinearHead of a space's kinds is called with rank=1"),
        ({"kinds": lambda rank: rank}, "makes 1, which is no intervention"),
        ({"components": "final_norm_output"}, "components of a space are those of a block"),
        ({"beside": HEAD}, "beside must be an InterventionGraph"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_is_no_space_is_an_error(options, says):
    with pytest.raises(ValueError, match=says):
        rh.Space(**options)


@pytest.mark.parametrize("name", ["rows", "eval_rows"])
@pytest.mark.parametrize("value, says", [([], "is empty"), (iter([]), "must be rows in a list or Dataset")])
def test_rows_that_are_none_are_an_error(setting, name, value, says):
    setattr(setting, name, value)
    with pytest.raises(ValueError, match=f"{name} {says}"):
        setting.tune()


def test_without_optuna_the_error_names_the_extra(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'reftheads\[tune\]'"):
        setting.tune()


# --- a search that was killed -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(monkeypatch, passes: int) -> list[int]:
    """Let a search end by a kill when it has trained so many passes; return a list that grows with each."""
    train: Callable[..., Any] = Passes.train
    trained: list[int] = []

    def counted(self, candidates, steps):
        if len(trained) == passes:
            raise Killed
        trained.append(steps)
        return train(self, candidates, steps)

    monkeypatch.setattr(Passes, "train", counted)
    return trained


def test_a_killed_search_goes_on_as_if_it_had_not_been(setting, monkeypatch):
    with monkeypatch.context() as patch:
        trained = killed_after(patch, -1)
        whole = setting.tune(trials=33, steps=16, together=16)  # two rounds
    assert 16 in trained and len(trained) > 6
    for at in (1, len(trained) - 1):
        folder = setting.folder / f"search {at}"
        with monkeypatch.context() as patch:
            first = killed_after(patch, at)
            with pytest.raises(Killed):
                setting.tune(trials=33, steps=16, together=16, directory=folder)
        with monkeypatch.context() as patch:
            rest = killed_after(patch, -1)
            resumed = setting.tune(trials=33, steps=16, together=16, directory=folder)
        assert first + rest == trained
        assert places(resumed) == places(whole)
        assert apart(resumed.model, whole.model) == 0
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


def test_a_search_that_has_ended_is_found_again_without_training(setting, monkeypatch):
    found = setting.tune(directory=setting.folder / "search")
    killed_after(monkeypatch, 0)
    again = setting.tune(directory=setting.folder / "search")
    assert places(again) == places(found) and apart(again.model, found.model) == 0
    assert again.seconds == pytest.approx(found.seconds)


def test_a_directory_of_another_search_is_an_error(setting):
    folder = setting.folder / "search"
    setting.tune(directory=folder, trials=2)
    other = llama(initializer_range=0.2).double()
    more = [*setting.rows, setting.rows[0]]
    for name, options in {
        "space": {"space": space(kinds=EXACT, rank=3)}, "base": {"base": other}, "trials": {"trials": 3},
        "budget": {"budget": "1h"}, "seed": {"seed": 1}, "steps": {"steps": 3}, "together": {"together": 2},
        "metric": {"metric": len, "direction": "minimize"},
        "args": {"args": arguments(folder, max_steps=STEPS, weight_decay=0.1)},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"a search with another {name}: .*Give another directory"):
            setting.tune(**{"directory": folder, "trials": 2} | options)
    for name in ("rows", "eval_rows"):
        before = getattr(setting, name)
        setattr(setting, name, more)
        with pytest.raises(ValueError, match=f"a search with another {name}"):
            setting.tune(directory=folder, trials=2)
        setattr(setting, name, before)
    assert setting.tune(directory=folder, trials=2).best


def test_a_directory_that_holds_something_else_or_is_damaged_is_an_error(setting):
    folder = setting.folder / "search"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, and no search"):
        setting.tune(directory=folder)
    (folder / "notes.txt").unlink()
    setting.tune(directory=folder, trials=2)
    content = json.loads((folder / "search.json").read_text())
    for passes in ([[1, [[0, "low"]], 1.0, 1.0]], ["x"], [[1, [[7, 1.0]], 1.0, 1.0]]):
        (folder / "search.json").write_text(json.dumps(content | {"passes": passes}))
        with pytest.raises(ValueError, match="is damaged|another version"):
            setting.tune(directory=folder, trials=2)
    (folder / "search.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        setting.tune(directory=folder, trials=2)


# --- the search ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_search_and_another_one_another(setting):
    first, again, other = (setting.tune(seed=seed, trials=5) for seed in (3, 3, 4))
    assert places(first) == places(again) != places(other)


def test_a_metric_judges_in_place_of_the_loss_in_its_direction(setting):
    modes = set()

    def first_token(model, tokenizer, eval_rows):
        modes.add((model.training, torch.is_grad_enabled()))
        batch = {name: value[:, :4] for name, value in rh.Collator(tokenizer)(eval_rows).items()}
        ids = model.generate(
            batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]), max_new_tokens=1, do_sample=False
        )
        return ids[:, -1].float().mean().item()

    for direction, best in (("maximize", max), ("minimize", min)):
        found = setting.tune(metric=first_token, direction=direction)
        assert found.best.score == best(c.score for c in found if c.steps == STEPS)
        assert found.judged_by == "first_token"
        found.model.eval()
        with torch.no_grad():
            assert first_token(found.model, setting.tokenizer, setting.eval_rows) == found.best.score
    assert modes == {(False, False)}


def test_rounds_after_the_first_go_by_what_was_learnt(setting):
    """Of two layers one is made to be better: the second round has more of it than chance would give."""

    def low(model, tokenizer, eval_rows):
        return float(model.plan().nodes[0].node.site.layer) + torch.rand(()).item() * 1e-3

    found = setting.tune(
        space=space(kinds=EXACT, layers=[0, 2], positions=["l1"], rank=2), trials=64, steps=1, metric=low,
        direction="minimize",
    )  # fmt: skip
    layers = [c.layers[0] for c in found]
    assert layers[:32].count(0) < 24 <= layers[32:].count(0)


def test_a_budget_of_time_is_kept_up_to_a_pass(setting, monkeypatch):
    """A clock that goes on by what a pass is made to cost, and by nothing else."""
    now, train = [0.0], Passes.train
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])
    longest = [0.0]

    def slowly(self, candidates, steps):
        scores, _ = train(self, candidates, steps)
        cost = 1.0 + 0.25 * steps
        longest[0] = max(longest[0], cost)
        now[0] += cost
        return scores, 0.25

    monkeypatch.setattr(Passes, "train", slowly)
    for budget in (1, 20, 60):
        now[0] = 0.0
        found = setting.tune(trials=None, budget=budget, steps=16)
        assert found.seconds == pytest.approx(now[0])
        assert found.best.steps == 16
        if budget > 10:
            assert budget / 2 < found.seconds <= budget + longest[0]
    assert len(found) > 8


def test_rungs_end_with_whole_trainings_and_leave_somebody_out():
    assert rungs(32, 120) == [(32, 7), (8, 30), (2, 120)]
    assert rungs(4, 120) == [(4, 7), (1, 120)]
    assert rungs(1, 120) == [(1, 120)]
    assert rungs(32, 1) == [(32, 1)]
    for size in range(1, 33):
        for steps in (1, 2, 5, 16, 100):
            sizes, lengths = zip(*rungs(size, steps), strict=True)
            assert sizes[0] == size and lengths[-1] == steps
            assert list(sizes) == sorted(set(sizes), reverse=True) and list(lengths) == sorted(set(lengths))


def test_what_is_affordable_is_the_largest_round_that_fits():
    pace = Pace(setup=1.0, step=0.5)
    costs = [pace.seconds(rungs(size, 16), 8) for size in range(1, 33)]
    for seconds in (0.0, 8.9, 9.0, 30.0, 1e9):
        size = affordable(seconds, 16, 8, pace)
        assert size == max((n for n, cost in enumerate(costs, 1) if cost <= seconds), default=0)


def test_times_are_read():
    assert [seconds_of(text) for text in ("90s", "10min", " 1.5 h ", "2m", 3, 0.5)] == [90, 600, 5400, 120, 3, 0.5]


# --- what comes out -----------------------------------------------------------------------------------------


def test_the_result_is_a_model_a_table_and_a_picture(setting):
    base = llama().double()
    found = setting.tune(base=base, space=space(kinds=[EXACT, BROKEN]))
    assert found.model.get_base_model() is base and found.model.active_adapter == "default"
    assert all(p.requires_grad == ("rh_nodes" in name) for name, p in found.model.named_parameters())
    table = found.table()
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][0] == str(found.best.number) and cells[-1][-1] == "no number"
    assert [column.header for column in table.columns][-1] == "held-out loss"
    found.plot(setting.folder / "tuned.png")
    assert (setting.folder / "tuned.png").read_bytes().startswith(b"\x89PNG")
    found.model.save_pretrained(setting.folder / "saved")
    loaded = rh.InterventionModel.from_pretrained(llama().double(), setting.folder / "saved")
    assert apart(loaded, found.model) == 0


def test_a_space_counts_layers_from_the_first_one():
    within = rh.Space(layers=range(-2, 1), kinds=EXACT).within(llama().double())
    assert within.layers == (0, 1, 2)
    assert rh.Space().within(llama()).layers == (0, 1, 2)
    assert {f.name for f in fields(within)} == within.to_dict().keys()

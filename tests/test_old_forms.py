"""What was written otherwise before 0.1.0 still works, and warns at the caller's line of the form that is right now."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.models import tiny_llama
from support.training import arguments

import reftheads as rh
import reftheads.graph
from reftheads._utils.deprecation import renamed, reordered
from reftheads.fewshot import Study
from reftheads.interop.peft_lora import merge_lora, merged, to_peft_lora
from reftheads.training import Trial

LOREFT = rh.LoReFT(rank=2)
GRAPH = rh.InterventionGraph(rh.Node(LOREFT, layer=1, positions="l1", name="edit"))


@contextmanager
def warned(*messages: str) -> Iterator[None]:
    """Within, these warnings are given and no others, each at a line of this file."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield
    old = [warning for warning in record if warning.category is DeprecationWarning]
    assert [str(warning.message) for warning in old] == list(messages)
    assert {warning.filename for warning in old} <= {__file__}


# --- the order of arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old",
    [
        lambda: rh.InterventionGraph.over([0, 2], LOREFT, "l1", tied=False),
        lambda: rh.InterventionGraph.over([0, 2], LOREFT, positions="l1", tied=False),
        lambda: rh.InterventionGraph.over([0, 2], intervention=LOREFT, positions="l1", tied=False),
    ],
)
def test_over_took_layers_first(old: Callable[[], Any]):
    message = (
        "InterventionGraph.over(layers, intervention, positions) is deprecated: use "
        "InterventionGraph.over(intervention, layers, positions)"
    )
    with warned(message):
        graph = old()
    with warned():
        assert graph == rh.InterventionGraph.over(LOREFT, [0, 2], "l1", tied=False)
        assert graph == rh.InterventionGraph.over(LOREFT, layers=[0, 2], positions="l1", tied=False)
        assert graph == rh.InterventionGraph.over(layers=[0, 2], intervention=LOREFT, positions="l1", tied=False)


def test_what_is_wrong_in_either_order_is_said_of_the_order_of_today():
    with warned(), pytest.raises(ValueError, match="add parentheses to make one"):
        rh.InterventionGraph.over(rh.LoReFT, range(2))


def test_fit_probes_took_rows_first(tokenizer):
    base = tiny_llama(vocab_size=len(tokenizer))
    rows = [{**tokenizer(text), "label": i % 2} for i, text in enumerate(["a b", "c", "d e", "f", "g h", "x"] * 4)]
    node = rh.Node(rh.LinearHead(2, target="label"), layer=1, positions="l1", name="probe")
    model = rh.InterventionModel(base, rh.InterventionGraph(node))
    options = {"seeds": (0,), "epochs": 2}
    message = "fit_probes(model, rows, tokenizer) is deprecated: use fit_probes(model, tokenizer, rows)"
    with warned(message):
        found = rh.fit_probes(model, rows, tokenizer, **options)
    with warned(message):
        assert rh.fit_probes(model, rows, tokenizer=tokenizer, **options).probes == found.probes
    with warned():
        assert rh.fit_probes(model, tokenizer, rows, **options).probes == found.probes
        assert rh.fit_probes(model, tokenizer, rows=rows, **options).probes == found.probes
        assert rh.fit_probes(model, tokenizer=tokenizer, rows=rows, **options).probes == found.probes


def test_sweep_took_the_names_of_the_trainer_and_the_graph_first(tokenizer, tmp_path):
    rows = rh.encode_pairs(tokenizer, ["a b c", "d", "e f", "g h"], ["b", "d e", "f", "x"])
    args = arguments(tmp_path, max_steps=2, logging_steps=1)

    def base() -> Any:
        return tiny_llama(vocab_size=len(tokenizer))

    order = "sweep(base, graph, args) is deprecated: use sweep(base, tokenizer, rows, graph, args)"
    names = [
        f"{old}=… of sweep is deprecated: use {new}=…"
        for old, new in (("train_dataset", "rows"), ("eval_dataset", "eval_rows"), ("processing_class", "tokenizer"))
    ]
    old = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    with warned():
        trials = rh.sweep(base(), tokenizer, rows, GRAPH, args, eval_rows=rows)[1]
        assert rh.sweep(base(), tokenizer, rows, graph=GRAPH, args=args, eval_rows=rows)[1] == trials
    with warned(order, *names):
        assert rh.sweep(base(), GRAPH, args, **old)[1] == trials
    with warned(order, *names):
        assert rh.sweep(base(), GRAPH, args=args, **old)[1] == trials
    with warned(*names):
        assert rh.sweep(base(), graph=GRAPH, args=args, **old)[1] == trials


# --- the words ------------------------------------------------------------------------------------------------


def test_node_plan_and_summary_took_adapter(capsys):
    model = rh.InterventionModel(tiny_llama(), GRAPH)
    for place in ("InterventionModel", "InterventionTuner"):
        asked = model if place == "InterventionModel" else model.tuner
        message = f"adapter=… of {place}.{{}} is deprecated: use adapter_name=…"
        with warned(message.format("node")):
            assert asked.node("edit", adapter="default") is model.node("edit", adapter_name="default")
        with warned(message.format("plan")):
            assert asked.plan(adapter="default") is model.plan(adapter_name="default")
        with warned(message.format("summary")):
            asked.summary(adapter="default")
    shown = capsys.readouterr().out
    model.summary("default")
    assert shown == capsys.readouterr().out * 2


def test_trials_had_an_adapter():
    trial = Trial("trial_0", 1e-3, 0)
    with warned("Trial.adapter is deprecated: use Trial.adapter_name"):
        assert trial.adapter == "trial_0"


def test_conversions_to_lora_took_adapter(tmp_path):
    def model() -> rh.InterventionModel:
        return rh.InterventionModel(base := tiny_llama(), rh.preset("lora2", base))

    message = "adapter=… of {} is deprecated: use adapter_name=…"
    with warned(message.format("to_peft_lora")):
        to_peft_lora(model(), tmp_path, adapter="default")
    with warned(message.format("merged")), merged(model(), adapter="default"):
        pass
    with warned(message.format("merge_lora")):
        merge_lora(model(), adapter="default")


def test_what_writes_files_took_a_folder(tmp_path):
    message = "folder=… of {} is deprecated: use directory=…"
    with warned(message.format("ActivationStore")):
        assert rh.ActivationStore(folder=tmp_path / "store").directory == tmp_path / "store"
    with warned(message.format("Study")):
        assert Study(folder=tmp_path / "study", steps=3).directory == tmp_path / "study"
    head = rh.Node(rh.LinearHead(2), layer=1, positions="l1", name="head")
    model = rh.InterventionModel(tiny_llama(), rh.InterventionGraph(head))
    with warned(message.format("export_head")):
        rh.export_head(model, "head", folder=tmp_path / "head")
    with warned():
        rh.export_head(model, "head", directory=tmp_path / "again")
    assert (tmp_path / "head/head.json").read_text() == (tmp_path / "again/head.json").read_text()


def test_plan_summary_printed_what_reuse_summary_returns(capsys):
    model = rh.InterventionModel(tiny_llama(), GRAPH)
    with warned(
        "InterventionModel.plan_summary(batch) is deprecated: use print(InterventionModel.reuse_summary(batch))"
    ):
        model.plan_summary()
    assert capsys.readouterr().out == model.reuse_summary() + "\n"


# --- where names are imported from ----------------------------------------------------------------------------

MOVED = {
    "reftheads.graph": "Context Edit Head Reader Shape Tokens",
    "reftheads.interventions": "LowRank",
    "reftheads.probing": "Estimate Probe Probes",
    "reftheads.runtime": "compile_graph",
    "reftheads.training": "Trial",
}


@pytest.mark.parametrize("package, name", [(package, name) for package in MOVED for name in MOVED[package].split()])
def test_names_for_authors_of_node_types_have_left_the_top_level(package: str, name: str):
    assert name not in rh.__all__ and name not in dir(rh)
    with warned(f"reftheads.{name} is deprecated: use from {package} import {name}"):
        moved = getattr(rh, name)
    with warned():
        assert moved is getattr(importlib.import_module(package), name)
        assert name in importlib.import_module(package).__all__


def test_a_moved_name_can_still_be_imported_from_the_top_level():
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        from reftheads import Edit
    assert Edit is reftheads.graph.Edit
    assert {(str(w.message), w.filename) for w in record} == {
        ("reftheads.Edit is deprecated: use from reftheads.graph import Edit", __file__)
    }


def test_completion_shows_what_users_use():
    assert dir(rh) == sorted([*rh.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'reftheads' has no attribute 'LoReTF'"):
        rh.LoReTF  # noqa: B018


# --- the helpers ----------------------------------------------------------------------------------------------


@reordered("b", "a", a=str)
@renamed(old="new")
def example(a: str, b: int = 0, *, new: int = 0) -> tuple[str, int, int]:
    """What it does."""
    return a, b, new


def test_a_wrapped_function_is_what_it_was():
    assert (example.__name__, example.__doc__, example("x", 1, new=2)) == ("example", "What it does.", ("x", 1, 2))
    with warned("example(b, a) is deprecated: use example(a, b)", "old=… of example is deprecated: use new=…"):
        assert example(1, "x", old=2) == ("x", 1, 2)  # type: ignore[arg-type,call-arg]


def test_a_keyword_by_both_of_its_names_is_an_error():
    with pytest.raises(TypeError, match=r"example\(\) got new=… and its old name old=…: leave old out"):
        example("x", new=1, old=2)  # type: ignore[call-arg]

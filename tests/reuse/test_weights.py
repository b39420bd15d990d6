"""The weights of a base model are read once to be told apart, and never where they are not at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from support.models import tiny_llama
from support.processes import run_together
from support.replay import check, head, intervened, loreft, step, usual_batch

import reftheads as rh
from reftheads.reuse import fingerprint
from reftheads.reuse.store import ActivationStore


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each tensor of weights had that was read to be hashed."""
    read: list[int] = []
    original = fingerprint.content

    def content(tensor: torch.Tensor) -> bytes:
        if tensor.is_floating_point():  # or else it is of rows
            read.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(fingerprint, "content", content)
    return read


def probing() -> tuple[rh.InterventionModel, Any, list[dict[str, Any]]]:
    """Return the embedded model with a head and an edit, its tokenizer, and rows for them."""
    base, tokenizer = rh.load_base("tiny-chat")
    node = rh.Node(rh.LinearHead(2, target="y"), 1, positions="l1", name="head")
    model = rh.InterventionModel(base, rh.InterventionGraph(node, loreft(2)))
    return model, tokenizer, [{**tokenizer(f"a word {letter}"), "y": i % 2} for i, letter in enumerate("abcdefgh")]


def test_the_weights_are_hashed_once_whatever_is_done_with_a_model(hashed: list[int]) -> None:
    model, tokenizer, rows = probing()
    whole = sum(tensor.numel() for tensor in model.get_base_model().parameters())
    batch = rh.Collator(tokenizer)(rows)
    store, other = ActivationStore(2**28), ActivationStore(2**28)
    with model.reusing(store):
        step(model, batch)
    read = len(hashed)
    assert whole <= sum(hashed) < 2 * whole  # weights that are tied have two names
    for _ in range(3):
        for kept in (store, other):
            with model.reusing(kept):  # as README shows it: a block around each step
                step(model, batch)
    with model.reusing(store):
        model.eval().generate(**tokenizer(["a word"], return_tensors="pt"), max_new_tokens=2)
    rh.predict(model, tokenizer, rows)
    rh.fit_probes(model, tokenizer, rows, eval_rows=rows, method="closed", seeds=(0,), store=store)
    model.add_adapter("more", rh.InterventionGraph(loreft(3)))
    with model.reusing(store):
        step(model, batch)
    model.reuse_summary(batch)
    assert len(hashed) == read


def test_nothing_is_hashed_where_nothing_is_kept(hashed: list[int]) -> None:
    model, tokenizer, rows = probing()
    rh.predict(model, tokenizer, rows)
    rh.fit_probes(model, tokenizer, rows, eval_rows=rows, method="closed", seeds=(0,))
    with model.reusing():
        step(model, rh.Collator(tokenizer)(rows))
    model.reuse_summary()
    assert not hashed


def on_the_cpu(base: Any, folder: Path) -> None:
    accelerate.cpu_offload(base)


def on_disk(base: Any, folder: Path) -> None:
    accelerate.disk_offload(base, folder)


def in_part_on_disk(base: Any, folder: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 2 else "cpu" for i in range(6)}
    accelerate.dispatch_model(base, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("offload", [on_the_cpu, on_disk, in_part_on_disk])
@pytest.mark.parametrize("first", [True, False], ids=["then a graph", "a graph first"])
def test_weights_that_are_kept_elsewhere_take_the_plain_path(
    offload: Callable[[Any, Path], None], first: bool, tmp_path: Path, hashed: list[int]
) -> None:
    if offload is in_part_on_disk and not first:
        pytest.skip("accelerate wants a device for every weight, also for those of the graph")
    base, tokenizer = rh.load_base("tiny-chat")
    if first:
        offload(base, tmp_path)
    graph = rh.InterventionGraph(rh.Node(rh.LinearHead(2, target="y"), 1, positions="l1", name="head"), loreft(2))
    model = rh.InterventionModel(base, graph).eval()
    if not first:
        offload(base, tmp_path)
    rows = [{**tokenizer(f"a word {letter}"), "y": i % 2} for i, letter in enumerate("abcdefgh")]
    batch, store = rh.Collator(tokenizer)(rows), ActivationStore(2**28)
    prompt = tokenizer(["a word"], return_tensors="pt") | {"max_new_tokens": 2, "do_sample": False}
    plain, generated = model(**batch), model.generate(**prompt)
    with model.reusing(store):
        assert torch.equal(model(**batch).loss, plain.loss)
        assert torch.equal(model.generate(**prompt), generated)
    torch.testing.assert_close(rh.predict(model, tokenizer, rows)["head"], plain.predictions["head"])
    rh.fit_probes(model, tokenizer, rows, eval_rows=rows, method="closed", seeds=(0,), store=store)
    assert "nothing: weights of the base model are on disk, or kept elsewhere" in model.reuse_summary(batch)
    assert not hashed and not len(store)


SHARDED = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import reftheads as rh
from support import processes
from support.models import tiny_llama
from support.replay import loreft, usual_batch

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for first in (True, False):
    base = tiny_llama()
    model = None if first else rh.InterventionModel(base, rh.InterventionGraph(loreft(1)))
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    model = model or rh.InterventionModel(base, rh.InterventionGraph(loreft(1)))
    batch = usual_batch()
    for _ in range(2):  # after a pass, some weights are whole for a while
        plain = model(**batch).loss
        with model.reusing(rh.ActivationStore()) as used:
            assert torch.equal(model(**batch).loss, plain)
            assert "spread over processes" in used.why_plain()
processes.leave()
"""


def test_weights_that_are_spread_over_processes_take_the_plain_path() -> None:
    run_together(SHARDED)


def test_a_change_of_the_weights_is_seen_within_a_block() -> None:
    model, batch, store = (
        intervened(tiny_llama(), head(0), loreft(1)),
        usual_batch(targets=True),
        ActivationStore(2**28),
    )
    with model.reusing(store):
        before = step(model, batch).loss
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.weight.mul_(2)
        after = step(model, batch)
    assert not torch.allclose(after.loss, before)
    check(after, step(model, batch), 1e-4)

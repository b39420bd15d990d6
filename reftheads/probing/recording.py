"""What the heads of a graph see of every row, recorded in one pass over the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reftheads._utils.eval_mode import evaluating
from reftheads._utils.memory import free_bytes
from reftheads.adapter.model import InterventionModel
from reftheads.architectures.structure import arguments
from reftheads.data.rows import prompt_mask
from reftheads.graph.intervention import Params
from reftheads.inference.prediction import batches, device_of, reusing_where_possible
from reftheads.interventions.heads import MappingHead
from reftheads.probing.targets import Column
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class _Eye(MappingHead):
    """Stand in for a head while activations are recorded, and predict what it sees.

    Its target is the number of an item, so that what a head sees finds its target, and its row, as in training.
    """

    seen: list[Tensor] | None = None  # shared by the heads of a site; None: another head keeps it
    items: list[Tensor] = field(default_factory=list)

    @property
    def target_width(self) -> None:
        return None

    @classmethod
    def of(cls, head: MappingHead, seen: list[Tensor] | None) -> _Eye:
        return cls(2, head.target, pool=head.pool, shift=head.shift, seen=seen)

    def layers_of(self, width: int) -> list[nn.Linear]:
        raise NotImplementedError("it learns nothing")

    def map(self, p: Params, h: Tensor) -> Tensor:
        return h

    def check(self, *args: Any, **kwargs: Any) -> None:
        pass

    def loss_of(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        self.items.append(target[valid])
        if self.seen is not None:
            self.seen.append(prediction[valid])
        return prediction.new_zeros(())


@dataclass(frozen=True)
class Seen:
    """Hold what one head sees of the items that have a target."""

    planned: PlannedNode
    head: MappingHead
    site: int
    x: Float[Tensor, "items width"]
    items: Int[Tensor, " items"]


def record(
    model: InterventionModel,
    planned: Sequence[PlannedNode],
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Column],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    store: ActivationStore | None,
) -> list[Seen]:
    """Run the rows through the model, those of like length together, and return what each head sees."""
    sites: dict[Any, list[Tensor]] = {}
    eyes: list[_Eye] = []
    modules = [model.node(str(p.node.name)) for p in planned]
    heads = [module.intervention for module in modules]
    keys = []
    for p, module, head in zip(planned, modules, heads, strict=True):
        assert isinstance(head, MappingHead)
        keys.append((p.address, p.node.positions, head.pool, module.dtype))
        new = keys[-1] not in sites
        eyes.append(_Eye.of(head, sites.setdefault(keys[-1], []) if new else None))
    _check_memory(planned, keys, rows, model)
    with torch.no_grad(), evaluating(model), _instead(model, dict(zip(modules, eyes, strict=True))):
        with reusing_where_possible(model, store):
            for _, batch in batches(
                _inputs(model, rows, columns), tokenizer, batch_size, device_of(model), "recording"
            ):
                model(**batch)
    numbers = {key: i for i, key in enumerate(sites)}
    every = {key: torch.cat(sites.pop(key)) for key in list(sites)}
    seen = []
    for p, key, eye, head in zip(planned, keys, eyes, heads, strict=True):
        assert isinstance(head, MappingHead)
        items = torch.cat(eye.items)
        values = columns[str(head.target)].values.to(items.device)
        present = head.given(values)[items.clamp(min=0)]
        keep = (items >= 0) & (present if present.ndim == 1 else present.any(1))
        whole = bool(keep.all())
        seen.append(Seen(p, head, numbers[key], every[key] if whole else every[key][keep], items[keep]))
    return seen


@contextmanager
def _instead(model: InterventionModel, eyes: Mapping[NodeModule, _Eye]) -> Iterator[None]:
    """Let these stand in for their heads for as long as it lasts, while other heads have no targets."""
    nodes = [m for m in model.modules() if isinstance(m, NodeModule) and isinstance(m.intervention, MappingHead)]
    before = {node: node.intervention for node in nodes}
    try:
        for node, head in before.items():
            node.intervention = eyes.get(node) or replace(head, target=None)  # type: ignore[type-var]
        yield
    finally:
        for node, head in before.items():
            node.intervention = head


def _inputs(
    model: InterventionModel, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]
) -> list[dict[str, Any]]:
    """Return the rows as the model takes them, with the numbers of items for targets.

    Labels become a prompt mask where that will do, since with labels the whole model would run.
    """
    base = model.get_base_model()
    names = {*arguments(base), "prompt_mask"} - columns.keys()
    encoded = []
    for i, row in enumerate(rows):
        taken = {name: value for name, value in row.items() if name in names}
        if "labels" in taken and model.tuner.layer.kind.generative and not model.tuner.layer.kind.seq2seq:
            labels = torch.as_tensor(taken.pop("labels")).tolist()
            if isinstance(labels, list):
                taken.setdefault("prompt_mask", prompt_mask(labels))
        encoded.append(taken | {name: column.index[i] for name, column in columns.items()})
    return encoded


def _check_memory(
    planned: Sequence[PlannedNode],
    keys: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    model: InterventionModel,
) -> None:
    """Raise `ValueError` where what is recorded could take more than half of the free memory."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    needed = 0
    for (address, _, pool, dtype), p in dict(zip(keys, planned, strict=True)).items():
        bound = 1 if pool else p.node.positions.bound
        items = int((lengths if bound is None else lengths.clamp(max=bound)).sum())
        needed += items * address.width * (4 if dtype is None else dtype.itemsize)
    free = free_bytes(device_of(model))
    if needed > free / 2:
        raise ValueError(
            f"what {len(planned)} probes see of {len(rows)} rows takes up to {needed / 2**30:.3g} GiB, and "
            f"{free / 2**30:.3g} GiB are free, of which half may be used: give fewer rows, probe fewer sites at a "
            "time, select fewer tokens by positions=…, or train the heads by InterventionTrainer"
        )

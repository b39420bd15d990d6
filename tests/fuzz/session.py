"""A case with its model, and the reference with the same parameters."""

import copy
from typing import Any

import torch

import reftheads as rh
from fuzz.draw import Case
from fuzz.expected import Leaves, Oracle
from fuzz.places import ARCHS, base_of


class Session:
    """A case with its model, whose parameters are random, and the reference."""

    def __init__(self, case: Case):
        self.case = case
        self.arch = ARCHS[case.arch]
        self.graphs = {name: rh.InterventionGraph(*(s.node() for s in specs)) for name, specs in case.adapters.items()}
        names = [*case.adapters]
        self.base = copy.deepcopy(base_of(case.arch))
        self.model = rh.InterventionModel(self.base, self.graphs[names[0]], names[0])
        for name in names[1:]:
            self.model.add_adapter(name, self.graphs[name])
        self.model.double().eval()
        self.leaves: Leaves = {}
        torch.manual_seed(case.number)
        for name in names:
            for node in self.graphs[name]:
                self._randomise(name, node)
        self.oracle = Oracle(case, self.graphs, self.leaves)
        self.use(names[0])

    def _randomise(self, adapter: str, node: Any) -> None:
        """Give a node random parameters, the same to the reference."""
        key = (adapter, node.share or node.name)
        if key in self.leaves:
            return
        module = self.model.node(node.name, adapter)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_((torch.randn(parameter.shape) * 0.5).float())
        self.leaves[key] = {
            name: tensor.detach().clone().requires_grad_(isinstance(tensor, torch.nn.Parameter))
            for name, tensor in module.stored().items()
        }

    def use(self, *adapters: str) -> None:
        """Let these adapters act, one after the other, and be trained."""
        self.active = list(adapters)
        self.model.set_adapter(self.active)

    @property
    def has_dropout(self) -> bool:
        """Whether an edit is random in training mode."""
        edits = [node.intervention for graph in self.graphs.values() for node in graph]
        return any(getattr(getattr(edit, "inner", edit), "dropout", 0) for edit in edits)

    @property
    def for_all(self) -> list[list[str]]:
        """Of every row, the adapters that act now."""
        return [self.active for _ in self.case.rows]

    @property
    def shares(self) -> list[list[str]]:
        """Of every row, the adapter that it names."""
        return [[] if name == "__base__" else [name] for name in self.case.shares]

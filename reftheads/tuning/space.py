"""Which graphs may be tried: layers, positions, ranks, learning rates, kinds of edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from reftheads._utils.random_numbers import same_random_numbers
from reftheads.architectures.structure import stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Intervention
from reftheads.graph.positions import Positions
from reftheads.graph.serialisation import intervention_to_dict
from reftheads.graph.site import BLOCK_COMPONENTS
from reftheads.interventions.reft import LoReFT
from reftheads.runtime.plan import compile_graph


class Draw(Protocol):
    """What chooses, such as a trial of Optuna."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Candidate:
    """Hold one graph that was tried, and what became of it.

    Attributes:
        number: in the order of the search.
        graph: with its learning rate, all that a training needs.
        layers, positions, component, kind, rank: what the search has chosen of it.
        learning_rate: that too.
        steps: for how many it was trained the last time.
        score: its held-out loss, or metric, then; `None` if it was no number.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.tuning import Candidate
        >>> graph = rh.InterventionGraph.over(rh.LoReFT(rank=4), [2], positions="l1")
        >>> Candidate(0, graph, (2,), "l1", "block_output", "LoReFT", 4, 0.01, steps=40, score=0.3).diverged
        False
        ```
    """

    number: int
    graph: InterventionGraph
    layers: tuple[int, ...]
    positions: str
    component: str
    kind: str
    rank: int
    learning_rate: float
    steps: int = 0
    score: float | None = None

    @property
    def diverged(self) -> bool:
        """Return whether its loss became NaN or infinite."""
        return self.steps > 0 and self.score is None


@dataclass(frozen=True)
class Space:
    """Say what `tune` may choose: every list is a choice, every pair a range, and what stands alone is fixed.

    Args:
        layers: of the blocks to edit; negative ones count from the end. `None` for all.
        positions: rules, as `Node` takes them.
        rank: of every node.
        lr: learning rate, on a logarithmic scale, as the rank is.
        kinds: what is done there, each called as `kind(rank=…)`: a class such as `rh.LoReFT`, or a
            `functools.partial` of one with other options.
        components: where in the block.
        nodes: how many layers are edited, each by a node of the same kind, rank and positions.
        beside: nodes that every candidate has besides, such as a head.

    Raises:
        ValueError: an empty choice, a range that is none, positions or components that there are not, a kind that
            makes no intervention of a rank.

    Example:
        ```python
        >>> import reftheads as rh
        >>> space = rh.Space(layers=range(2, 5), positions=["l1", "f1+l1"], rank=4, lr=(1e-3, 1e-2))
        >>> space.layers, space.rank
        ((2, 3, 4), (4, 4))
        ```
    """

    layers: Sequence[int] | None = None
    positions: Sequence[Any] = ("l1", "f1+l1", "f7+l7", "prompt", "all")
    rank: int | tuple[int, int] = (1, 16)
    lr: float | tuple[float, float] = (1e-4, 2e-2)
    kinds: Sequence[Callable[..., Intervention]] = (LoReFT,)
    components: Sequence[str] = ("block_output",)
    nodes: int | tuple[int, int] = 1
    beside: InterventionGraph | None = None

    def __post_init__(self) -> None:
        single = {"positions": str | int | Positions, "components": str, "kinds": Callable, "layers": int}
        for name, alone in single.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _choices(name, [value] if isinstance(value, alone) else value))
        for name, kind in (("rank", int), ("nodes", int), ("lr", float)):
            object.__setattr__(self, name, _range(name, getattr(self, name), kind))
        object.__setattr__(self, "positions", tuple(Positions.parse(rule) for rule in self.positions))
        for component in self.components:
            if component not in BLOCK_COMPONENTS:
                known = ", ".join(BLOCK_COMPONENTS)
                raise ValueError(f"components of a space are those of a block, got {component!r}: use {known}")
        for kind in self.kinds:
            _made(kind, self.rank[0])  # type: ignore[index]
        if self.beside is not None and not isinstance(self.beside, InterventionGraph):
            raise ValueError(f"beside must be an InterventionGraph, or None, got {self.beside!r}")

    def within(self, base: nn.Module) -> Space:
        """Return the space with its layers counted from the first one, once every choice is known to fit a model.

        Raises:
            ValueError: layers that the model does not have, a rank over a width, a kind that does not go with a
                component.
        """
        blocks = next((len(stack.blocks) for stack in reversed(stacks(base)) if stack.blocks), 0)
        if not blocks:
            raise ValueError(
                f"no transformer blocks recognised in this {type(base).__name__}: there is no layer to edit"
            )
        layers = range(blocks) if self.layers is None else self.layers
        unknown = [layer for layer in layers if not -blocks <= layer < blocks]
        if unknown:
            raise ValueError(
                f"the space has layer {unknown[0]}, but the model has {blocks}: use {-blocks} to {blocks - 1}"
            )
        found = Space(
            tuple(sorted({layer % blocks for layer in layers})), self.positions, self.rank, self.lr, self.kinds,
            self.components, self.nodes, self.beside,
        )  # fmt: skip
        if found.nodes[1] > len(found.layers):  # type: ignore[index,arg-type]
            raise ValueError(
                f"nodes={found.nodes[1]} at {len(found.layers)} layers: give more layers, or fewer nodes"  # type: ignore[index,arg-type]
            )
        for kind in found.kinds:
            for component in found.components:
                graph = found._graph(kind, found.rank[1], found.layers, found.positions[0], component)  # type: ignore[index,arg-type]
                with same_random_numbers():
                    for planned in compile_graph(graph, base).nodes:
                        planned.new_module()
        return found

    def draw(self, number: int, draw: Draw) -> Candidate:
        """Return a candidate of a space that is `within` a model."""
        layers: Any = self.layers
        kinds = {_name(kind): kind for kind in self.kinds}
        rules = {str(rule): rule for rule in self.positions}
        kind = draw.suggest_categorical("kind", list(kinds))
        component = draw.suggest_categorical("component", list(self.components))
        positions = draw.suggest_categorical("positions", list(rules))
        rank = draw.suggest_int("rank", *self.rank, log=True)  # type: ignore[misc]
        rate = draw.suggest_float("lr", *self.lr, log=True)  # type: ignore[misc]
        chosen: list[int] = []
        for i in range(draw.suggest_int("nodes", *self.nodes)):  # type: ignore[misc]
            at = draw.suggest_int(f"layer {i}", 0, len(layers) - 1)
            while at in chosen:  # the next one that is free
                at = (at + 1) % len(layers)
            chosen.append(at)
        there = tuple(layers[at] for at in sorted(chosen))
        graph = self._graph(kinds[kind], rank, there, rules[positions], component)
        return Candidate(number, graph, there, positions, component, kind, rank, rate)

    def _graph(
        self, kind: Callable[..., Intervention], rank: int, layers: Sequence[int], positions: Any, component: str
    ) -> InterventionGraph:
        graph = InterventionGraph.over(_made(kind, rank), layers, positions, component=component)
        return graph if self.beside is None else graph + self.beside

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, equal for equal spaces.

        Raises:
            ValueError: positions that are a function, which no file can hold.
        """
        return {
            "layers": None if self.layers is None else list(self.layers),
            "positions": [rule.to_json() for rule in self.positions],
            "rank": list(self.rank),  # type: ignore[arg-type]
            "lr": list(self.lr),  # type: ignore[arg-type]
            "kinds": [intervention_to_dict(_made(kind, self.rank[0])) for kind in self.kinds],  # type: ignore[index]
            "components": list(self.components),
            "nodes": list(self.nodes),  # type: ignore[arg-type]
            "beside": None if self.beside is None else self.beside.to_dict(),
        }


def _choices(name: str, value: Any) -> tuple[Any, ...]:
    try:
        choices = tuple(dict.fromkeys(value))
    except TypeError:
        raise ValueError(f"{name} of a space must be a list of choices, got {value!r}") from None
    if not choices:
        raise ValueError(f"{name} of a space is empty: give at least one choice")
    if name == "layers" and not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in choices):
        raise ValueError(f"layers of a space must be integers, got {value!r}")
    if name == "kinds" and not all(map(callable, choices)):
        raise ValueError(f"kinds of a space must be classes such as rh.LoReFT, called with rank=…, got {value!r}")
    return choices


def _range(name: str, value: Any, kind: type) -> tuple[Any, Any]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    numbers = int if kind is int else (int, float)
    right = len(pair) == 2 and all(isinstance(n, numbers) and not isinstance(n, bool) for n in pair)
    if not right or not 0 < pair[0] <= pair[1] < float("inf"):
        whole = "whole numbers from 1 up" if kind is int else "numbers above 0"
        raise ValueError(f"{name} of a space must be one of, or a rising pair of, {whole}, got {value!r}")
    return kind(pair[0]), kind(pair[1])


def _made(kind: Callable[..., Intervention], rank: int) -> Intervention:
    try:
        made: Any = kind(rank=rank)
    except TypeError as error:
        raise ValueError(f"{_name(kind)} of a space's kinds is called with rank={rank}: {error}") from None
    if not isinstance(made, Intervention):
        raise ValueError(f"{_name(kind)} of a space's kinds makes {made!r}, which is no intervention")
    return made


def _name(kind: Callable[..., Any]) -> str:
    if isinstance(kind, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in kind.keywords.items())
        return f"{_name(kind.func)}({options})"
    return getattr(kind, "__name__", repr(kind))

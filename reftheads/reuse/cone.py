"""The cone of influence: which part of a forward pass a graph can change, and which part it needs.

An edit reaches the layers above its own and, where tokens see only earlier ones, the tokens from its own
on. A reader that no edit comes before reads what the base model computes. All else is the same in every
epoch and under every set of parameters, so that it can be computed once and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reftheads.architectures.structure import StackInfo
from reftheads.runtime.plan import PlannedNode


@dataclass(frozen=True)
class Differences:
    """Say which parts of reuse give something else than the plain path, and what; `None`: that part does not.

    Attributes:
        prefix: leaving out the beginnings of rows.
        layers: leaving out the first blocks.
        everything: whatever is left out.
    """

    prefix: str | None = None
    layers: str | None = None
    everything: str | None = None


@dataclass(frozen=True)
class Cone:
    """Say which part of a forward pass some nodes can change, in the one stack of a model that is fed its input.

    Attributes:
        stack: that stack: the encoder of an encoder-decoder model, the only one of any other.
        first: the node that acts first in it, readers left out that look at a hidden state and nothing else;
            `None` without such a node.
        cut: how many of the first blocks compute what no edit can change. The hidden state that leaves the
            last of them is what is replayed.
        constant: the readers that see what the base model computes, whatever the parameters are.
        inside: all other nodes of the stack.
        elsewhere: whether nodes act in another stack.
        differences: what a comparison with the plain path has shown.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.reuse import Cone
        >>> base, _ = rh.load_base("tiny-chat")
        >>> edit = rh.Node(rh.LoReFT(rank=4), layer=3, positions="l1", name="edit")
        >>> plan = rh.InterventionModel(base, rh.InterventionGraph(edit)).plan()
        >>> cone = Cone.of(plan.nodes, plan.stacks[0])
        >>> f"{cone.cut} of {len(plan.stacks[0].blocks)} blocks compute what {cone.first.node.name!r} cannot change"
        "4 of 6 blocks compute what 'edit' cannot change"
        ```
    """

    stack: StackInfo
    first: PlannedNode | None
    cut: int
    constant: tuple[PlannedNode, ...]
    inside: tuple[PlannedNode, ...]
    elsewhere: bool
    differences: Differences = Differences()

    @classmethod
    def of(cls, nodes: Sequence[PlannedNode], stack: StackInfo) -> Cone:
        """Return the cone of `nodes`, of one graph or of several that act together, in the order in which they act."""
        here = [planned for planned in nodes if planned.address.stack == stack.path]
        changing = [planned for planned in here if not _reads_alone(planned)]
        first = min(changing, key=lambda planned: _turn(planned, stack), default=None)
        before = _turn(first, stack) if first is not None else (len(stack.blocks) + 1, 0)
        constant = tuple(planned for planned in here if _reads_alone(planned) and _turn(planned, stack) < before)
        return cls(
            stack=stack,
            first=first,
            cut=len(stack.blocks) if first is None else _blocks_before(first, stack),
            constant=constant,
            inside=tuple(planned for planned in here if planned not in constant),
            elsewhere=len(here) < len(nodes),
        )

    def with_all_layers(self, why: str | None) -> Cone:
        """Return the cone of which every block runs in every step, and every reader reads anew."""
        different = replace(self.differences, layers=why)
        return replace(self, cut=0, constant=(), inside=self.nodes, differences=different)

    @property
    def nodes(self) -> tuple[PlannedNode, ...]:
        """Return all nodes of the stack."""
        return (*self.constant, *self.inside)

    @property
    def deepest_constant(self) -> int:
        """Return how many blocks must run for the constant readers."""
        return max((_blocks_for(planned, self.stack) for planned in self.constant), default=0)

    @property
    def deepest(self) -> int:
        """Return how many blocks must run for the nodes of the stack, where nothing else is asked for."""
        return max((_blocks_for(planned, self.stack) for planned in self.inside if not planned.edits), default=0)


def _reads_alone(planned: PlannedNode) -> bool:
    """Return whether a node reads, and all that it sees is the tensor at its address."""
    what = planned.node.intervention
    return not (planned.edits or what.needs_linear or planned.node.source or planned.address.order is None)


def _turn(planned: PlannedNode, stack: StackInfo) -> tuple[int, int]:
    """Return when a node acts; one whose place in its block is unknown acts as early as can be."""
    return planned.address.order or (_block_of(planned, stack), -1)


def _block_of(planned: PlannedNode, stack: StackInfo) -> int:
    """Return the block that a module path lies in; -1 for what may run before all of them."""
    inside = (i for i, block in enumerate(stack.blocks) if f"{planned.address.module}.".startswith(f"{block}."))
    return next(inside, -1)


def _blocks_before(planned: PlannedNode, stack: StackInfo) -> int:
    """Return how many blocks are done when the tensor at a node's address exists."""
    layer = _turn(planned, stack)[0]
    leaves_block = planned.address.side == "output" and planned.address.module in stack.blocks
    return min(max(layer, 0) + leaves_block, len(stack.blocks))


def _blocks_for(planned: PlannedNode, stack: StackInfo) -> int:
    """Return how many blocks must run, the last of them in part, until a node has acted."""
    if planned.address.order is None and _block_of(planned, stack) < 0:
        return len(stack.blocks)
    return min(_turn(planned, stack)[0] + 1, len(stack.blocks))

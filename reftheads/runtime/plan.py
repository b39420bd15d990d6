"""Compiling: a graph and a model give a plan, in which every node knows its module, widths and turn."""

from dataclasses import dataclass

from torch import nn

from reftheads._utils.lazy import cached
from reftheads.architectures.addresses import Address, StackInfo, arguments, locate, stacks
from reftheads.architectures.blocks import reads_other_stack
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Edit, Head, Node, NodeModule, Shape


@dataclass(frozen=True)
class PlannedNode:
    """A node that has found its place in a model."""

    node: Node
    address: Address
    shape: Shape

    @cached
    def edits(self) -> bool:
        """Whether the node writes; it reads otherwise."""
        return isinstance(self.node.intervention, Edit)

    @cached
    def may_use_a_mask(self) -> bool:
        """Whether its selection may be a mask where there are few tokens: a reader's slots are seen by others."""
        return self.edits and self.node.source is None

    @cached
    def sees_other_tokens(self) -> bool:
        """Whether the module works on the tokens of another stack than the one that runs it."""
        return reads_other_stack(self.address.module)

    def new_module(self) -> NodeModule:
        """Fresh parameters. Raises `ValueError` where they cannot be made for this shape, such as a rank over it."""
        try:
            return NodeModule(self.node.intervention, self.shape)
        except ValueError as error:
            raise ValueError(f"node {self.node.name!r} at {self.node.site}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """A graph compiled against one model. It holds no parameters and has changed nothing yet."""

    graph: InterventionGraph
    nodes: tuple[PlannedNode, ...]
    stacks: tuple[StackInfo, ...]

    def of_stack(self, path: str) -> tuple[PlannedNode, ...]:
        """The nodes that act in one stack, in the order of the graph."""
        return self._by_stack.get(path, ())

    def only_prompts(self, path: str) -> bool:
        """Whether all nodes of a stack act on tokens of the prompt alone."""
        return path not in self._beyond_prompts

    @cached
    def _beyond_prompts(self) -> frozenset[str]:
        return frozenset(p.address.stack for p in self.nodes if not p.node.positions.in_prompt)

    @cached
    def _by_stack(self) -> dict[str, tuple[PlannedNode, ...]]:
        paths = dict.fromkeys(planned.address.stack for planned in self.nodes)
        return {path: tuple(p for p in self.nodes if p.address.stack == path) for path in paths}

    @cached
    def targets(self) -> tuple[str, ...]:
        """The columns of a batch that the graph's heads are trained on."""
        heads = (planned.node.intervention for planned in self.nodes)
        return tuple(dict.fromkeys(h.target for h in heads if isinstance(h, Head) and h.target is not None))

    def __getitem__(self, name: str) -> PlannedNode:
        return next(planned for planned in self.nodes if planned.node.name == name)

    def owners(self) -> dict[str, PlannedNode]:
        """The sets of parameters to make: each key once, with the first node that uses it."""
        found: dict[str, PlannedNode] = {}
        for planned in self.nodes:
            found.setdefault(planned.node.key, planned)
        return found


def compile_graph(graph: InterventionGraph, model: nn.Module) -> Plan:
    """Finds every node's place in `model` and checks that the graph can run there.

    Raises:
        ValueError: an address that the model does not have, a target that is an input of it, a node that needs a
            linear module where there is none, a module outside of the stacks of blocks, shared parameters at sites of
            different widths, a source that does not run before its reader.
    """
    planned = tuple(_place(node, model) for node in graph)
    plan = Plan(graph, planned, stacks(model))
    _check_targets(plan, model)
    owners = plan.owners()
    for one in planned:
        path = one.address.module
        if one.node.site.is_path and not any(
            f".{path}.".startswith(f".{s.path}." if s.path else ".") for s in plan.stacks
        ):
            raise ValueError(
                f"node {one.node.name!r}: nodes act while the blocks run, and {path!r} is called outside of "
                f"{' and '.join(repr(s.path) for s in plan.stacks) or 'any'}: use a module within"
            )
        first = owners[one.node.key]
        if first.shape != one.shape:
            raise ValueError(
                f"nodes {first.node.name!r} and {one.node.name!r} share {one.node.key!r}, but see {first.shape} and "
                f"{one.shape} features: share only among sites of one width"
            )
        if one.node.source is not None:
            _check_order(plan, plan[one.node.source], one)
    return plan


def _place(node: Node, model: nn.Module) -> PlannedNode:
    address = locate(model, node.site)
    module = model.get_submodule(address.module)
    input_width = next((w for n in ("in_features", "nx") if isinstance(w := getattr(module, n, None), int)), None)
    if node.intervention.needs_linear and (input_width is None or address.side == "input"):
        raise ValueError(
            f"{type(node.intervention).__name__} acts on the output of a linear module, but {node.site} is the "
            f"{address.side} of {address.module or 'the model'!r} ({type(module).__name__}): use a component such as "
            "query_output, or the path of a projection"
        )
    if reads_other_stack(address.module) and str(node.positions) != "all":
        raise ValueError(
            f"node {node.name!r}: {address.module!r} sees the encoder's tokens, while its stack runs the decoder's: "
            f"only positions 'all' have a meaning there, got {str(node.positions)!r}"
        )
    return PlannedNode(node, address, Shape(address.width, input_width if node.intervention.needs_linear else None))


def _check_targets(plan: Plan, model: nn.Module) -> None:
    inputs = {*arguments(model), "prompt_mask"}
    taken = next((name for name in plan.targets if name in inputs and name != "labels"), None)
    if taken is not None:
        raise ValueError(
            f"the target {taken!r} of a head is an input of the model, which would miss it: copy it to a column of "
            "another name, with -100 on padding"
        )


def _check_order(plan: Plan, source: PlannedNode, reader: PlannedNode) -> None:
    turn = {stack.path: i for i, stack in enumerate(sorted(plan.stacks, key=lambda s: s.role != "encoder"))}
    listed = {one.node.name: i for i, one in enumerate(plan.nodes)}
    before, after = (
        (turn.get(one.address.stack, 0), one.address.order, listed[one.node.name]) for one in (source, reader)
    )
    if before[1] is None or after[1] is None:
        if before[0] != after[0]:
            return
        raise ValueError(
            f"cannot tell whether {source.node.name!r} runs before {reader.node.name!r}, since one of them names a "
            "module whose place in its block is unknown: use a component of the vocabulary"
        )
    if before > after:
        raise ValueError(
            f"node {reader.node.name!r} at {reader.node.site} reads {source.node.name!r} at {source.node.site}, which "
            "runs later: a source must lie before its reader"
        )

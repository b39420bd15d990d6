"""Compiling: a graph and a model give a plan, in which every node knows its module, widths and turn."""

from dataclasses import dataclass

from torch import nn

from reftheads._utils.lazy import cached
from reftheads.architectures.address import Address
from reftheads.architectures.addresses import locate
from reftheads.architectures.names import reads_other_stack
from reftheads.architectures.paths import arguments, within
from reftheads.architectures.sharding import Parts, holds_a_part, parts_of
from reftheads.architectures.structure import StackInfo, Structure
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Edit, Head, Shape
from reftheads.graph.node import Node
from reftheads.graph.site import Side
from reftheads.runtime.node_module import NodeModule


@dataclass(frozen=True)
class PlannedNode:
    """Say where in a model a node acts, and on how many features.

    Attributes:
        node: as the graph has it.
        address: its place.
        shape: the features that it sees there.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.runtime import compile_graph
        >>> graph = rh.InterventionGraph(rh.Node(rh.LoRA(rank=4), layer=3, component="mlp_output", name="lora"))
        >>> planned = compile_graph(graph, rh.load_base("tiny-chat")[0])["lora"]
        >>> planned.address.module, str(planned.shape), planned.edits
        ('model.layers.3.mlp.down_proj', '384 → 192', True)
        ```
    """

    node: Node
    address: Address
    shape: Shape

    @cached
    def edits(self) -> bool:
        """Return whether the node writes; it reads otherwise."""
        return isinstance(self.node.intervention, Edit)

    @cached
    def may_use_a_mask(self) -> bool:
        """Return whether its selection may be a mask where there are few tokens: others see a reader's slots."""
        return self.edits and self.node.source is None

    @cached
    def sees_other_tokens(self) -> bool:
        """Return whether the module works on the tokens of another stack than the one that runs it."""
        return reads_other_stack(self.address.module)

    def new_module(self) -> NodeModule:
        """Make new parameters.

        Raises:
            ValueError: they cannot be made for this shape, such as a rank over it.
        """
        try:
            return NodeModule(self.node.intervention, self.shape)
        except (ValueError, RuntimeError, OverflowError) as error:  # torch's, of sizes that no memory could hold
            raise ValueError(f"node {self.node.name!r} at {self.node.site}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """Hold a graph compiled against one model. It has no parameters and has changed nothing yet.

    Attributes:
        graph: as it was written.
        nodes: its nodes, in the same order, with their places.
        stacks: the model's stacks of blocks.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.runtime import compile_graph
        >>> head = rh.Node(rh.LinearHead(2, target="mood"), layer=-1, positions="l1", name="mood")
        >>> plan = compile_graph(rh.InterventionGraph(head), rh.load_base("tiny-chat")[0])
        >>> plan.targets, plan["mood"].address.module
        (('mood',), 'model.layers.5')
        ```
    """

    graph: InterventionGraph
    nodes: tuple[PlannedNode, ...]
    stacks: tuple[StackInfo, ...]

    def of_stack(self, path: str) -> tuple[PlannedNode, ...]:
        """Return the nodes that act in one stack, in the order of the graph."""
        return self._by_stack.get(path, ())

    @cached
    def readers(self) -> tuple[PlannedNode, ...]:
        """Return the nodes that read, in the order of the graph."""
        return tuple(planned for planned in self.nodes if not planned.edits)

    def only_prompts(self, path: str) -> bool:
        """Return whether all nodes of a stack act on tokens of the prompt alone."""
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
        """Return the columns of a batch that the graph's heads are trained on."""
        heads = (planned.node.intervention for planned in self.nodes)
        return tuple(dict.fromkeys(h.target for h in heads if isinstance(h, Head) and h.target is not None))

    def __getitem__(self, name: str) -> PlannedNode:
        return next(planned for planned in self.nodes if planned.node.name == name)

    def owners(self) -> dict[str, PlannedNode]:
        """Return the sets of parameters to make: each key once, with the first node that uses it."""
        by_key: dict[str, PlannedNode] = {}
        for planned in self.nodes:
            by_key.setdefault(planned.node.key, planned)
        return by_key


def compile_graph(graph: InterventionGraph, model: nn.Module) -> Plan:
    """Find every node's place in `model` and check that the graph can run there.

    Raises:
        ValueError: an address that the model does not have, a target that is an input of it, a node that needs a
            linear module where there is none, a module outside of the stacks of blocks, shared parameters at sites of
            different widths, a source that does not run before its reader, a tensor of which tensor parallelism gives
            each process a part.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.runtime import compile_graph
        >>> graph = rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), layer=-1, name="edit"))
        >>> compile_graph(graph, rh.load_base("tiny-chat")[0])["edit"].address.module
        'model.layers.5'
        ```
    """
    structure = Structure.of(model)
    plan = Plan(graph, tuple(_place(node, structure) for node in graph), structure.stacks)
    _check_targets(plan, model)
    owners = plan.owners()
    parts = parts_of(model)
    for planned in plan.nodes:
        _check_runs(plan, planned)
        _check_whole(planned, parts)
        owner = owners[planned.node.key]
        if owner.shape != planned.shape:
            raise ValueError(
                f"nodes {owner.node.name!r} and {planned.node.name!r} share {planned.node.key!r}, but see "
                f"{owner.shape} and {planned.shape} features: share only among sites of one width"
            )
        if planned.node.source is not None:
            _check_order(plan, plan[planned.node.source], planned)
    return plan


def _place(node: Node, structure: Structure) -> PlannedNode:
    """Find the place of a node in a model."""
    model = structure.model
    address = locate(model, node.site, structure)
    module = model.get_submodule(address.module)
    input_width = _input_width(module)
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


def _input_width(module: nn.Module) -> int | None:
    """Return how many features enter a linear module; `None` for another module."""
    for attribute in ("in_features", "nx"):  # of `nn.Linear` and those like it, and of `Conv1D`
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    return None


def _check_runs(plan: Plan, planned: PlannedNode) -> None:
    """Raise `ValueError` for a module that is called while no blocks run."""
    path = planned.address.module
    if planned.node.site.is_path and not any(within(path, info.path) for info in plan.stacks):
        raise ValueError(
            f"node {planned.node.name!r}: nodes act while the blocks run, and {path!r} is called outside of "
            f"{' and '.join(repr(info.path) for info in plan.stacks) or 'any'}: use a module within"
        )


def _check_whole(planned: PlannedNode, parts: Parts) -> None:
    """Raise `ValueError` where a process sees a part of the features, which a node would take for all of them."""
    node, path = planned.node, planned.address.module
    sides: list[Side] = ["input", "output"] if node.intervention.needs_linear else [planned.address.side]
    cut = next((side for side in sides if holds_a_part(parts, path, side)), None)
    if cut is not None:
        raise ValueError(
            f"node {node.name!r} at {node.site}: tensor parallelism gives each process a part of what is at the {cut} "
            f"of {path!r}, and a node needs all of its features: use block_output, attention_output or mlp_output "
            "(LoRA: a linear module that is whole), or load the model without tp_plan"
        )


def _check_targets(plan: Plan, model: nn.Module) -> None:
    """Raise `ValueError` for a target that is an input of the model."""
    inputs = {*arguments(model), "prompt_mask"} - {"labels"}
    taken = next((name for name in plan.targets if name in inputs), None)
    if taken is not None:
        raise ValueError(
            f"the target {taken!r} of a head is an input of the model, which would miss it: copy it to a column of "
            "another name, with -100 on padding"
        )


def _check_order(plan: Plan, source: PlannedNode, reader: PlannedNode) -> None:
    """Raise `ValueError` for a source that does not run before its reader, for certain."""
    paths = [info.path for info in sorted(plan.stacks, key=lambda info: info.role != "encoder")]  # encoders run first
    if source.address.stack != reader.address.stack and source.node.positions.bound != 1:
        raise ValueError(
            f"node {reader.node.name!r} reads {source.node.name!r} at positions {str(source.node.positions)!r} of "
            "another stack, whose tokens are not its own: a source there selects one token a row, such as 'l1'"
        )
    stacks_of = [paths.index(one.address.stack) if one.address.stack in paths else 0 for one in (source, reader)]
    if source.address.order is None or reader.address.order is None:
        if stacks_of[0] != stacks_of[1]:
            return
        raise ValueError(
            f"cannot tell whether {source.node.name!r} runs before {reader.node.name!r}, since one of them names a "
            "module whose place in its block is unknown: use a component of the vocabulary"
        )
    listed = [plan.nodes.index(one) for one in (source, reader)]
    before, after = zip(stacks_of, (source.address.order, reader.address.order), listed, strict=True)
    if before > after:
        raise ValueError(
            f"node {reader.node.name!r} at {reader.node.site} reads {source.node.name!r} at {source.node.site}, which "
            "runs later: a source must lie before its reader"
        )

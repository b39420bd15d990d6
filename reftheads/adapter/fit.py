"""Whether weights fit: the tensors that a graph needs in a model, and those of the base that may come with them."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reftheads._utils.memory import free_bytes
from reftheads._utils.random_numbers import same_random_numbers
from reftheads._utils.showing import shown
from reftheads.adapter.embeddings import embeddings_of
from reftheads.adapter.files import read_weights
from reftheads.architectures.paths import CHILD
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import Plan, PlannedNode

_PREFIX = "base_model.model."
_NODES = f"{CHILD}.rh_nodes."


def split(weights: Mapping[str, Tensor], prefix: str = _PREFIX) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of nodes, and the others, each under its name within the graph or the base model.

    Args:
        prefix: before the names of the base model's own, beside that which a `PeftModel` puts there.

    Raises:
        ValueError: two tensors for one name.
    """
    short = {key: key.removeprefix(_PREFIX).removeprefix(prefix) for key in weights}
    if len(set(short.values())) < len(weights):
        twice = next(name for name in short.values() if list(short.values()).count(name) > 1)
        raise ValueError(f"the adapter has two tensors {shown(twice)}: save or copy it again")
    nodes = {name.removeprefix(_NODES): weights[key] for key, name in short.items() if name.startswith(_NODES)}
    return nodes, {name: weights[key] for key, name in short.items() if not name.startswith(_NODES)}


def outline(plan: Plan) -> dict[str, NodeModule]:
    """Return the modules that a compiled graph needs, by key, without memory for their parameters.

    Raises:
        ValueError: parameters that cannot be made.
    """
    return {key: _outline(planned) for key, planned in plan.owners().items()}


def _outline(planned: PlannedNode) -> NodeModule:
    try:
        with torch.device("meta"):
            return planned.new_module()
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    with same_random_numbers():  # a type of one's own that looks at the numbers with which it begins
        return planned.new_module()


def check_memory(plan: Plan) -> None:
    """Raise `ValueError` for a graph whose parameters are larger than the memory that is free for them."""
    tensors = [tensor for module in outline(plan).values() for tensor in module.stored().values()]
    needed, free = sum(tensor.nbytes for tensor in tensors), free_bytes()
    if needed > free:
        raise ValueError(
            f"the graph has parameters of {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: take "
            "smaller ranks, heads or hidden layers"
        )


def check_file(path: str, plan: Plan, base: nn.Module, embeddings: Iterable[str] | None) -> None:
    """Raise `ValueError` unless a file holds what a compiled graph needs in a base model; nothing is made for that.

    Args:
        embeddings: names of those tensors of the base that come with it.
    """
    nodes, beside = split(read_weights(path)[0])
    check_nodes(nodes, outline(plan))
    check_beside(beside, base, embeddings)


def check_nodes(weights: Mapping[str, Tensor], modules: Mapping[str, NodeModule]) -> None:
    """Raise `ValueError` unless these are the tensors of nodes, and such that can be computed with.

    Args:
        weights: by the key of a node and the name of its parameter, joined by a dot.
        modules: of the nodes, by key.
    """
    check_weights(
        weights, {f"{key}.{name}": tensor for key, node in modules.items() for name, tensor in node.stored().items()}
    )
    for key, node in modules.items():
        stored = {name: weights[f"{key}.{name}"] for name in node.stored()}
        try:
            node.intervention.check_parameters(stored)
        except ValueError as error:
            raise ValueError(f"node {key!r}: {error}") from error
        if not all(tensor.isfinite().all() for tensor in stored.values()):
            warnings.warn(f"node {key!r} has parameters that are not finite: its training diverged", stacklevel=2)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `weights` are exactly the tensors that are expected, in their shapes and kinds."""
    problems = [f"no weights for {key!r}" for key in expected if key not in weights]
    problems += [f"weights for {shown(key)}, which the graph does not have" for key in weights if key not in expected]
    for key in expected.keys() & weights.keys():
        if weights[key].shape != expected[key].shape:
            shapes = tuple(weights[key].shape), tuple(expected[key].shape)
            problems.append(f"{key!r} has shape {shapes[0]}, and this model needs {shapes[1]}")
        elif _kind(weights[key]) != _kind(expected[key]):
            problems.append(f"{key!r} holds {weights[key].dtype}, and this model needs {expected[key].dtype}")
    if problems:
        raise ValueError(
            f"the adapter does not fit this model: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. "
            "Load it onto the model that it was trained on"
        )


def check_beside(weights: Mapping[str, Tensor], base: nn.Module, declared: Iterable[str] | None) -> None:
    """Raise `ValueError` unless these are the embeddings of the base model that the configuration names.

    Args:
        weights: what an adapter holds besides its nodes' tensors, by its name in the base model.
        declared: the names in the configuration.
    """
    names, known = set(declared or ()), embeddings_of(base)
    for name in sorted(weights.keys() | names):
        if name not in known:
            raise ValueError(
                f"the adapter would overwrite {shown(name)} of the base model, and an adapter brings its own tensors "
                "and embeddings alone: do not load it, or take this tensor out"
            )
        if name not in names:
            raise ValueError(
                f"the adapter would overwrite {name!r} of the base model, which its configuration does not announce: "
                "if you trust it, name that tensor under 'embeddings' in its adapter_config.json"
            )
        if name not in weights:
            raise ValueError(f"the adapter announces {name!r} of the base model, and does not hold it: save it again")
        if weights[name].shape != known[name].shape:
            rows, own = len(weights[name]) if weights[name].ndim else 1, len(known[name])
            raise ValueError(
                f"the adapter brings {name!r} of {rows} tokens in shape {tuple(weights[name].shape)}, and this model "
                f"has {own} in {tuple(known[name].shape)}: call resize_token_embeddings({rows}) of the base model first"
            )
    check_weights(weights, {name: known[name] for name in weights})


def _kind(tensor: Tensor) -> Any:
    """Return what of a dtype must agree: floats become each other, everything else stays what it is."""
    return "float" if tensor.is_floating_point() else tensor.dtype

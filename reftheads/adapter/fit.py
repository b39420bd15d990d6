"""Whether weights fit: the tensors that a graph needs in a model, and those of the base that may come with them."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from reftheads._utils.memory import free_bytes
from reftheads._utils.showing import shown
from reftheads.adapter.files import read_weights
from reftheads.runtime.plan import Plan

CHILD = "interventions"
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


def planned_tensors(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors that a compiled graph needs, by name, without memory for them.

    Raises:
        ValueError: parameters that cannot be made.
    """
    with torch.device("meta"):
        modules = {key: planned.new_module() for key, planned in plan.owners().items()}
    return {f"{key}.{name}": tensor for key, module in modules.items() for name, tensor in module.stored().items()}


def check_memory(plan: Plan, model: nn.Module) -> None:
    """Raise `ValueError` for a graph whose parameters are larger than the memory that is free for them."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in planned_tensors(plan).values())
    if needed > 2**24 and needed > free_bytes():
        raise ValueError(
            f"the graph has parameters of {needed / 1e9:,.1f} GB, and {free_bytes() / 1e9:,.1f} GB of memory are free: "
            "take smaller ranks, heads or hidden layers"
        )


def check_file(path: str, plan: Plan, base: nn.Module, embeddings: Iterable[str] | None) -> None:
    """Raise `ValueError` unless a file holds what a compiled graph needs in a base model; nothing is made for that.

    Args:
        embeddings: names of those tensors of the base that come with it.
    """
    nodes, beside = split(read_weights(path)[0])
    check_weights(nodes, planned_tensors(plan))
    check_beside(beside, base, embeddings)


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
                f"the adapter would overwrite {shown(name)} of the base model, and an adapter brings its own tensors and "
                "embeddings alone: do not load it, or take this tensor out"
            )
        if name not in names:
            raise ValueError(
                f"the adapter would overwrite {name!r} of the base model, which its configuration does not announce: if "
                "you trust it, name that tensor under 'embeddings' in its adapter_config.json"
            )
        if name not in weights:
            raise ValueError(f"the adapter announces {name!r} of the base model, and does not hold it: save it again")
        if weights[name].shape != known[name].shape:
            rows, own = len(weights[name]) if weights[name].ndim else 1, len(known[name])
            raise ValueError(
                f"the adapter brings {name!r} of {rows} tokens in shape {tuple(weights[name].shape)}, and this model has "
                f"{own} in {tuple(known[name].shape)}: call resize_token_embeddings({rows}) of the base model first"
            )
    check_weights(weights, {name: known[name] for name in weights})


def embeddings_of(base: Any) -> dict[str, Tensor]:
    """Return the tensors of a base model's input and output embeddings by name; none, where it cannot say which."""
    modules = []
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # of no language model
            modules.append(getattr(base, f"get_{side}_embeddings")())
    paths = [path for path, module in base.named_modules() if any(module is one for one in modules)]
    return {f"{path}.{name}": tensor for path in paths for name, tensor in base.get_submodule(path).state_dict().items()}


def _kind(tensor: Tensor) -> Any:
    """Return what of a dtype must agree: floats become each other, everything else stays what it is."""
    return "float" if tensor.is_floating_point() else tensor.dtype

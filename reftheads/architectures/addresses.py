"""From an address to a module: what `Site(layer=3, component="query_output")` means in a given model.

Everything is read off the model's structure, so that an architecture needs no entry of its own: the
blocks are the outermost `ModuleList` whose members attend; the attention is the module that owns the
query, key and value projections; widths and head counts follow from the projections themselves.
What the names of the field leave open is settled by tuples of names, in `blocks` and `structure`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from reftheads.architectures.blocks import (
    ATTENDS,
    UP,
    Columns,
    as_range,
    attention_norm,
    attention_of,
    attention_owner,
    heads_of,
    index_in_range,
    known_width,
    mlp_norm,
    mlp_of,
    width_of,
)
from reftheads.architectures.paths import first_child, join, leaf, parent, submodule, within
from reftheads.architectures.structure import StackInfo, own_modules, stacks
from reftheads.graph.site import BLOCK_COMPONENTS, Side, Site, Stack


@dataclass(frozen=True)
class Address:
    """Say where in one model a site is.

    Args:
        site: the site with layer and head counted from 0, and `stack` named only if the model has two.
        module: dotted path in the base model, for `model.get_submodule`.
        side: whether the tensor enters or leaves that module.
        width: features of the site, that is, of `h[..., address.index]`.
        columns: the features of the module's last dimension that belong to the site, in the order of
            the heads; `None` means all of them.
        stack: path of the stack's module, see `StackInfo.path`; "" if it is the model itself.
        order: (layer, rank within the block), which sorts the addresses of a stack in the order of
            execution: the embeddings have layer -1, the final norm comes after the last block. `None`
            for a module path whose place cannot be told.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import locate
        >>> address = locate(rh.load_base("tiny-chat")[0], rh.Site(layer=-1, component="query_output", head=1))
        >>> address.module, address.index, address.width
        ('model.layers.5.self_attn.q_proj', slice(32, 64, None), 32)
        ```
    """

    site: Site
    module: str
    side: Side
    width: int
    columns: Columns
    stack: str
    order: tuple[int, int] | None

    @property
    def index(self) -> slice | list[int]:
        """Return what selects the site's features, `h[..., address.index]`: a slice, hence a view, if it can be."""
        if self.columns is None:
            return slice(None)
        if isinstance(self.columns, range):
            return slice(self.columns.start, self.columns.stop)
        return list(self.columns)


def locate(model: nn.Module, site: Site, known: Sequence[StackInfo] | None = None) -> Address:
    """Return the address of a site in a model, which may be a bare model or one with any head on top.

    `attention_output` and `mlp_output` are what is added to the residual stream: the output of the
    sublayer's last projection, or of the norm that stands between it and the addition (Gemma, OLMo 2),
    or of the whole module for a mixture of experts. Where a model scales that by a factor as it adds
    (Granite, BEiT), it does so after the address. `mlp_input` and the two after it have the shape
    (batch * tokens, features) in OPT, whose blocks flatten their tokens there.

    Args:
        known: what `stacks(model)` has returned, which spares a walk through the model.

    Raises:
        ValueError: a layer or head out of range, a stack that the model lacks, a component that it does
            not have (no final norm, fused experts), a model without recognisable blocks, an unknown
            module path, or one whose width cannot be told.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import locate
        >>> locate(rh.load_base("tiny-chat")[0], rh.Site(layer=0, component="mlp_activation")).module
        'model.layers.0.mlp.down_proj'
        ```
    """
    known = stacks(model) if known is None else known
    if site.is_path:
        return _locate_path(model, known, site)
    info = _choose_stack(model, known, site.stack)
    site = replace(site, stack=info.role if len(known) > 1 else None)
    if site.component == "embedding_output":
        # What enters block 0, since some models scale, add positions or project after their embeddings.
        return Address(site, info.blocks[0], "input", _residual_width(model, info), None, info.path, (-1, 0))
    if site.component == "final_norm_output":
        return _final_norm(model, info, site)
    assert site.layer is not None
    layer = index_in_range(site.layer, len(info.blocks), "layer", _name(model))
    return _locate_in_block(model, info, replace(site, layer=layer), layer)


def _choose_stack(model: nn.Module, known: Sequence[StackInfo], wanted: Stack | None) -> StackInfo:
    """Return the stack that a site means."""
    if not known:
        raise ValueError(
            f"no transformer blocks recognised in {_name(model)}: "
            "use the dotted path of a module, as in Site(component='encoder.layers.0.mlp')"
        )
    role = wanted or (known[0].role if len(known) == 1 else "decoder")
    matching = [info for info in known if info.role == role]
    if not matching:
        names = " and ".join(f"{info.role} {info.path!r}" if info.path else info.role for info in known)
        raise ValueError(f"{_name(model)} has no {role}, only its {names}: leave stack out, or name that one")
    if len(matching) > 1:
        paths = ", ".join(repr(info.path) for info in matching)
        raise ValueError(f"{_name(model)} has several {role}s ({paths}): use the dotted path of a module")
    config = getattr(model.get_submodule(matching[0].path), "config", None)
    if getattr(config, "num_hidden_groups", None) is not None:
        raise ValueError(
            f"{_name(model)} runs the same blocks several times, so that a layer has no module of its own: "
            "the dotted path of a module edits all its runs"
        )
    return matching[0]


def _final_norm(model: nn.Module, info: StackInfo, site: Site) -> Address:
    """Return the address of what leaves the norm after the last block."""
    if info.final_norm is None:
        raise ValueError(f"{_name(model)} has no final norm: block_output of layer=-1 is what leaves its last block")
    width = _residual_width(model, info)
    return Address(site, info.final_norm, "output", width, None, info.path, (len(info.blocks), 0))


def _locate_in_block(model: nn.Module, info: StackInfo, site: Site, layer: int) -> Address:
    """Return the address of a component of a block; `layer` is counted from 0."""
    component = site.component
    path = info.blocks[layer]
    where = f"layer {layer} of {_name(model)}"
    block = model.get_submodule(path)
    residual = _residual_width(model, info)

    def at(module: str, side: Side, width: int, columns: Columns = None) -> Address:
        order = (layer, BLOCK_COMPONENTS.index(component))
        return Address(site, join(path, module), side, width, columns, info.path, order)

    if component in ("block_input", "block_output"):
        return at("", "input" if component == "block_input" else "output", residual)
    if component in ("mlp_input", "mlp_activation", "mlp_output"):
        mlp = mlp_of(block, where)
        if component == "mlp_input":
            return at(mlp.input, "input", residual)
        if component == "mlp_output":
            return at(mlp_norm(block) or mlp.output, "output", residual)
        if mlp.down is None:
            raise ValueError(
                f"{where} mixes experts in {join(path, mlp.output)!r}, where a token has several "
                "mlp_activations: use mlp_input or mlp_output"
            )
        return at(mlp.down, "input", known_width(block.get_submodule(mlp.down), "input"))
    owner, out = attention_of(block, where)
    if component == "attention_input":
        return at(owner, "input", residual)
    if component == "attention_output":
        return at(attention_norm(block) or out, "output", residual)
    heads = heads_of(block, owner, out, where, _model_type(model))
    module, side, columns = heads.site(component)
    if site.head is not None:
        count = heads.kv_count if component in ("key_output", "value_output") else heads.count
        head = index_in_range(site.head, count, "head", f"{component} of {_name(model)}")
        site = replace(site, head=head)
        columns = as_range((columns or range(count * heads.dim))[head * heads.dim : (head + 1) * heads.dim])
    width = known_width(block.get_submodule(module), side) if columns is None else len(columns)
    return at(module, side, width, columns)


# --- module paths ----------------------------------------------------------------------------------------


def _locate_path(model: nn.Module, known: Sequence[StackInfo], site: Site) -> Address:
    """Return the address of one side of the module at a dotted path."""
    path = site.component
    module = None if path.startswith("interventions.") else submodule(model, path)
    if module is None:
        close = difflib.get_close_matches(path, [p for p, _ in own_modules(model)], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"{_name(model)} has no module {path!r}: {hint}")
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{path!r} is a list of modules that is never called itself: name one of its members")
    around = [info for info in known if within(path, info.path)]
    info = max(around, key=lambda info: len(info.path)) if around else None
    if site.stack is not None and (info is None or info.role != site.stack):
        raise ValueError(f"module {path!r} is not in the {site.stack} of {_name(model)}: leave stack out")
    site = replace(site, stack=info.role if info is not None and len(known) > 1 else None)
    place = _known_place(model, info, path, site.side) if info is not None else None
    width = width_of(module, site.side)
    if width is None and place is not None and place.columns is None:
        width = place.width
    if not width:
        raise ValueError(
            f"cannot tell how wide the {site.side} of {path!r} ({type(module).__name__}) is: "
            "use one of the components, or the path of a projection, norm, block, attention or MLP"
        )
    runner = info or (known[0] if known else None)
    stack = "" if runner is None else runner.path
    return Address(site, path, site.side, width, None, stack, None if place is None else place.order)


def _known_place(model: nn.Module, info: StackInfo, path: str, side: Side) -> Address | None:
    """Return the component at, or at the same step of the block as, one side of a module."""
    layer = next((i for i, block in enumerate(info.blocks) if within(path, block)), None)
    if layer is None:
        return _final_norm(model, info, Site(None, "final_norm_output")) if path == info.final_norm else None
    components: dict[str, Address] = {}
    for component in BLOCK_COMPONENTS:
        try:
            components[component] = _locate_in_block(model, info, Site(layer, component), layer)
        except ValueError:  # this block lacks it
            continue
    for address in components.values():
        if (address.module, address.side) == (path, side):
            return address
    return _in_attention(components, path) or _in_mlp(components, path, side)


def _in_attention(components: Mapping[str, Address], path: str) -> Address | None:
    """Return the component of an attention that is computed when the module at `path` runs."""
    owner, out, added = (components.get(c) for c in ("attention_input", "head_output", "attention_output"))
    if owner is None or added is None:
        return None
    if path == owner.module:
        return added if out is None or within(out.module, path) else out
    if within(owner.module, path):  # wraps the attention and its norm or residual addition
        return replace(added, order=None)
    if out is not None and path == out.module:
        return added
    projections = [components[c].module for c in ("query_output", "key_output", "value_output") if c in components]
    return owner if path in projections else None


def _in_mlp(components: Mapping[str, Address], path: str, side: Side) -> Address | None:
    """Return the component of an MLP that is computed when the module at `path` takes or gives its tensor."""
    first, down, last = (components.get(c) for c in ("mlp_input", "mlp_activation", "mlp_output"))
    if first is None or last is None:
        return None
    if path == first.module and (down is None or within(down.module, path)):
        return last
    if down is not None and path == down.module:
        return last
    if path == first.module or (leaf(path) in UP and parent(path) == first.module):
        return first if side == "input" else down
    return None


# --- widths and names --------------------------------------------------------------------------------------


def _residual_width(model: nn.Module, info: StackInfo) -> int:
    """Return the width of the residual stream: that of what a query projection reads."""
    owners = filter(None, (attention_owner(model.get_submodule(block)) for block in info.blocks))
    _, owner = next(owners)
    name = first_child(owner, ATTENDS)
    assert name is not None
    return known_width(owner.get_submodule(name), "input")


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _name(model: nn.Module) -> str:
    """Return how errors call the model."""
    return f"this {_model_type(model)}"

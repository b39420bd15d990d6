"""From an address to a module: what `Site(layer=3, component="query_output")` means in a given model.

Names propose and tensors decide, so that an architecture needs no entry of its own: the attention is the module
that owns the query, key and value projections, head counts follow from the projections themselves, and what the
names of the field leave open is settled by tuples of names, in `blocks`. One small pass through the model then
shows whether a module runs, on tensors of which shape, and what is added to the residual stream; what does not
agree is refused.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from reftheads.architectures.address import Address, as_seen, name_of
from reftheads.architectures.components import choose_stack, final_norm, locate_in_block, residual_width
from reftheads.architectures.names import UP, reads_other_stack
from reftheads.architectures.paths import CHILD, leaf, own_modules, parent, submodule, within
from reftheads.architectures.structure import StackInfo, Structure
from reftheads.architectures.widths import index_in_range, width_of
from reftheads.graph.site import BLOCK_COMPONENTS, Side, Site


def locate(model: nn.Module, site: Site, structure: Structure | None = None) -> Address:
    """Return the address of a site in a model, which may be a bare model or one with any head on top.

    `attention_output` and `mlp_output` are what is added to the residual stream: the output of the
    sublayer's last projection, or of the norm that stands between it and the addition (Gemma, OLMo 2),
    or of the whole module for a mixture of experts. Where a model scales that by a factor as it adds
    (Granite, BEiT), it does so after the address. `mlp_input` and the two after it have the shape
    (batch * tokens, features) in OPT, whose blocks flatten their tokens there.

    Args:
        structure: of this model, which spares a walk through it.

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
    structure = Structure.of(model) if structure is None else structure
    if site.is_path:
        return _locate_path(structure, site)
    info = choose_stack(structure, site.stack)
    site = replace(site, stack=info.role if len(structure.stacks) > 1 else None)
    if site.component == "embedding_output":
        # What enters block 0, since some models scale, add positions or project after their embeddings.
        width = residual_width(model, info)
        return as_seen(structure, info, Address(site, info.blocks[0], "input", width, None, info.path, (-1, 0)))
    if site.component == "final_norm_output":
        return as_seen(structure, info, final_norm(model, info, site))
    assert site.layer is not None
    layer = index_in_range(site.layer, len(info.blocks), "layer", name_of(model))
    return as_seen(structure, info, locate_in_block(structure, info, replace(site, layer=layer), layer))


# --- module paths ----------------------------------------------------------------------------------------


def _locate_path(structure: Structure, site: Site) -> Address:
    """Return the address of one side of the module at a dotted path."""
    model, known, path = structure.model, structure.stacks, site.component
    module = None if within(path, CHILD) else submodule(model, path)
    if module is None:
        close = difflib.get_close_matches(path, [p for p, _ in own_modules(model)], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"{name_of(model)} has no module {path!r}: {hint}")
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{path!r} is a list of modules that is never called itself: name one of its members")
    around = [info for info in known if within(path, info.path)]
    info = max(around, key=lambda info: len(info.path)) if around else None
    if site.stack is not None and (info is None or info.role != site.stack):
        raise ValueError(f"module {path!r} is not in the {site.stack} of {name_of(model)}: leave stack out")
    site = replace(site, stack=info.role if info is not None and len(known) > 1 else None)
    place = _known_place(structure, info, path, site.side) if info is not None else None
    width = width_of(module, site.side)
    if width is None and place is not None and place.columns is None:
        width = place.width
    stack = "" if not known else known[0].path if info is None else info.path
    order = None if place is None else place.order
    address = Address(site, path, site.side, width or 0, None, stack, order)
    address = address if reads_other_stack(path) else as_seen(structure, info, address)
    if not address.width:
        raise ValueError(
            f"cannot tell how wide the {site.side} of {path!r} ({type(module).__name__}) is: "
            "use one of the components, or the path of a projection, norm, block, attention or MLP"
        )
    return address


def _known_place(structure: Structure, info: StackInfo, path: str, side: Side) -> Address | None:
    """Return the component at, or at the same step of the block as, one side of a module."""
    model = structure.model
    layer = next((i for i, block in enumerate(info.blocks) if within(path, block)), None)
    if layer is None:
        return final_norm(model, info, Site(None, "final_norm_output")) if path == info.final_norm else None
    components: dict[str, Address] = {}
    for component in BLOCK_COMPONENTS:
        try:
            components[component] = locate_in_block(structure, info, Site(layer, component), layer)
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

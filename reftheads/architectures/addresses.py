"""From an address to a module: what `Site(layer=3, component="query_output")` means in a given model.

Names propose and tensors decide, so that an architecture needs no entry of its own: the attention is the module
that owns the query, key and value projections, head counts follow from the projections themselves, and what the
names of the field leave open is settled by tuples of names, in `blocks`. One small pass through the model then
shows whether a module runs, on tensors of which shape, and what is added to the residual stream; what does not
agree is refused.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from reftheads.architectures.blocks import (
    ATTENDS,
    UP,
    Columns,
    HeadSite,
    added_by,
    attention_norm,
    attention_of,
    attention_owner,
    heads_of,
    index_in_range,
    known_width,
    mlp_norm,
    mlp_of,
    reads_other_stack,
    width_of,
)
from reftheads.architectures.fused import heads_changed
from reftheads.architectures.paths import ancestors_of, first_child, join, leaf, own_modules, parent, submodule, within
from reftheads.architectures.probe import ROWS, TOKENS, Observation
from reftheads.architectures.structure import StackInfo, Structure
from reftheads.graph.site import BLOCK_COMPONENTS, Side, Site, Stack

Form = Literal["rows", "columns", "filled"]
"""How a tensor holds tokens: "rows", [rows columns width], or [rows·columns width] as where OPT and mixtures of experts
flatten them; "columns", [columns rows width], as in FSMT; "filled", [rows columns+more width], as in Longformer, which
fills up its rows to a multiple of its window."""


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
        form: of the tensor, see `Form`.
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
    form: Form = "rows"

    @property
    def index(self) -> slice | list[int]:
        """Return what selects the site's features, `h[..., address.index]`: a slice, hence a view, if it can be."""
        if self.columns is None:
            return slice(None)
        if isinstance(self.columns, range):
            return slice(self.columns.start, self.columns.stop)
        return list(self.columns)


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
    info = _choose_stack(structure, site.stack)
    site = replace(site, stack=info.role if len(structure.stacks) > 1 else None)
    if site.component == "embedding_output":
        # What enters block 0, since some models scale, add positions or project after their embeddings.
        width = _residual_width(model, info)
        return _as_seen(structure, info, Address(site, info.blocks[0], "input", width, None, info.path, (-1, 0)))
    if site.component == "final_norm_output":
        return _as_seen(structure, info, _final_norm(model, info, site))
    assert site.layer is not None
    layer = index_in_range(site.layer, len(info.blocks), "layer", _name(model))
    return _as_seen(structure, info, _locate_in_block(structure, info, replace(site, layer=layer), layer))


def _choose_stack(structure: Structure, wanted: Stack | None) -> StackInfo:
    """Return the stack that a site means."""
    model, name = structure.model, _name(structure.model)
    known = [info for info in structure.stacks if info.blocks]
    if not known:
        raise ValueError(
            f"no transformer blocks recognised in {name}: {structure.why_no_blocks}: use the dotted path of a module, "
            "as in Site(component='encoder.layers.0.mlp')"
        )
    role = wanted or (known[0].role if len(known) == 1 else "decoder")
    matching = [info for info in known if info.role == role]
    if not matching and wanted is None:
        matching = known
    if not matching:
        names = " and ".join(f"{info.role} {info.path!r}" if info.path else info.role for info in known)
        raise ValueError(f"{name} has no {role}, only its {names}: leave stack out, or name that one")
    if len(matching) == 1:
        return matching[0]
    fed = sorted((info for info in matching if _is_fed(model, info)), key=lambda info: -len(info.path))
    if not fed or (len(fed) > 1 and len(fed[0].path) == len(fed[1].path)):
        paths = ", ".join(repr(info.path) for info in matching)
        raise ValueError(f"{name} has several {role}s ({paths}): use the dotted path of a module")
    return fed[0]


def _is_fed(model: nn.Module, info: StackInfo) -> bool:
    """Return whether a stack is the one that gets the embedded tokens of the input."""
    embeddings = None
    with suppress(Exception):  # some models have none, and say so by an error of their own
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    paths = [path for path, module in own_modules(model) if module is embeddings]
    return any(within(path, info.path) for path in paths)


def _final_norm(model: nn.Module, info: StackInfo, site: Site) -> Address:
    """Return the address of what leaves the norm after the last block."""
    if info.final_norm is None:
        raise ValueError(f"{_name(model)} has no final norm: block_output of layer=-1 is what leaves its last block")
    width = _residual_width(model, info)
    return Address(site, info.final_norm, "output", width, None, info.path, (len(info.blocks), 0))


def _as_seen(structure: Structure, info: StackInfo | None, address: Address) -> Address:
    """Return an address with the form and width of the tensor that was seen there.

    Raises:
        ValueError: the pass that was to reach the module did not, or showed a tensor of which no column belongs to a
            token.
    """
    observation, path = structure.observation, address.module
    of_blocks = None if info is None else structure.seen(info)
    reached = of_blocks is not None or (info is not None and not info.blocks and bool(observation.modules))
    if not reached:
        return address
    where = f"{address.side} of {path or 'the model'!r} in {_name(structure.model)}"
    if path not in observation.modules:
        if _is_chosen(observation, path):
            return address
        raise ValueError(
            f"{path!r} does not run when {_name(structure.model)} does, or under another name: nothing would happen "
            "there. Use the path of a module around it"
        )
    seen = observation.modules[path]
    shape = seen.entered if address.side == "input" else seen.left
    if shape is None:
        raise ValueError(
            f"the {where} is no tensor of one shape: nodes need [rows, columns, width]. Use another module's path"
        )
    of_text = of_blocks.of_text if of_blocks is not None else observation.of_text
    form = _form(shape, of_text, of_blocks is None or of_blocks.by_token)
    if form is None:
        raise ValueError(
            f"the {where} has the shape {list(shape)} for {ROWS} rows of {TOKENS} tokens, whose columns are not these "
            "tokens: use another module's path"
        )
    width = shape[-1] if address.columns is None else address.width
    return replace(address, width=width, form=form)


def _form(shape: tuple[int, ...], of_text: bool, by_token: bool) -> Form | None:
    """Return how a tensor that was seen holds the tokens of the pass; `None` if it does not."""
    if not of_text:
        return "rows" if len(shape) == 3 and shape[0] == ROWS else None
    if shape[:-1] in ((ROWS, TOKENS), (ROWS * TOKENS,)):
        return "rows"
    if shape[:-1] == (TOKENS, ROWS):
        return "columns"
    # filled up to a multiple of a window, not one stream beside the other
    padded = len(shape) == 3 and shape[0] == ROWS and shape[1] > TOKENS and shape[1] % TOKENS
    return "filled" if padded and by_token else None


def _is_chosen(observation: Observation, path: str) -> bool:
    """Return whether a module lies in a member of a list that did not run while others did: an expert not chosen."""
    above = [path, *ancestors_of(path)]
    return any(parent(member) in observation.lists and member not in observation.modules for member in above)


def _locate_in_block(structure: Structure, info: StackInfo, site: Site, layer: int) -> Address:
    """Return the address of a component of a block; `layer` is counted from 0."""
    model, component = structure.model, site.component
    path = info.blocks[layer]
    where = f"layer {layer} of {_name(model)}"
    block = model.get_submodule(path)
    residual = _residual_width(model, info)

    def at(module: str, side: Side, width: int, columns: Columns = None, step: str = component) -> Address:
        order = (layer, BLOCK_COMPONENTS.index(step))
        return Address(site, join(path, module), side, width, columns, info.path, order)

    if component in ("block_input", "block_output"):
        return at("", "input" if component == "block_input" else "output", residual)
    if component in ("attention_output", "mlp_output") and path in structure.steps(info):
        return at(added_by(block, structure.steps(info)[path], component, where), "output", residual)
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
    heads = heads_of(block, owner, out, component, where, _model_type(model))
    if component != "head_output":
        outputs = heads_of(block, owner, out, "head_output", where, _model_type(model))
        _check_order_of_heads(structure, info, path, heads, outputs, where)
    if site.head is not None:
        head = index_in_range(site.head, len(heads.heads), "head", f"{component} of {_name(model)}")
        site = replace(site, head=head)
    whole = width_of(block.get_submodule(heads.module), heads.side)
    columns = heads.columns(whole, site.head)
    width = len(columns) if columns is not None else whole or 0
    step = "query_output" if heads.fused else component  # a fused projection gives all three at once
    return at(heads.module, heads.side, width, columns, step)


def _check_order_of_heads(
    structure: Structure, info: StackInfo, block: str, heads: HeadSite, outputs: HeadSite, where: str
) -> None:
    """Raise `ValueError` if features of the first head of a fused projection change what other heads give."""
    seen = structure.seen(info)
    if seen is None or not heads.fused:
        return
    paths = join(block, heads.module), join(block, outputs.module)
    changed = heads_changed(structure.model, seen.part, paths[0], heads.heads[0], paths[1])
    group = len(outputs.heads) // len(heads.heads)
    own = {column for features in outputs.heads[:group] for column in features}
    if changed is not None and (not changed or changed - own):
        raise ValueError(
            f"{where}: the order of queries, keys and values in {heads.module!r} is not a known one, since a change of "
            f"{len(heads.heads[0])} features changes {len(changed)} of {outputs.module!r}'s: use a module path"
        )


# --- module paths ----------------------------------------------------------------------------------------


def _locate_path(structure: Structure, site: Site) -> Address:
    """Return the address of one side of the module at a dotted path."""
    model, known, path = structure.model, structure.stacks, site.component
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
    place = _known_place(structure, info, path, site.side) if info is not None else None
    width = width_of(module, site.side)
    if width is None and place is not None and place.columns is None:
        width = place.width
    stack = "" if not known else known[0].path if info is None else info.path
    order = None if place is None else place.order
    address = Address(site, path, site.side, width or 0, None, stack, order)
    address = address if reads_other_stack(path) else _as_seen(structure, info, address)
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
        return _final_norm(model, info, Site(None, "final_norm_output")) if path == info.final_norm else None
    components: dict[str, Address] = {}
    for component in BLOCK_COMPONENTS:
        try:
            components[component] = _locate_in_block(structure, info, Site(layer, component), layer)
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
    """Return the width of the residual stream: that of what a query projection reads; 0 if that cannot be told."""
    for path in info.blocks:
        owner = attention_owner(model.get_submodule(path))
        name = None if owner is None else first_child(owner[1], ATTENDS)
        if owner is not None and name is not None:
            return width_of(owner[1].get_submodule(name), "input") or 0
    return 0


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _name(model: nn.Module) -> str:
    """Return how errors call the model."""
    return f"this {_model_type(model)}"

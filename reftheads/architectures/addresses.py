"""From an address to a module: what `Site(layer=3, component="query_output")` means in a given model.

Everything is read off the model's structure, so that an architecture needs no entry of its own: the
blocks are the outermost `ModuleList` whose members attend; the attention is the module that owns the
query, key and value projections; widths and head counts follow from the projections themselves.
What the names of the field leave open is settled by the few tuples of names below.
"""

import difflib
import inspect
from collections.abc import Iterator, Sequence
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
    first_child,
    heads_of,
    index_in_range,
    join,
    known_width,
    leaf,
    mlp_norm,
    mlp_of,
    parent,
    submodule,
    width_of,
    within,
)
from reftheads.graph.site import BLOCK_COMPONENTS, HEAD_COMPONENTS, Side, Site, Stack

_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_norm", "final_layernorm", "layer_norm", "layernorm", "norm_f")


@dataclass(frozen=True)
class StackInfo:
    """One half of an encoder-decoder model, or the whole of any other.

    Args:
        path: the module that receives `input_ids`, `attention_mask` … and runs the blocks.
        blocks: paths of the blocks in the order in which they run.
        role: `"decoder"` if tokens see only earlier ones, else `"encoder"`.
        final_norm: path of the norm after the last block, if there is one.
    """

    path: str
    blocks: tuple[str, ...]
    role: Stack
    final_norm: str | None

    @property
    def causal(self) -> bool:
        """Whether a token's hidden states depend on no later token."""
        return self.role == "decoder"


@dataclass(frozen=True)
class Address:
    """Where in one model a site is.

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
        """What selects the site's features: `h[..., address.index]`; a slice, hence a view, if it can be."""
        if self.columns is None:
            return slice(None)
        if isinstance(self.columns, range):
            return slice(self.columns.start, self.columns.stop)
        return list(self.columns)


def locate(model: nn.Module, site: Site) -> Address:
    """The address of `site` in `model`, which may be a bare model or one with any head on top.

    `attention_output` and `mlp_output` are what is added to the residual stream: the output of the
    sublayer's last projection, or of the norm that stands between it and the addition (Gemma, OLMo 2),
    or of the whole module for a mixture of experts. Where a model scales that by a factor as it adds
    (Granite, BEiT), it does so after the address. `mlp_input` and the two behind it have the shape
    (batch * tokens, features) in OPT, whose blocks flatten their tokens there.

    Raises:
        ValueError: a layer or head out of range, a stack that the model lacks, a component that it does
            not have (no final norm, fused experts), a model without recognisable blocks, an unknown
            module path, or one whose width cannot be told.
    """
    if site.is_path:
        return _locate_path(model, site)
    found = stacks(model)
    info = _choose_stack(model, found, site.stack)
    site = replace(site, stack=info.role if len(found) > 1 else None)
    if site.component == "embedding_output":
        # What enters block 0, since some models scale, add positions or project after their embeddings.
        return Address(site, info.blocks[0], "input", _residual_width(model, info), None, info.path, (-1, 0))
    if site.component == "final_norm_output":
        return _final_norm(model, info, site)
    assert site.layer is not None
    layer = index_in_range(site.layer, len(info.blocks), "layer", _name(model))
    return _locate_in_block(model, info, replace(site, layer=layer), layer)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model, without the parameters of a graph that was compiled into it."""
    return ((p, m) for p, m in model.named_modules() if p.split(".")[0] != "interventions")


def stacks(model: nn.Module) -> tuple[StackInfo, ...]:
    """The stacks of blocks in `model`, in the order of its modules; empty if none is recognised."""
    found: list[StackInfo] = []
    for path, module in own_modules(model):
        if not isinstance(module, nn.ModuleList) or any(within(path, b) for s in found for b in s.blocks):
            continue
        attention = next((a for a in map(attention_owner, module) if a is not None), None)
        if attention is not None:
            found.append(_stack_info(model, path, module, attention[1]))
    return tuple(found)


def _stack_info(model: nn.Module, path: str, blocks: nn.ModuleList, attention: nn.Module) -> StackInfo:
    ancestors = list(_ancestors(path))
    # The blocks' direct parent often is an inner module that knows neither ids nor cache (BertEncoder).
    takers = (a for a in ancestors if _takes(model.get_submodule(a), "input_ids", "pixel_values"))
    stack = next(takers, ancestors[0])
    holders = ancestors[: ancestors.index(stack) + 1]
    norms = (join(a, n) for a in holders if (n := first_child(model.get_submodule(a), _FINAL_NORM)))
    causal = getattr(attention, "is_causal", getattr(attention, "is_decoder", None))
    if causal is None:  # Bloom and DeBERTa do not say; of the two only a decoder keeps a cache
        causal = _takes(model.get_submodule(stack), "past_key_values")
    return StackInfo(
        path=stack,
        blocks=tuple(join(path, str(i)) for i in range(len(blocks))),
        role="decoder" if causal else "encoder",
        final_norm=next(norms, None),
    )


def _choose_stack(model: nn.Module, found: Sequence[StackInfo], wanted: Stack | None) -> StackInfo:
    if not found:
        raise ValueError(
            f"no transformer blocks recognised in {_name(model)}: "
            "use the dotted path of a module, as in Site(component='encoder.layers.0.mlp')"
        )
    role = wanted or (found[0].role if len(found) == 1 else "decoder")
    matching = [s for s in found if s.role == role]
    if not matching:
        names = " and ".join(f"{s.role} {s.path!r}" if s.path else s.role for s in found)
        raise ValueError(f"{_name(model)} has no {role}, only its {names}: leave stack out, or name that one")
    if len(matching) > 1:
        paths = ", ".join(repr(s.path) for s in matching)
        raise ValueError(f"{_name(model)} has several {role}s ({paths}): use the dotted path of a module")
    config = getattr(model.get_submodule(matching[0].path), "config", None)
    if getattr(config, "num_hidden_groups", None) is not None:
        raise ValueError(
            f"{_name(model)} runs the same blocks several times, so that a layer has no module of its own: "
            "the dotted path of a module edits all its runs"
        )
    return matching[0]


def _final_norm(model: nn.Module, info: StackInfo, site: Site) -> Address:
    if info.final_norm is None:
        raise ValueError(f"{_name(model)} has no final norm: block_output of layer=-1 is what leaves its last block")
    width = _residual_width(model, info)
    return Address(site, info.final_norm, "output", width, None, info.path, (len(info.blocks), 0))


def _locate_in_block(model: nn.Module, info: StackInfo, site: Site, layer: int) -> Address:
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


def _locate_path(model: nn.Module, site: Site) -> Address:
    path = site.component
    module = None if path.startswith("interventions.") else submodule(model, path)
    if module is None:
        close = difflib.get_close_matches(path, [p for p, _ in own_modules(model)], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"{_name(model)} has no module {path!r}: {hint}")
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{path!r} is a list of modules that is never called itself: name one of its members")
    found = stacks(model)
    inside = [s for s in found if within(path, s.path)]
    info = max(inside, key=lambda s: len(s.path)) if inside else None
    if site.stack is not None and (info is None or info.role != site.stack):
        raise ValueError(f"module {path!r} is not in the {site.stack} of {_name(model)}: leave stack out")
    site = replace(site, stack=info.role if info is not None and len(found) > 1 else None)
    known = _known_place(model, info, path, site.side) if info is not None else None
    width = width_of(module, site.side) or (known and known.columns is None and known.width)
    if not width:
        raise ValueError(
            f"cannot tell how wide the {site.side} of {path!r} ({type(module).__name__}) is: "
            "use one of the components, or the path of a projection, norm, block, attention or MLP"
        )
    stack = info.path if info is not None else found[0].path if found else ""
    return Address(site, path, site.side, width, None, stack, known.order if known else None)


def _known_place(model: nn.Module, info: StackInfo, path: str, side: Side) -> Address | None:
    """The component at, or at the same step of the block as, one side of a module."""
    layer = next((i for i, b in enumerate(info.blocks) if within(path, b)), None)
    if layer is None:
        return _final_norm(model, info, Site(None, "final_norm_output")) if path == info.final_norm else None
    components: dict[str, Address] = {}
    for component in BLOCK_COMPONENTS:
        try:
            components[component] = _locate_in_block(model, info, Site(layer, component), layer)
        except ValueError:  # this block lacks it
            continue
    same = next((a for a in components.values() if (a.module, a.side) == (path, side)), None)
    return same or _step(components, path, side)


def _step(components: dict[str, Address], path: str, side: Side) -> Address | None:
    """The component that is computed when the module at `path` takes or gives its tensor."""
    get = components.get
    owner, out, added = get("attention_input"), get("head_output"), get("attention_output")
    if owner is not None and added is not None:
        if path == owner.module:
            return added if out is None or within(out.module, path) else out
        if within(owner.module, path):  # wraps the attention and its norm or residual addition
            return replace(added, order=None)
        if out is not None and path == out.module:
            return added
        if path in (a.module for c in HEAD_COMPONENTS[:3] if (a := get(c)) is not None):
            return owner
    first, down, last = get("mlp_input"), get("mlp_activation"), get("mlp_output")
    if first is not None and last is not None:
        if path == first.module and (down is None or within(down.module, path)):
            return last
        if down is not None and path == down.module:
            return last
        if path == first.module or (leaf(path) in UP and parent(path) == first.module):
            return first if side == "input" else down
    return None


# --- names and paths ----------------------------------------------------------------------------------


def _residual_width(model: nn.Module, info: StackInfo) -> int:
    owner = next(a[1] for b in info.blocks if (a := attention_owner(model.get_submodule(b))) is not None)
    name = first_child(owner, ATTENDS)
    assert name is not None
    return known_width(owner.get_submodule(name), "input")


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _name(model: nn.Module) -> str:
    return f"this {_model_type(model)}"


def arguments(module: nn.Module) -> list[str]:
    """The names of what its forward takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def _takes(module: nn.Module, *names: str) -> bool:
    return any(name in arguments(module) for name in names)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = parent(path)
        yield path

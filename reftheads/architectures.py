"""From an address to a module: what `Site(layer=3, component="query_output")` means in a given model.

Everything is read off the model's structure, so that an architecture needs no entry of its own: the
blocks are the outermost `ModuleList` whose members attend; the attention is the module that owns the
query, key and value projections; widths and head counts follow from the projections themselves.
What the names of the field leave open is settled by the few tuples of names below.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from reftheads.sites import BLOCK_COMPONENTS, HEAD_COMPONENTS, Side, Site, Stack

_QUERY = ("q_proj", "query", "q_lin", "query_proj", "q")
_KEY = ("k_proj", "key", "k_lin", "key_proj", "k")
_VALUE = ("v_proj", "value", "v_lin", "value_proj", "v")
_CONTIGUOUS = ("c_attn", "qkv_proj", "Wqkv", "qkv")  # all queries, then all keys, then all values
_INTERLEAVED = ("query_key_value",)  # a group at a time: its queries, its key, its value
_ATTENDS = (*_CONTIGUOUS, *_INTERLEAVED, *_QUERY, "q_a_proj")  # any of these makes a module an attention
_ATTENTION_OUT = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "Wo", "o", "wo")
_UP = ("gate_up_proj", "gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1", "lin1", "wi", "wi_0", "Wi", "fc_in")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "lin2", "wo", "Wo", "fc_out")
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_norm", "final_layernorm", "layer_norm", "layernorm", "norm_f")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEAD_COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_CROSS = ("cross", "encoder_attn", "encdec")
# Their fused projection has a name from the tuples above and another order of columns.
_OTHER_FUSED_ORDER = ("codegen", "gpt_bigcode")

Columns = range | tuple[int, ...] | None


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
    layer = _index(site.layer, len(info.blocks), "layer", _name(model))
    return _locate_in_block(model, info, replace(site, layer=layer), layer)


def stacks(model: nn.Module) -> tuple[StackInfo, ...]:
    """The stacks of blocks in `model`, in the order of its modules; empty if none is recognised."""
    found: list[StackInfo] = []
    for path, module in _walk(model):
        if not isinstance(module, nn.ModuleList) or any(_within(path, b) for s in found for b in s.blocks):
            continue
        attention = next((a for a in map(_attention_owner, module) if a is not None), None)
        if attention is not None:
            found.append(_stack_info(model, path, module, attention[1]))
    return tuple(found)


def _stack_info(model: nn.Module, path: str, blocks: nn.ModuleList, attention: nn.Module) -> StackInfo:
    ancestors = list(_ancestors(path))
    # The blocks' direct parent often is an inner module that knows neither ids nor cache (BertEncoder).
    takers = (a for a in ancestors if _takes(model.get_submodule(a), "input_ids", "pixel_values"))
    stack = next(takers, ancestors[0])
    holders = ancestors[: ancestors.index(stack) + 1]
    norms = (_join(a, n) for a in holders if (n := _first_child(model.get_submodule(a), _FINAL_NORM)))
    causal = getattr(attention, "is_causal", getattr(attention, "is_decoder", None))
    if causal is None:  # Bloom and DeBERTa do not say; of the two only a decoder keeps a cache
        causal = _takes(model.get_submodule(stack), "past_key_values")
    return StackInfo(
        path=stack,
        blocks=tuple(_join(path, str(i)) for i in range(len(blocks))),
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
        return Address(site, _join(path, module), side, width, columns, info.path, order)

    if component in ("block_input", "block_output"):
        return at("", "input" if component == "block_input" else "output", residual)
    if component in ("mlp_input", "mlp_activation", "mlp_output"):
        mlp = _mlp(block, where)
        if component == "mlp_input":
            return at(mlp.input, "input", residual)
        if component == "mlp_output":
            return at(_mlp_norm(block) or mlp.output, "output", residual)
        if mlp.down is None:
            raise ValueError(
                f"{where} mixes experts in {_join(path, mlp.output)!r}, where a token has several "
                "mlp_activations: use mlp_input or mlp_output"
            )
        return at(mlp.down, "input", _known_width(block.get_submodule(mlp.down), "input"))
    owner, out = _attention(block, where)
    if component == "attention_input":
        return at(owner, "input", residual)
    if component == "attention_output":
        return at(_attention_norm(block) or out, "output", residual)
    heads = _heads(block, owner, out, where, _model_type(model))
    module, side, columns = heads.site(component)
    if site.head is not None:
        count = heads.kv_count if component in ("key_output", "value_output") else heads.count
        head = _index(site.head, count, "head", f"{component} of {_name(model)}")
        site = replace(site, head=head)
        columns = _as_range((columns or range(count * heads.dim))[head * heads.dim : (head + 1) * heads.dim])
    width = _known_width(block.get_submodule(module), side) if columns is None else len(columns)
    return at(module, side, width, columns)


# --- attention ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """The heads of a block's self-attention; paths are relative to the block."""

    projections: tuple[str, ...]  # of queries, keys and values, or the fused one
    interleaved: bool
    out: str
    dim: int
    count: int
    kv_count: int

    def site(self, component: str) -> tuple[str, Side, Columns]:
        """Module, side and columns of all heads of one of `HEAD_COMPONENTS`."""
        if component == "head_output":
            return self.out, "input", None
        which = ("query_output", "key_output", "value_output").index(component)
        if len(self.projections) == 3:
            return self.projections[which], "output", None
        groups = self.kv_count if self.interleaved else 1
        queries, keys = self.count // groups, self.kv_count // groups  # in each group
        first, heads = ((0, queries), (queries, keys), (queries + keys, keys))[which]
        starts = [group * (queries + 2 * keys) + first for group in range(groups)]
        columns = [c for start in starts for c in range(start * self.dim, (start + heads) * self.dim)]
        return self.projections[0], "output", _as_range(columns)


def _attention_owner(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module of the block with a query projection that is no cross-attention."""
    for path, module in block.named_modules():
        if not _is_cross(path) and _first_child(module, _ATTENDS) is not None:
            return path, module
    return None


def _attention(block: nn.Module, where: str) -> tuple[str, str]:
    """Paths, in the block, of the module that owns the projections and of the output projection."""
    found = _attention_owner(block)
    if found is None:
        raise ValueError(f"{where} has no attention with query, key and value projections: use a module path")
    path, owner = found
    name = _first_child(owner, _ATTENTION_OUT)
    out = _join(path, name) if name else _join(_parent(path), "output.dense")
    if _submodule(block, out) is None:
        raise ValueError(f"{where}: its attention {path!r} has no output projection of a known name: use a module path")
    return path, out


def _heads(block: nn.Module, path: str, out: str, where: str, model_type: str) -> _Heads:
    owner = block.get_submodule(path)
    fused = _first_child(owner, (*_CONTIGUOUS, *_INTERLEAVED))
    names = [fused] if fused else [_first_child(owner, n) for n in (_QUERY, _KEY, _VALUE)]
    projections = tuple(_join(path, n) for n in names if n is not None)
    if len(projections) < len(names) or (fused and model_type in _OTHER_FUSED_ORDER):
        raise ValueError(
            f"{where}: the query, key and value projections of its attention {path!r} are of no known "
            "form: use a module path"
        )
    widths = [_known_width(block.get_submodule(p), "output") for p in projections]
    queries = _known_width(block.get_submodule(out), "input")
    keys = (widths[0] - queries) // 2 if fused else widths[1]
    dim = _head_dim(owner, queries)
    if sum(widths) != queries + 2 * keys or not keys or queries % dim or keys % dim:
        raise ValueError(
            f"{where}: the projections of its attention {path!r} are {widths} wide, which does not divide "
            f"into queries of {queries} and equal keys and values with heads of {dim}: use a module path"
        )
    return _Heads(projections, fused in _INTERLEAVED, out, dim, queries // dim, keys // dim)


def _head_dim(owner: nn.Module, width: int) -> int:
    dim = _first_int(owner, _HEAD_DIM)
    if dim is not None:
        return dim
    count = _first_int(owner, _HEAD_COUNT) or _first_int(getattr(owner, "config", None), _HEAD_COUNT)
    if count is None:
        raise ValueError(f"cannot tell the number of heads of {type(owner).__name__}: use a module path")
    return width // count


# --- MLP and the norms between a sublayer and the residual addition ------------------------------------


@dataclass(frozen=True)
class _MLP:
    """A block's feed-forward half; paths are relative to the block."""

    input: str
    output: str
    down: str | None  # None for a mixture of experts


def _mlp(block: nn.Module, where: str) -> _MLP:
    attention = _attention_owner(block)
    skipped = _attention(block, where) if attention is not None else ()
    inside = {
        path: module
        for path, module in block.named_modules()
        if path and not _is_cross(path) and not any(_within(path, s) for s in skipped)
    }
    experts = next((p for p, m in inside.items() if _child(m, "experts") is not None), None)
    if experts is not None:
        return _MLP(experts, experts, None)
    down = next((p for p in inside if _leaf(p) in _DOWN or p == "output.dense"), None)
    up = next((p for p in inside if _leaf(p) in _UP or p == "intermediate.dense"), None)
    if down is None or up is None:
        raise ValueError(f"{where} has no MLP with a first and a last projection: use a module path")
    # A gated MLP reads its input twice, so the module that owns both projections is taken where there is one.
    owner = _parent(down)
    return _MLP(owner if owner and owner == _parent(up) else up, down, down)


def _attention_norm(block: nn.Module) -> str | None:
    if _first_child(block, ("post_self_attn_layernorm",)):
        return "post_self_attn_layernorm"
    # The name alone does not tell: in a Llama it is the norm before the MLP.
    after = _mlp_norm(block) and _child(block, "post_attention_layernorm") is not None
    return "post_attention_layernorm" if after else None


def _mlp_norm(block: nn.Module) -> str | None:
    return _first_child(block, ("post_feedforward_layernorm", "post_mlp_layernorm"))


# --- module paths ----------------------------------------------------------------------------------------


def _locate_path(model: nn.Module, site: Site) -> Address:
    path = site.component
    module = None if path.startswith("interventions.") else _submodule(model, path)
    if module is None:
        close = difflib.get_close_matches(path, [p for p, _ in _walk(model)], n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"{_name(model)} has no module {path!r}: {hint}")
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"{path!r} is a list of modules that is never called itself: name one of its members")
    found = stacks(model)
    inside = [s for s in found if _within(path, s.path)]
    info = max(inside, key=lambda s: len(s.path)) if inside else None
    if site.stack is not None and (info is None or info.role != site.stack):
        raise ValueError(f"module {path!r} is not in the {site.stack} of {_name(model)}: leave stack out")
    site = replace(site, stack=info.role if info is not None and len(found) > 1 else None)
    known = _known_place(model, info, path, site.side) if info is not None else None
    width = _width(module, site.side) or (known and known.columns is None and known.width)
    if not width:
        raise ValueError(
            f"cannot tell how wide the {site.side} of {path!r} ({type(module).__name__}) is: "
            "use one of the components, or the path of a projection, norm, block, attention or MLP"
        )
    stack = info.path if info is not None else found[0].path if found else ""
    return Address(site, path, site.side, width, None, stack, known.order if known else None)


def _known_place(model: nn.Module, info: StackInfo, path: str, side: Side) -> Address | None:
    """The component at, or at the same step of the block as, one side of a module."""
    layer = next((i for i, b in enumerate(info.blocks) if _within(path, b)), None)
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
            return added if out is None or _within(out.module, path) else out
        if _within(owner.module, path):  # wraps the attention and its norm or residual addition
            return replace(added, order=None)
        if out is not None and path == out.module:
            return added
        if path in (a.module for c in HEAD_COMPONENTS[:3] if (a := get(c)) is not None):
            return owner
    first, down, last = get("mlp_input"), get("mlp_activation"), get("mlp_output")
    if first is not None and last is not None:
        if path == first.module and (down is None or _within(down.module, path)):
            return last
        if down is not None and path == down.module:
            return last
        if path == first.module or (_leaf(path) in _UP and _parent(path) == first.module):
            return first if side == "input" else down
    return None


# --- widths, names, paths ------------------------------------------------------------------------------


def _width(module: nn.Module, side: Side) -> int | None:
    """Features that enter or leave a module; by its attributes, since quantised weights have other shapes."""
    declared = _first_int(module, ("in_features", "nx") if side == "input" else ("out_features", "nf"))
    if declared is not None:
        return declared
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "output" else None
    shape = getattr(module, "normalized_shape", None)
    if shape is None and "norm" in type(module).__name__.lower():
        shape = getattr(getattr(module, "weight", None), "shape", ())
    if shape:
        return shape[-1]
    for first, last in ((_ATTENDS, _ATTENTION_OUT), (_UP, _DOWN)):
        ends = _first_child(module, first), _first_child(module, last)
        if ends[0] and ends[1]:
            return _width(module.get_submodule(ends[0] if side == "input" else ends[1]), side)
    weighted = [c for c in module.children() if next(c.parameters(), None) is not None]
    alone = len(weighted) == 1 and not module._parameters  # a projection with its activation or dropout
    return _width(weighted[0], side) if alone else None


def _known_width(projection: nn.Module, side: Side) -> int:
    width = _width(projection, side)
    if width is None:
        raise ValueError(f"cannot tell the {side} width of a projection of class {type(projection).__name__}")
    return width


def _residual_width(model: nn.Module, info: StackInfo) -> int:
    owner = next(a[1] for b in info.blocks if (a := _attention_owner(model.get_submodule(b))) is not None)
    name = _first_child(owner, _ATTENDS)
    assert name is not None
    return _known_width(owner.get_submodule(name), "input")


def _index(value: int, count: int, what: str, place: str) -> int:
    if not -count <= value < count:
        raise ValueError(f"{what} {value} is out of range: {place} has {what}s 0 to {count - 1} (or {-count} to -1)")
    return value % count


def _as_range(columns: Sequence[int]) -> range | tuple[int, ...]:
    whole = range(columns[0], columns[0] + len(columns))
    return whole if list(columns) == list(whole) else tuple(columns)


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _name(model: nn.Module) -> str:
    return f"this {_model_type(model)}"


def _first_int(owner: object, names: Iterable[str]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(owner, n, None), int)), None)


def _takes(module: nn.Module, *names: str) -> bool:
    return any(n in inspect.signature(module.forward).parameters for n in names)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model, without the parameters of a graph that was compiled into it."""
    return ((p, m) for p, m in model.named_modules() if p.split(".")[0] != "interventions")


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def _first_child(module: nn.Module, names: Iterable[str]) -> str | None:
    return next((n for n in names if _child(module, n) is not None), None)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = _parent(path)
        yield path


def _within(path: str, ancestor: str) -> bool:
    return not ancestor or f"{path}.".startswith(f"{ancestor}.")


def _is_cross(path: str) -> bool:
    return any(word in path.lower() for word in _CROSS)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)

"""Inside one block: its attention and heads, its MLP, and the norms before the residual additions.

What the names of the field leave open is settled by the few tuples of names below.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from reftheads.graph.site import Side

_QUERY = ("q_proj", "query", "q_lin", "query_proj", "q")
_KEY = ("k_proj", "key", "k_lin", "key_proj", "k")
_VALUE = ("v_proj", "value", "v_lin", "value_proj", "v")
_CONTIGUOUS = ("c_attn", "qkv_proj", "Wqkv", "qkv")  # all queries, then all keys, then all values
_INTERLEAVED = ("query_key_value",)  # a group at a time: its queries, its key, its value
ATTENDS = (*_CONTIGUOUS, *_INTERLEAVED, *_QUERY, "q_a_proj")  # any of these makes a module an attention
_ATTENTION_OUT = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "Wo", "o", "wo")
UP = ("gate_up_proj", "gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1", "lin1", "wi", "wi_0", "Wi", "fc_in")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "lin2", "wo", "Wo", "fc_out")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEAD_COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_CROSS = ("cross", "encoder_attn", "encdec")
# Their fused projection has a name from the tuples above and another order of columns.
_OTHER_FUSED_ORDER = ("codegen", "gpt_bigcode")


Columns = range | tuple[int, ...] | None


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
        return self.projections[0], "output", as_range(columns)


def reads_other_stack(path: str) -> bool:
    """Whether a module is the key or value projection of a cross-attention: it sees the encoder's tokens."""
    return _is_cross(path) and leaf(path) in (*_KEY, *_VALUE)


def attention_owner(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module of the block with a query projection that is no cross-attention."""
    for path, module in block.named_modules():
        if not _is_cross(path) and first_child(module, ATTENDS) is not None:
            return path, module
    return None


def attention_of(block: nn.Module, where: str) -> tuple[str, str]:
    """Paths, in the block, of the module that owns the projections and of the output projection."""
    found = attention_owner(block)
    if found is None:
        raise ValueError(f"{where} has no attention with query, key and value projections: use a module path")
    path, owner = found
    name = first_child(owner, _ATTENTION_OUT)
    out = join(path, name) if name else join(parent(path), "output.dense")
    if submodule(block, out) is None:
        raise ValueError(f"{where}: its attention {path!r} has no output projection of a known name: use a module path")
    return path, out


def heads_of(block: nn.Module, path: str, out: str, where: str, model_type: str) -> _Heads:
    owner = block.get_submodule(path)
    fused = first_child(owner, (*_CONTIGUOUS, *_INTERLEAVED))
    names = [fused] if fused else [first_child(owner, n) for n in (_QUERY, _KEY, _VALUE)]
    projections = tuple(join(path, n) for n in names if n is not None)
    if len(projections) < len(names) or (fused and model_type in _OTHER_FUSED_ORDER):
        raise ValueError(
            f"{where}: the query, key and value projections of its attention {path!r} are of no known "
            "form: use a module path"
        )
    widths = [known_width(block.get_submodule(p), "output") for p in projections]
    queries = known_width(block.get_submodule(out), "input")
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


def mlp_of(block: nn.Module, where: str) -> _MLP:
    attention = attention_owner(block)
    skipped = attention_of(block, where) if attention is not None else ()
    inside = {
        path: module
        for path, module in block.named_modules()
        if path and not _is_cross(path) and not any(within(path, s) for s in skipped)
    }
    experts = next((p for p, m in inside.items() if _child(m, "experts") is not None), None)
    if experts is not None:
        return _MLP(experts, experts, None)
    down = next((p for p in inside if leaf(p) in _DOWN or p == "output.dense"), None)
    up = next((p for p in inside if leaf(p) in UP or p == "intermediate.dense"), None)
    if down is None or up is None:
        raise ValueError(f"{where} has no MLP with a first and a last projection: use a module path")
    # A gated MLP reads its input twice, so the module that owns both projections is taken where there is one.
    owner = parent(down)
    return _MLP(owner if owner and owner == parent(up) else up, down, down)


def attention_norm(block: nn.Module) -> str | None:
    if first_child(block, ("post_self_attn_layernorm",)):
        return "post_self_attn_layernorm"
    # The name alone does not tell: in a Llama it is the norm before the MLP.
    after = mlp_norm(block) and _child(block, "post_attention_layernorm") is not None
    return "post_attention_layernorm" if after else None


def mlp_norm(block: nn.Module) -> str | None:
    return first_child(block, ("post_feedforward_layernorm", "post_mlp_layernorm"))


# --- widths, names, paths ------------------------------------------------------------------------------


def width_of(module: nn.Module, side: Side) -> int | None:
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
    for first, last in ((ATTENDS, _ATTENTION_OUT), (UP, _DOWN)):
        ends = first_child(module, first), first_child(module, last)
        if ends[0] and ends[1]:
            return width_of(module.get_submodule(ends[0] if side == "input" else ends[1]), side)
    weighted = [c for c in module.children() if next(c.parameters(), None) is not None]
    alone = len(weighted) == 1 and not module._parameters  # a projection with its activation or dropout
    return width_of(weighted[0], side) if alone else None


def known_width(projection: nn.Module, side: Side) -> int:
    width = width_of(projection, side)
    if width is None:
        raise ValueError(f"cannot tell the {side} width of a projection of class {type(projection).__name__}")
    return width


def index_in_range(value: int, count: int, what: str, place: str) -> int:
    if not -count <= value < count:
        raise ValueError(f"{what} {value} is out of range: {place} has {what}s 0 to {count - 1} (or {-count} to -1)")
    return value % count


def as_range(columns: Sequence[int]) -> range | tuple[int, ...]:
    whole = range(columns[0], columns[0] + len(columns))
    return whole if list(columns) == list(whole) else tuple(columns)


def _first_int(owner: object, names: Iterable[str]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(owner, n, None), int)), None)


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def first_child(module: nn.Module, names: Iterable[str]) -> str | None:
    return next((n for n in names if _child(module, n) is not None), None)


def within(path: str, ancestor: str) -> bool:
    return not ancestor or f"{path}.".startswith(f"{ancestor}.")


def _is_cross(path: str) -> bool:
    return any(word in path.lower() for word in _CROSS)


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


def join(*parts: str) -> str:
    return ".".join(p for p in parts if p)

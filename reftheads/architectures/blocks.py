"""Inside one block: its attention and heads, its MLP, and the norms before the residual additions.

What the names of the field leave open is settled by the few tuples of names below.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from reftheads.architectures.paths import child, first_child, join, leaf, parent, submodule, within
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
    """Describe the heads of a block's self-attention; paths are relative to the block.

    Attributes:
        projections: paths of the projections of queries, keys and values, or of the fused one.
        interleaved: whether the fused one has its columns a group at a time.
        out: path of the output projection.
        dim: features of a head.
        count, kv_count: how many heads queries have, and how many keys and values have.
    """

    projections: tuple[str, ...]
    interleaved: bool
    out: str
    dim: int
    count: int
    kv_count: int

    def site(self, component: str) -> tuple[str, Side, Columns]:
        """Return module, side and columns of all heads of one of `HEAD_COMPONENTS`."""
        if component == "head_output":
            return self.out, "input", None
        which = ("query_output", "key_output", "value_output").index(component)
        if len(self.projections) == 3:
            return self.projections[which], "output", None
        groups = self.kv_count if self.interleaved else 1
        queries, keys = self.count // groups, self.kv_count // groups  # in each group
        first, heads = ((0, queries), (queries, keys), (queries + keys, keys))[which]
        columns: list[int] = []
        for group in range(groups):
            start = group * (queries + 2 * keys) + first
            columns += range(start * self.dim, (start + heads) * self.dim)
        return self.projections[0], "output", as_range(columns)


def reads_other_stack(path: str) -> bool:
    """Return whether a module is the key or value projection of a cross-attention: it sees the encoder's tokens."""
    return _is_cross(path) and leaf(path) in (*_KEY, *_VALUE)


def attention_owner(block: nn.Module) -> tuple[str, nn.Module] | None:
    """Return path and module of the first in the block that has a query projection and is no cross-attention."""
    for path, module in block.named_modules():
        if not _is_cross(path) and first_child(module, ATTENDS) is not None:
            return path, module
    return None


def attention_of(block: nn.Module, where: str) -> tuple[str, str]:
    """Return the paths, in the block, of the module that owns the projections and of the output projection.

    Args:
        where: how errors call the block.
    """
    attention = attention_owner(block)
    if attention is None:
        raise ValueError(f"{where} has no attention with query, key and value projections: use a module path")
    path, owner = attention
    name = first_child(owner, _ATTENTION_OUT)
    out = join(path, name) if name else join(parent(path), "output.dense")
    if submodule(block, out) is None:
        raise ValueError(f"{where}: its attention {path!r} has no output projection of a known name: use a module path")
    return path, out


def heads_of(block: nn.Module, path: str, out: str, where: str, model_type: str) -> _Heads:
    """Return the heads of the attention at `path`, whose output projection is at `out`.

    Args:
        where: how errors call the block.
        model_type: some models fuse their projections in an order that no name shows.
    """
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
    """Return the features of a head of an attention whose queries have this width."""
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
    """Describe a block's feed-forward half; paths are relative to the block.

    Attributes:
        input: of the module that reads its input.
        output: of the module that gives its output.
        down: of the last projection; `None` for a mixture of experts.
    """

    input: str
    output: str
    down: str | None


def mlp_of(block: nn.Module, where: str) -> _MLP:
    """Return the feed-forward half of a block; `where` is how errors call the block."""
    of_attention = attention_of(block, where) if attention_owner(block) is not None else ()
    rest = {
        path: module
        for path, module in block.named_modules()
        if path and not _is_cross(path) and not any(within(path, skipped) for skipped in of_attention)
    }
    for path, module in rest.items():
        if child(module, "experts") is not None:
            return _MLP(path, path, None)
    down = next((path for path in rest if leaf(path) in _DOWN or path == "output.dense"), None)
    up = next((path for path in rest if leaf(path) in UP or path == "intermediate.dense"), None)
    if down is None or up is None:
        raise ValueError(f"{where} has no MLP with a first and a last projection: use a module path")
    # A gated MLP reads its input twice, so the module that owns both projections is taken where there is one.
    owner = parent(down)
    return _MLP(owner if owner and owner == parent(up) else up, down, down)


def attention_norm(block: nn.Module) -> str | None:
    """Return the norm between the attention and the residual addition, if there is one."""
    if first_child(block, ("post_self_attn_layernorm",)):
        return "post_self_attn_layernorm"
    # The name alone does not tell: in a Llama it is the norm before the MLP.
    after = mlp_norm(block) and child(block, "post_attention_layernorm") is not None
    return "post_attention_layernorm" if after else None


def mlp_norm(block: nn.Module) -> str | None:
    """Return the norm between the MLP and the residual addition, if there is one."""
    return first_child(block, ("post_feedforward_layernorm", "post_mlp_layernorm"))


# --- widths and columns ------------------------------------------------------------------------------


def width_of(module: nn.Module, side: Side) -> int | None:
    """Return how many features enter or leave a module; `None` if that cannot be told.

    It goes by the module's attributes, since quantised weights have other shapes.
    """
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
    for firsts, lasts in ((ATTENDS, _ATTENTION_OUT), (UP, _DOWN)):
        first, last = first_child(module, firsts), first_child(module, lasts)
        if first and last:
            return width_of(module.get_submodule(first if side == "input" else last), side)
    weighted = [c for c in module.children() if next(c.parameters(), None) is not None]
    alone = len(weighted) == 1 and not module._parameters  # a projection with its activation or dropout
    return width_of(weighted[0], side) if alone else None


def known_width(projection: nn.Module, side: Side) -> int:
    """Return how many features enter or leave a projection. Raise `ValueError` if that cannot be told."""
    width = width_of(projection, side)
    if width is None:
        raise ValueError(f"cannot tell the {side} width of a projection of class {type(projection).__name__}")
    return width


def index_in_range(value: int, count: int, what: str, place: str) -> int:
    """Return a number of a layer or head counted from 0. Raise `ValueError` if there is none of this number."""
    if not -count <= value < count:
        raise ValueError(f"{what} {value} is out of range: {place} has {what}s 0 to {count - 1} (or {-count} to -1)")
    return value % count


def as_range(columns: Sequence[int]) -> range | tuple[int, ...]:
    """Return columns as a range if they are one, so that they can be sliced."""
    whole = range(columns[0], columns[0] + len(columns))
    return whole if list(columns) == list(whole) else tuple(columns)


def _first_int(owner: object, names: Iterable[str]) -> int | None:
    """Return the first of these attributes that is an integer."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None


def _is_cross(path: str) -> bool:
    """Return whether a path names a cross-attention or what belongs to one."""
    return any(word in path.lower() for word in _CROSS)

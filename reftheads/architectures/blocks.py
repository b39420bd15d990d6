"""Inside one block: its attention and heads, its MLP, and the norms before the residual additions.

What the names of the field leave open is settled by the few tuples of names below.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from reftheads.architectures.paths import child, first_child, join, leaf, parent, submodule, within
from reftheads.architectures.stream import Addition, Step
from reftheads.graph.site import HEAD_COMPONENTS, Side

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
_GATED_QUERIES = ("qwen3_next", "qwen3_5", "qwen4_exp", "axk2")  # project a gate beside each head's query
_CODEGEN_PARTS = 4  # of its fused projection, each with queries, values and keys, in this order


Columns = range | tuple[int, ...] | None


@dataclass(frozen=True)
class HeadSite:
    """Say where the heads of a block's self-attention have their queries, keys, values or outputs.

    Attributes:
        module: path in the block.
        side: of that module.
        heads: of each head, the features of the module that are its own, in their order.
        fused: whether the module gives queries, keys and values.
    """

    module: str
    side: Side
    heads: tuple[range, ...]
    fused: bool = False

    def columns(self, width: int | None, head: int | None) -> Columns:
        """Return the features of one head or of all; `None` if they are all of a module so wide."""
        wanted = self.heads if head is None else (self.heads[head],)
        columns = as_range([column for features in wanted for column in features])
        return None if columns == range(width or 0) else columns


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


def heads_of(block: nn.Module, path: str, out: str, component: str, where: str, model_type: str) -> HeadSite:
    """Return one of `HEAD_COMPONENTS` of the attention at `path`, whose output projection is at `out`.

    Args:
        where: how errors call the block.
        model_type: some models lay out their projections in a way that no name shows.

    Raises:
        ValueError: projections of no known form, or of widths that do not agree, and keys of latent attention, of
            which all heads share a part.
    """
    owner = block.get_submodule(path)
    queries = known_width(block.get_submodule(out), "input")
    if child(owner, "kv_b_proj") is not None:
        return _latent(owner, path, out, component, where)
    dim = _head_dim(owner, queries)
    if component == "head_output" and queries % dim == 0:
        return HeadSite(out, "input", _side_by_side(0, queries // dim, dim))
    fused = first_child(owner, (*_CONTIGUOUS, *_INTERLEAVED))
    names = [fused] if fused else [first_child(owner, n) for n in (_QUERY, _KEY, _VALUE)]
    projections = tuple(join(path, n) for n in names if n is not None)
    if len(projections) < len(names):
        raise ValueError(
            f"{where}: the query, key and value projections of its attention {path!r} are of no known "
            "form: use a module path"
        )
    widths = [known_width(block.get_submodule(p), "output") for p in projections]
    gated = model_type.startswith(_GATED_QUERIES) and not fused and widths[0] == 2 * queries
    keys = (widths[0] - queries) // 2 if fused else widths[1]
    if sum(widths) != queries * (1 + gated) + 2 * keys or not keys or queries % dim or keys % dim:
        raise ValueError(
            f"{where}: the projections of its attention {path!r} are {widths} wide, which does not divide "
            f"into queries of {queries} and equal keys and values with heads of {dim}: use a module path"
        )
    which = HEAD_COMPONENTS.index(component)
    count, kv_count = queries // dim, keys // dim
    if not fused:
        stride = 2 * dim if gated and which == 0 else dim  # a query, and the gate of its head's output
        heads = _side_by_side(0, kv_count if which else count, dim, stride)
        return HeadSite(projections[which], "output", heads)
    if model_type == "codegen":
        order, groups = (0, 2, 1), _CODEGEN_PARTS
    else:
        by_head = model_type == "gpt_bigcode" and not getattr(owner, "multi_query", True)
        order, groups = (0, 1, 2), kv_count if fused in _INTERLEAVED or by_head else 1
    heads = _of_fused(which, order, groups, count // groups, kv_count // groups, dim)
    return HeadSite(projections[0], "output", heads, fused=True)


def _of_fused(which: int, order: tuple[int, ...], groups: int, queries: int, keys: int, dim: int) -> tuple[range, ...]:
    """Return the features of each head in a fused projection of groups with so many queries and keys each.

    Args:
        which: 0 for queries, 1 for keys, 2 for values.
        order: of the three in each group.
    """
    counts = (queries, keys, keys)
    before = sum(counts[part] for part in order[: order.index(which)])
    starts = (group * (queries + 2 * keys) * dim + before * dim for group in range(groups))
    return tuple(features for start in starts for features in _side_by_side(start, counts[which], dim))


def _side_by_side(start: int, count: int, dim: int, stride: int | None = None) -> tuple[range, ...]:
    """Return the features of heads that lie one after the other."""
    firsts = (start + head * (stride or dim) for head in range(count))
    return tuple(range(first, first + dim) for first in firsts)


def _latent(owner: nn.Module, path: str, out: str, component: str, where: str) -> HeadSite:
    """Return a component of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19)."""
    count = _first_int(owner, _HEAD_COUNT) or _first_int(getattr(owner, "config", None), _HEAD_COUNT)
    content, rotary, value = (
        _first_int(owner, (name,)) or _first_int(getattr(owner, "config", None), (name,))
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    query = first_child(owner, ("q_b_proj", "q_proj"))
    if count is None or content is None or rotary is None or value is None or query is None:
        raise ValueError(f"{where}: its latent attention {path!r} is of no known form: use a module path")
    if component == "head_output":
        return HeadSite(out, "input", _side_by_side(0, count, value))
    if component == "query_output":
        return HeadSite(join(path, query), "output", _side_by_side(0, count, content + rotary))
    if component == "key_output":
        raise ValueError(
            f"{where}: the heads of its latent attention share a part of their keys, so that none has a key_output of "
            f"its own: use the path of {join(path, 'kv_b_proj')!r} or of {path!r}"
        )
    return HeadSite(join(path, "kv_b_proj"), "output", _side_by_side(content, count, value, content + value))


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


# --- what is added to the residual stream -------------------------------------------------------------


def added_by(block: nn.Module, steps: Sequence[Step] | None, component: str, where: str) -> str:
    """Return the module whose output a half of a block adds to the residual stream.

    A half is known by the names of its modules. Where two outputs are added, one of them or both without a known name,
    the first is that of the attention, or of the state-space or linear-attention layer in its place, and the second
    that of the MLP.

    Args:
        steps: what was seen to be added, see `steps_of_blocks`.
        component: `"attention_output"` or `"mlp_output"`.
        where: how errors call the block.

    Raises:
        ValueError: no such half, or more than the two halves, and the cross-attention, add to the stream.
    """
    if steps is None:
        raise ValueError(
            f"{where}: what its halves add to the residual stream cannot be told apart there: use the path of a module"
        )
    own = [addition for step in steps for addition in step if not any(map(_is_cross, addition))]
    named = {"attention_output": _names_of_attention(block), "mlp_output": _names_of_mlp(block)}
    attention = [addition for addition in own if addition.intersection(named["attention_output"])]
    mlp = [a for a in own if a not in attention and a.intersection(named["mlp_output"])]
    rest = [addition for addition in own if addition not in attention + mlp]
    if rest and not attention and rest[0] == own[0]:
        attention.append(rest.pop(0))
    if rest and not mlp and rest[-1] == own[-1]:
        mlp.append(rest.pop())
    halves = {"attention_output": attention, "mlp_output": mlp}
    added = [*attention[1:], *mlp[1:], *rest]
    if added:
        raise ValueError(
            f"{where}: beside one attention and one MLP, {' and '.join(map(_outermost, added))} add to the residual "
            f"stream, so that {component} would be a part of it only: use the path of a module"
        )
    if not halves[component]:
        what = "attention" if component == "attention_output" else "MLP"
        raise ValueError(f"{where} has no {what} that adds to the residual stream: use the path of a module")
    [addition] = halves[component]
    return next((name for name in named[component] if name in addition), _outermost(addition))


def _names_of_attention(block: nn.Module) -> list[str]:
    """Return the modules that may give what a block's attention adds, the innermost first; none without attention."""
    owner = attention_owner(block)
    if owner is None:
        return []
    with suppress(ValueError):
        owner, out = attention_of(block, "")
        return [name for name in (attention_norm(block), out, owner) if name]
    return [owner[0]]


def _names_of_mlp(block: nn.Module) -> list[str]:
    """Return the modules that may give what a block's MLP adds, the innermost first; none without a known one."""
    with suppress(ValueError):
        return [name for name in (mlp_norm(block), mlp_of(block, "").output) if name]
    return []


def _outermost(addition: Addition) -> str:
    return min(addition, key=lambda path: (path.count("."), path))


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

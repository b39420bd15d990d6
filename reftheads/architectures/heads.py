"""The heads of a block's self-attention: which features of which module are whose query, key, value or output."""

from dataclasses import dataclass

from torch import nn

from reftheads.architectures.names import CONTIGUOUS, INTERLEAVED, KEY, QUERY, VALUE
from reftheads.architectures.paths import child, first_child, join
from reftheads.architectures.widths import Columns, as_range, first_int, known_width
from reftheads.graph.site import HEAD_COMPONENTS, Side

_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEAD_COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_GATED_QUERIES = ("qwen3_next", "qwen3_5", "qwen4_exp", "axk2")  # project a gate beside each head's query
_CODEGEN_PARTS = 4  # of its fused projection, each with queries, values and keys, in this order


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
    fused = first_child(owner, (*CONTIGUOUS, *INTERLEAVED))
    names = [fused] if fused else [first_child(owner, n) for n in (QUERY, KEY, VALUE)]
    projections = tuple(join(path, n) for n in names if n is not None)
    if len(projections) < len(names):
        raise ValueError(
            f"{where}: the query, key and value projections of its attention {path!r} are of no known "
            "form: use a module path"
        )
    widths = [known_width(block.get_submodule(p), "output") for p in projections]
    gated = model_type.startswith(_GATED_QUERIES) and not fused and widths[0] == 2 * queries
    keys = (widths[0] - queries) // 2 if fused else widths[1]
    expected = [queries + 2 * keys] if fused else [queries * (1 + gated), keys, keys]
    if widths != expected or not keys or queries % dim or keys % dim:
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
        order, groups = (0, 1, 2), kv_count if fused in INTERLEAVED or by_head else 1
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
    count = first_int(owner, _HEAD_COUNT) or first_int(getattr(owner, "config", None), _HEAD_COUNT)
    content, rotary, value = (
        first_int(owner, (name,)) or first_int(getattr(owner, "config", None), (name,))
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
    dim = first_int(owner, _HEAD_DIM)
    if dim is not None:
        return dim
    count = first_int(owner, _HEAD_COUNT) or first_int(getattr(owner, "config", None), _HEAD_COUNT)
    if count is None:
        raise ValueError(f"cannot tell the number of heads of {type(owner).__name__}: use a module path")
    return width // count

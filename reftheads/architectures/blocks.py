"""Inside one block: its attention, its MLP, the norms before the residual additions, and what each half adds."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from reftheads.architectures.names import ATTENDS, ATTENTION_OUT, DOWN, UP, is_cross
from reftheads.architectures.paths import child, first_child, join, leaf, parent, submodule, within
from reftheads.architectures.stream import Addition, Step


def attention_owner(block: nn.Module) -> tuple[str, nn.Module] | None:
    """Return path and module of the first in the block that has a query projection and is no cross-attention."""
    for path, module in block.named_modules():
        if not is_cross(path) and first_child(module, ATTENDS) is not None:
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
    name = first_child(owner, ATTENTION_OUT)
    out = join(path, name) if name else join(parent(path), "output.dense")
    if submodule(block, out) is None:
        raise ValueError(f"{where}: its attention {path!r} has no output projection of a known name: use a module path")
    return path, out


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
    if child(block, "experts") is not None:
        raise ValueError(f"{where} has experts beside or in place of an MLP: use mlp_output, or a module path")
    of_attention = attention_of(block, where) if attention_owner(block) is not None else ()
    rest = {
        path: module
        for path, module in block.named_modules()
        if path and not is_cross(path) and not any(within(path, skipped) for skipped in of_attention)
    }
    for path, module in rest.items():
        if child(module, "experts") is not None:
            return _MLP(path, path, None)
    down = next((path for path in rest if leaf(path) in DOWN or path == "output.dense"), None)
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
    own = [addition for step in steps for addition in step if not any(map(is_cross, addition))]
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


def read_by(steps: Sequence[Step] | None, path: str) -> str:
    """Return the module that reads the input of experts: the one at `path`, or what gives the MLP's output around it.

    Experts may lie beside others in one module that reads the tensor for all of them.
    """
    additions = [addition for step in steps or () for addition in step]
    around = [o for addition in additions for o in addition if within(path, o) and o != path]
    return min(around, key=len, default=path)


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

"""One node on one tensor: which tokens it sees, what it reads of another node, what it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reftheads.architectures.address import Form
from reftheads.graph.intervention import Context, Params, Reader
from reftheads.graph.selection import Selection
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.output import Reading
from reftheads.runtime.passes import Acting, HookKey, Run, SideBySide, Source
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Float

_PLAIN = {training: Context(training=training) for training in (True, False)}


def derive(modules: Iterable[NodeModule]) -> dict[NodeModule, Params | None]:
    """Return the parameters of every module with what is derived from them; modules of one kind are derived together.

    A module's is `None` where only a call of the module may look at its parameters, since ZeRO-3 gathers them there.
    """
    out: dict[NodeModule, Params | None] = {}
    groups: dict[Any, list[dict[str, Tensor]]] = {}
    for module in modules:
        if module in out:
            continue
        stored = module.stored()
        first = next(iter(stored.values()), None)
        if hasattr(first, "ds_id") or (first is not None and first.is_meta):
            out[module] = None
            continue
        out[module] = stored
        if module.intervention.derives_from:
            assert first is not None
            groups.setdefault((module.intervention, first.shape, first.dtype, first.device), []).append(stored)
    for (intervention, *_), members in groups.items():
        if len(members) == 1:
            members[0].update(intervention.derive(members[0]))
            continue
        stacked = {name: torch.stack([stored[name] for stored in members]) for name in intervention.derives_from}
        names, tensors = zip(*intervention.derive(stacked).items(), strict=True)
        for stored, values in zip(members, zip(*tensors, strict=True), strict=True):
            stored.update(zip(names, values, strict=True))
    return out


def touch(run: Run, place: HookKey, h: Tensor, x: Tensor) -> Tensor | None:
    """Let the nodes at one place act on what is there.

    Args:
        run: the pass.
        place: path and side of the module.
        h: what enters or leaves it, in the form of the nodes' address.
        x: what entered it.

    Returns:
        What goes on; `None` if nothing was edited.

    Raises:
        ValueError: a tensor of another form.
    """
    nodes = run.acting[place]
    form = nodes[0].planned.address.form
    rows = _in_rows(run, place, form, h)
    if run.shape is not None and rows.shape[:2] != run.shape and not nodes[0].planned.sees_other_tokens:
        raise ValueError(
            f"{place[0]!r} works on {tuple(rows.shape[:2])} rows and columns where the input has {run.shape}: they are "
            "not the input's, so that no position has a meaning there"
        )
    entered = rows if x is h else _in_rows(run, place, form, x) if any(map(_needs_what_entered, nodes)) else x
    if torch.is_autocast_enabled(h.device.type):  # nodes compute in a type of their own
        with torch.autocast(h.device.type, enabled=False):
            new = _act_in_turn(run, nodes, rows, entered)
    else:
        new = _act_in_turn(run, nodes, rows, entered)
    if new is rows:
        return None
    if h.ndim == 2:
        return new.flatten(0, 1)
    if form == "filled":
        return torch.cat([new, h[:, new.shape[1] :]], 1)
    return new.transpose(0, 1) if form == "columns" else new


def _in_rows(run: Run, place: HookKey, form: Form, h: Tensor) -> Float[Tensor, "rows columns width"]:
    """Return the tensor at a place as [rows columns width], without columns that the model has filled up."""
    if h.ndim == 3 and form != "filled":
        return h if form == "rows" else h.transpose(0, 1)
    if h.ndim == 3 and run.shape is not None and h.shape[1] >= run.shape[1]:
        return h[:, : run.shape[1]]
    if h.ndim == 2 and form == "rows" and run.shape is not None and len(h) == run.shape[0] * run.shape[1]:
        return h.unflatten(0, run.shape)
    raise ValueError(f"{place[0]!r} works on a tensor of shape {tuple(h.shape)}: nodes need [batch, sequence, width]")


def _needs_what_entered(node: Acting) -> bool:
    return node.module.intervention.needs_linear


def _act_in_turn(run: Run, nodes: Sequence[Acting], h: Tensor, x: Tensor) -> Tensor:
    for node in nodes:
        h = _act(run, node, h, x)
    return h


def _act(
    run: Run, node: Acting, h: Float[Tensor, "batch chunk width"], x: Float[Tensor, "batch chunk input_width"]
) -> Float[Tensor, "batch chunk width"]:
    planned, positions = node.planned, node.planned.node.positions
    if planned.sees_other_tokens:
        selection = run.frame.of_encoder(h)
    else:
        selection = run.selection(positions, h, planned.may_use_a_mask)
    if selection is None:
        return h
    if node.share is not None:
        own = h[node.share]
        entered = x[node.share] if _needs_what_entered(node) else x
        new = _act_on(run, node, own, entered, selection.of(node.share))
        return h if new is own else h.slice_scatter(new, 0, node.share.start, node.share.stop)
    if node.rows is not None:
        selection = selection.rows(node.rows.to(h.device), h.shape[1])
    return _act_on(run, node, h, x, selection)


def _act_on(
    run: Run,
    node: Acting,
    h: Float[Tensor, "batch chunk width"],
    x: Float[Tensor, "batch chunk input_width"],
    selection: Selection,
) -> Float[Tensor, "batch chunk width"]:
    planned, module = node.planned, node.module
    source = None
    if node.source is not None:
        source = _source(run, node).beside(h)
        if node.source.node.positions.bound == 1:  # a row without the token that decides stays as it is
            _check_decided(run, node, h.shape[1])
            _check_not_before(run, node, h, selection, source)
            selection = selection.rows(source.valid[:, 0], h.shape[1])
    index = _index(planned, h.device)
    picked = selection.gather(h)
    part = picked if index is None else picked[..., index]
    dtype = node.dtype or h.dtype
    context = _PLAIN[module.training]
    if source is not None or module.intervention.needs_linear:
        entered = selection.gather(x).to(dtype) if module.intervention.needs_linear else None
        context = Context(entered, None if source is None else source.value, module.training)
    if not planned.edits:
        if picked is h and dtype == h.dtype and torch.is_grad_enabled():
            part = part.clone()  # kept for the gradient, while a model may add to `h` in place, as Falcon does
        read(run, node, part, selection, h.shape[1], context)
        return h
    given = part if part.dtype == dtype else part.to(dtype)
    result = module(node.params, given, context)
    if node.strength != 1:
        result = torch.lerp(given, result, node.strength)
    result = result if result.dtype == h.dtype else result.to(h.dtype)
    if index is not None:
        whole = picked.clone()
        whole[..., index] = result
        result = whole
    return selection.scatter(h, picked, result)


def read(
    run: Run,
    node: Acting,
    h: Float[Tensor, "batch slots width"],
    selection: Selection,
    length: int,
    context: Context | None = None,
) -> None:
    """Let a node read the tokens `h` that `selection` gathered from a pass of `length` columns."""
    module = node.module
    assert isinstance(module.intervention, Reader)
    valid, columns = selection.validity(h), selection.columns
    context = replace(context or _PLAIN[module.training], valid=valid)
    value = module(node.params, h.to(node.dtype or h.dtype), context)
    if module.intervention.pools:
        valid, columns = valid.any(1, keepdim=True), None
    if node.share is not None:
        assert run.shape is not None
        rows = node.share.start, run.shape[0] - node.share.stop
        value, valid = F.pad(value, (0, 0, 0, 0, *rows)), F.pad(valid, (0, 0, *rows))
        columns = None if columns is None else F.pad(columns, (0, 0, *rows))
    owned = {node.key: (valid, module.stored())} if isinstance(module, NodeModule) else {}
    if isinstance(module, SideBySide):
        whose = torch.arange(len(h), device=h.device)[:, None] // (len(h) // len(module.modules))
        owned = {key: (valid & (whose == i), own.stored()) for i, (key, own) in enumerate(module.modules.items())}
    single = node.planned.node.positions.bound == 1 or module.intervention.pools
    for key, (valid_rows, p) in owned.items():
        seen = torch.where(valid_rows[..., None], value, torch.zeros_like(value))
        run.readings[key] = Reading(module.intervention, seen, valid_rows, columns, length, single, p)
        if single and run.continues is not None:
            sources = run.continues.sources
            sources[key] = Source(seen, valid_rows).since(sources.get(key))


def _source(run: Run, node: Acting) -> Source:
    key = (node.key[0], str(node.planned.node.source))
    if run.continues is not None and key in run.continues.sources:
        return run.continues.sources[key]
    if key not in run.readings:
        raise _lies_before(node)
    return Source(run.readings[key].value, run.readings[key].valid)


def _check_decided(run: Run, node: Acting, chunk: int) -> None:
    """Raise `ValueError` where tokens of this chunk may hang on one that comes in a later chunk."""
    assert node.source is not None
    frame, rule, source = run.frame, node.planned.node.positions, node.source.node
    if source.positions == rule or str(rule) == "generated" or str(source.positions) in ("f1", "0"):
        return
    prompt = frame.prompt_mask
    if prompt is not None and isinstance(frame.past, int) and frame.past + chunk < prompt.shape[1]:
        raise ValueError(
            f"node {node.key[1]!r} at {rule} reads {source.name!r} at {source.positions}, which may lie behind "
            "this chunk of the prompt: feed the prompt whole, or edit at positions 'generated'"
        )


def _check_not_before(
    run: Run, node: Acting, h: Float[Tensor, "batch chunk width"], selection: Selection, source: Source
) -> None:
    """Raise `ValueError` where tokens of this chunk may hang on one of an earlier chunk, which nobody remembers."""
    if run.continues is not None or run.masks is not None or int(run.frame.past) == 0:
        return
    if bool((selection.validity(h).any(1) & ~source.valid[:, 0]).any()):
        raise _lies_before(node)


def _lies_before(node: Acting) -> ValueError:
    assert node.source is not None
    return ValueError(
        f"node {node.key[1]!r} reads {node.source.node.name!r}, which has not run in this pass: its tokens lie before "
        "this chunk. Pass the whole input, or use generate, which remembers"
    )


def _index(planned: PlannedNode, device: torch.device) -> slice | Tensor | None:
    columns = planned.address.columns
    if columns is None:
        return None
    return slice(columns.start, columns.stop) if isinstance(columns, range) else _columns(columns, device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept may be needed for a backward pass
def _columns(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the columns as a tensor that is sent to its device once, since sending waits for it."""
    return torch.tensor(columns, device=device)

"""The components of a stack: which stack, which block, and which module of it a word of the vocabulary means."""

from dataclasses import replace

from torch import nn

from reftheads.architectures.address import Address, model_type, name_of
from reftheads.architectures.blocks import (
    added_by,
    attention_norm,
    attention_of,
    attention_owner,
    mlp_norm,
    mlp_of,
    read_by,
)
from reftheads.architectures.fused import heads_changed
from reftheads.architectures.heads import HeadSite, heads_of
from reftheads.architectures.names import ATTENDS
from reftheads.architectures.paths import first_child, join
from reftheads.architectures.structure import StackInfo, Structure, that_embed
from reftheads.architectures.widths import Columns, index_in_range, known_width, width_of
from reftheads.graph.site import BLOCK_COMPONENTS, Side, Site, Stack


def choose_stack(structure: Structure, wanted: Stack | None) -> StackInfo:
    """Return the stack that a site means."""
    model, name = structure.model, name_of(structure.model)
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
    of_text = that_embed(model, matching)
    if len(of_text) != 1:
        paths = ", ".join(repr(info.path) for info in matching)
        raise ValueError(f"{name} has several {role}s ({paths}): use the dotted path of a module")
    return of_text[0]


def final_norm(model: nn.Module, info: StackInfo, site: Site) -> Address:
    """Return the address of what leaves the norm after the last block."""
    if info.final_norm is None:
        raise ValueError(f"{name_of(model)} has no final norm: block_output of layer=-1 is what leaves its last block")
    width = residual_width(model, info)
    return Address(site, info.final_norm, "output", width, None, info.path, (len(info.blocks), 0))


def locate_in_block(structure: Structure, info: StackInfo, site: Site, layer: int) -> Address:
    """Return the address of a component of a block; `layer` is counted from 0."""
    model, component = structure.model, site.component
    path = info.blocks[layer]
    where = f"layer {layer} of {name_of(model)}"
    block = model.get_submodule(path)
    residual = residual_width(model, info)

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
            reads = mlp.input if mlp.down else read_by(structure.steps(info).get(path), mlp.input)
            return at(reads, "input", residual)
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
    heads = heads_of(block, owner, out, component, where, model_type(model))
    if component != "head_output":
        outputs = heads_of(block, owner, out, "head_output", where, model_type(model))
        _check_order_of_heads(structure, info, path, block.get_submodule(owner), heads, outputs, where)
    if site.head is not None:
        head = index_in_range(site.head, len(heads.heads), "head", f"{component} of {name_of(model)}")
        site = replace(site, head=head)
    whole = width_of(block.get_submodule(heads.module), heads.side)
    columns = heads.columns(whole, site.head)
    width = len(columns) if columns is not None else whole or 0
    step = "query_output" if heads.fused else component  # a fused projection gives all three at once
    return at(heads.module, heads.side, width, columns, step)


def _check_order_of_heads(
    structure: Structure,
    info: StackInfo,
    block: str,
    attention: nn.Module,
    heads: HeadSite,
    outputs: HeadSite,
    where: str,
) -> None:
    """Raise `ValueError` if features of the first head of a fused projection change what other heads give.

    The order is that of a class, so that one of its attentions is looked at.
    """
    seen = structure.seen(info)
    if seen is None or not heads.fused:
        return
    paths = join(block, heads.module), join(block, outputs.module)
    changed = structure.once(
        ("heads", type(attention), heads, outputs),
        lambda: heads_changed(structure.model, seen.part, paths[0], heads.heads[0], paths[1]),
    )
    group = len(outputs.heads) // len(heads.heads)
    own = {column for features in outputs.heads[:group] for column in features}
    if changed is not None and (not changed or changed - own):
        raise ValueError(
            f"{where}: the order of queries, keys and values in {heads.module!r} is not a known one, since a change of "
            f"{len(heads.heads[0])} features changes {len(changed)} of {outputs.module!r}'s: use a module path"
        )


def residual_width(model: nn.Module, info: StackInfo) -> int:
    """Return the width of the residual stream: that of what a query projection reads; 0 if that cannot be told."""
    for path in info.blocks:
        owner = attention_owner(model.get_submodule(path))
        name = None if owner is None else first_child(owner[1], ATTENDS)
        if owner is not None and name is not None:
            return width_of(owner[1].get_submodule(name), "input") or 0
    return 0

"""What a graph does to one row, read off the graph by loops over nodes and tokens: hooks by hand, no padding, no cache.

Nothing of the library's runtime is used: rules of positions are those of `support.rules`, places those of `places`,
equations those of `formulas`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from support import rules
from torch import Tensor, nn

from fuzz import formulas
from fuzz.places import Arch, Place, base_of


@dataclass(frozen=True)
class Listed:
    """A node with what it needs.

    Attributes:
        key: adapter and name.
        node: as the graph has it.
        place: where it acts.
        p: its parameters by name.
        other_stack: whether it sees the tokens of the encoder while the decoder runs.
    """

    key: tuple[str, str]
    node: Any
    place: Place
    role: str
    p: Mapping[str, Tensor]
    other_stack: bool = False

    @property
    def of_embeddings(self) -> bool:
        """Whether it acts on what the embeddings give."""
        return self.node.site.component == "embedding_output"

    @property
    def edits(self) -> bool:
        """Whether it writes."""
        return not hasattr(self.node.intervention, "read")


@dataclass
class Row:
    """One row on its own, and what has been read of it.

    Attributes:
        prompt: by stack, the tokens of its prompt by number; `None`: all that there are.
        ids: by stack, its tokens; filled in by the pass.
        read: by node, what it read of which tokens.
        single: by node, its one prediction for all of its tokens.
    """

    prompt: dict[str, list[int] | None]
    ids: dict[str, list[int] | None] = field(default_factory=dict)
    read: dict[tuple[str, str], dict[int, Tensor]] = field(default_factory=dict)
    pooled: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def tokens_of(rule: Any, row: Row, role: str, total: int) -> list[int]:
    """The numbers of the tokens that a rule means in a row of so many."""
    real, marked = list(range(total)), row.prompt[role]
    prompt = real if marked is None else [i for i in marked if i < total]
    if rule.token_ids is not None:
        ids = row.ids[role]
        assert ids is not None
        return rules.with_ids(rule.token_ids, real, ids)
    if rule.rule is not None:
        return rules.every({"every_second": 2, "every_third": 3}[rule.rule.__name__], real, prompt)
    return rules.selected(rule.text, real, prompt)


def _gate(listed: Listed, row: Row, nodes: Sequence[Listed], token: int) -> Tensor | None:
    """What a node reads of its source at one token; `None` where there is nothing."""
    source = next(n for n in nodes if n.key == (listed.key[0], listed.node.source))
    values = row.read.get(source.key, {})
    if source.node.positions == listed.node.positions and source.role == listed.role:
        return values.get(token)
    assert len(values) < 2, "a source selects one token"
    return next(iter(values.values()), None)


def _one(listed: Listed, row: Row, nodes: Sequence[Listed], h: list[Tensor], x: Tensor) -> None:
    """Let one node act on the tokens `h` of a row, in place."""
    rule, what = listed.node.positions, listed.node.intervention
    chosen = list(range(len(h))) if listed.other_stack else tokens_of(rule, row, listed.role, len(h))
    columns = listed.place.columns
    index = slice(None) if columns is None else torch.tensor(columns)
    if listed.edits:
        for i in chosen:
            gate = None
            if listed.node.source is not None:
                gate = _gate(listed, row, nodes, i)
                if gate is None:
                    continue
            new = h[i].clone()
            new[index] = formulas.edited(what, listed.p, h[i][index], x[i], gate)
            h[i] = new
        return
    seen = {i: h[i][index].detach() if what.detach else h[i][index] for i in chosen}
    if type(what).__name__ == "Norm":
        row.read[listed.key] = {i: (state @ state + 1e-3).sqrt()[None] for i, state in seen.items()}
        return
    if getattr(what, "pool", None) is not None:
        row.read[listed.key] = {}
        if seen:
            state = formulas.pooled(what, listed.p, list(seen.values()))
            row.pooled[listed.key] = formulas.mapped(what, listed.p, state)
    elif type(what).__name__ == "Collect":
        row.read[listed.key] = seen
    else:
        row.read[listed.key] = {i: formulas.mapped(what, listed.p, state) for i, state in seen.items()}


def _act(rows: Sequence[Row], here: Sequence[Listed], nodes: Sequence[Listed], h: Tensor, x: Tensor) -> Tensor:
    flat = h.ndim == 2  # one row's tokens after the other's
    if flat:
        h, x = (t.unflatten(0, (len(rows), -1)) for t in (h, x))
    new = []
    for row, states, entered in zip(rows, h, x, strict=len(h) > 1):
        tokens = list(states)
        for listed in here:
            _one(listed, row, nodes, tokens, entered)
        new.append(torch.stack(tokens))
    for row in rows[len(h) :]:  # beams share what an encoder has seen once
        row.read.update(rows[0].read)
        row.pooled.update(rows[0].pooled)
    out = torch.stack(new)
    return out.flatten(0, 1) if flat else out


@contextmanager
def hooked(arch: Arch, nodes: Sequence[Listed], rows: Sequence[Row]) -> Iterator[nn.Module]:
    """Within, the base model does to these rows, as they come in one batch without padding, what the nodes say."""
    base = base_of(arch.name)

    def first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())

    def before(here: Sequence[Listed]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            h = first(args, kwargs)
            new = _act(rows, here, nodes, h, h)
            if args:
                return (new, *args[1:]), kwargs
            return args, {name: new if value is h else value for name, value in kwargs.items()}

        return hook

    def after(here: Sequence[Listed]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            new = _act(rows, here, nodes, h, first(args, kwargs))
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return hook

    def given(role: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            for i, row in enumerate(rows):
                row.ids[role] = None if ids is None else ids[min(i, len(ids) - 1)].tolist()

        return hook

    with ExitStack() as stack:
        for role, path in arch.stacks.items():
            module = base.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(given(role), with_kwargs=True).remove)
        by_module: dict[tuple[str, str], list[Listed]] = {}
        for listed in nodes:
            for path in listed.place.modules:
                by_module.setdefault((path, listed.place.side), []).append(listed)
        for (path, side), here in by_module.items():
            here.sort(key=lambda listed: not listed.of_embeddings)  # what they give, then what block 0 is given
            module = base.get_submodule(path)
            if side == "input":
                handle = module.register_forward_pre_hook(before(here), with_kwargs=True)
            else:
                handle = module.register_forward_hook(after(here), with_kwargs=True)
            stack.callback(handle.remove)
        yield base

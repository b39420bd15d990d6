"""What modules take and give in one pass, and changes made there by hand: it knows nothing of the library."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""A tensor as the module takes or gives it -> what goes on in its place."""


@dataclass(frozen=True)
class Place:
    """Name one tensor at a module: an argument, by position or keyword, or one of what it returns."""

    path: str
    side: str
    key: Any


@dataclass
class Seen:
    """One tensor that passed a module, in the order of time."""

    place: Place
    value: Tensor


class Trace:
    """Record all floating tensors of two or more dimensions that enter or leave modules."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.calls: list[str] = []
        self.output: Any = None

    def values(self, path: str, side: str) -> list[Tensor]:
        """Return what entered or left a module, in order."""
        return [s.value for s in self.seen if (s.place.path, s.place.side) == (path, side)]

    def places(self, value: Tensor, within: str = "") -> list[Place]:
        """Return where a tensor of exactly these values passed, whatever its shape."""
        inside = (s for s in self.seen if not within or f"{s.place.path}.".startswith(f"{within}."))
        return list(dict.fromkeys(s.place for s in inside if covers(s.value, value)))


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same features of the same tokens."""
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and _equal(flat(a), flat(b))


def covers(h: Tensor, value: Tensor) -> bool:
    """Return whether a tensor holds these features, and at most padding that the model adds by itself after them."""
    rows, wanted = flat(h), flat(value)
    longer = wanted.shape[0] < rows.shape[0] < 2 * wanted.shape[0] and rows.shape[1] == wanted.shape[1]
    return same(h, value) or longer and _equal(rows[: wanted.shape[0]], wanted)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are the same, but for the rounding of float64 where copies of weights lie elsewhere."""
    if torch.equal(a, b):
        return True
    return a.dtype == b.dtype == torch.float64 and torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def flat(h: Tensor) -> Tensor:
    """[..., width] -> [tokens of all rows, width]."""
    return h.reshape(-1, h.shape[-1])


def tensors(value: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors of what a module returns, each with its key; `None` where it is one tensor."""
    if isinstance(value, Tensor):
        yield None, value
    elif isinstance(value, Mapping):
        yield from ((key, v) for key, v in value.items() if isinstance(v, Tensor))
    elif isinstance(value, tuple | list):
        yield from ((i, v) for i, v in enumerate(value) if isinstance(v, Tensor))


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Return what happened at every module in one pass without gradient."""
    record = Trace()

    def keep(path: str, side: str, items: Sequence[tuple[Any, Any]]) -> None:
        for key, h in items:
            if isinstance(h, Tensor) and h.is_floating_point() and h.ndim >= 2:
                record.seen.append(Seen(Place(path, side, key), h.detach().clone()))

    with ExitStack() as hooks:
        for path, module in model.named_modules():

            def before(_m: nn.Module, args: tuple, kwargs: dict[str, Any], path: str = path) -> None:
                record.calls.append(path)
                keep(path, "input", [*enumerate(args), *kwargs.items()])

            def after(_m: nn.Module, _args: tuple, _kwargs: dict[str, Any], out: Any, path: str = path) -> None:
                keep(path, "output", list(tensors(out)))

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        record.output = run(model, inputs)
    return record


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return what a model gives without gradient, from one state of the random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)


@contextmanager
def by_hand(model: nn.Module, changes: Sequence[tuple[Place, Change]]) -> Iterator[None]:
    """Within, the tensors at some places are changed by plain hooks."""
    with ExitStack() as hooks:
        for place, change in changes:
            module = model.get_submodule(place.path)

            def before(
                _m: nn.Module, args: tuple, kwargs: dict[str, Any], place: Place = place, change: Change = change
            ) -> tuple[tuple, dict[str, Any]]:
                if isinstance(place.key, str):
                    return args, kwargs | {place.key: change(kwargs[place.key])}
                return (*args[: place.key], change(args[place.key]), *args[place.key + 1 :]), kwargs

            def after(_m: nn.Module, _args: tuple, out: Any, place: Place = place, change: Change = change) -> Any:
                if place.key is None:
                    return change(out)
                if isinstance(out, Mapping):
                    out[place.key] = change(out[place.key])  # type: ignore[index]
                    return out
                items = list(out)
                items[place.key] = change(items[place.key])
                named = hasattr(out, "_fields")
                return type(out)(*items) if named else tuple(items) if isinstance(out, tuple) else items

            if place.side == "input":
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                hooks.callback(module.register_forward_hook(after).remove)
        yield


@dataclass(frozen=True)
class Chain:
    """Describe blocks that run one after another.

    Attributes:
        path: of the list that holds them.
        blocks: their paths; a block that does not run, as a cross-attention without images, is none.
        numbers: the place of each in the list.
        exact: whether what leaves each is what enters the next.
        into, out: where the residual stream enters and leaves each.
    """

    path: str
    blocks: tuple[str, ...]
    numbers: tuple[int, ...]
    exact: bool
    into: tuple[Place, ...]
    out: tuple[Place, ...]


def chains(model: nn.Module, record: Trace, tokens: Tensor | None = None) -> list[Chain]:
    """Return the outermost lists of modules that hand a tensor on from one to the next, in the order of time.

    Where something happens between the modules, a list counts whose members are called once each, in order, and
    take and give a tensor of one shape.
    """
    found: list[Chain] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if any(f"{path}.".startswith(f"{block}.") for chain in found for block in chain.blocks):
            continue
        members = {f"{path}.{i}" if path else str(i): i for i in range(len(module))}
        blocks = tuple(c for c in record.calls if c in members)
        numbers = tuple(members[block] for block in blocks)
        if len(blocks) < 2 or list(numbers) != sorted(set(numbers)):
            continue
        pairs = _handed_on(record, blocks)
        if not pairs:
            continue
        exact = _exact(pairs)
        if not exact and len({h.value.shape for pair in pairs for h in pair}) > 1:
            continue
        into, out = tuple(a.place for a, _ in pairs), tuple(b.place for _, b in pairs)
        found.append(Chain(path, blocks, numbers, exact, into, out))
    return sorted(found, key=lambda chain: record.calls.index(chain.blocks[0]))


def _exact(pairs: Sequence[tuple[Seen, Seen]]) -> bool:
    """Return whether what leaves each block is what enters the next."""
    return all(same(a[1].value, b[0].value) for a, b in zip(pairs, pairs[1:], strict=False))


def _handed_on(record: Trace, blocks: Sequence[str]) -> list[tuple[Seen, Seen]]:
    """Return of each block the first tensor that enters it, and what leaves it; empty where one has none.

    What leaves it is the first of its outputs if that enters the next block, else the first of the shape that entered.
    """
    into, firsts, alikes = [], [], []
    for block in blocks:
        enters = [s for s in record.seen if (s.place.path, s.place.side) == (block, "input")]
        leaves = [s for s in record.seen if (s.place.path, s.place.side) == (block, "output")]
        if not enters or not leaves:
            return []
        alike = [s for s in leaves if s.value.shape == enters[0].value.shape]
        into.append(enters[0])
        firsts.append(leaves[0])
        alikes.append((alike or leaves)[0])
    pairs = list(zip(into, firsts, strict=True))
    return pairs if _exact(pairs) else list(zip(into, alikes, strict=True))

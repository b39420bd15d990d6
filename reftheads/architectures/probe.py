"""One small pass through a model: which modules run, on tensors of which shapes, and which tokens they look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reftheads.architectures.names import is_norm
from reftheads.architectures.paths import arguments, leaf, own_modules, parent, within
from reftheads.architectures.sample import Inputs
from reftheads.architectures.small_pass import ROWS, TOKENS, listening, rows_apart, run

_KEPT = 64  # models of which it is remembered what was seen

Shape = tuple[int, ...]


@dataclass
class Seen:
    """What a pass saw of one module.

    Attributes:
        calls: how often it was called.
        turn: how many calls of modules came before its first one.
        entered, left: shapes of the tensors that its first argument was, and its output or the first element of that;
            `None` if it was no tensor, or had another shape at another call.
    """

    calls: int = 0
    turn: int = 0
    entered: Shape | None = None
    left: Shape | None = None


@dataclass
class ListSeen:
    """What a pass saw of a list of modules.

    Attributes:
        order: the members in the order in which they were called.
        chained: whether each was given what the one before had returned, unchanged.
        causal: whether what leaves the last of them depends on no later token; `None` if that could not be seen.
        columns: how many columns enter the first of them, one for each token, in their order, and perhaps more; `None`
            if what enters it has another form.
        of_text: whether the pass was one over tokens.
        part: path of the module that was run.
        norm: path of the first norm beside or above the list that is given what the last member returns.
    """

    order: list[int] = field(default_factory=list)
    chained: bool = True
    causal: bool | None = None
    columns: int | None = None
    of_text: bool = True
    part: str = ""
    norm: str | None = None


@dataclass
class Observation:
    """What a small pass through a model showed.

    Attributes:
        modules: by path, those that were called.
        lists: by path, the lists of modules of which a member was called.
        causal: whether what leaves the model depends on no later token; `None` if that could not be seen.
        of_text: whether it was run on tokens.
    """

    modules: dict[str, Seen] = field(default_factory=dict)
    lists: dict[str, ListSeen] = field(default_factory=dict)
    causal: bool | None = None
    of_text: bool = True

    def within(self, path: str) -> bool:
        """Return whether a module, or a part of it, was called."""
        return any(within(seen, path) for seen in self.modules)


_memories: dict[Any, dict[Any, Any]] = {}


def memory_of(model: nn.Module) -> dict[Any, Any]:
    """Return what is remembered of models of one class, configuration, type of weights and tree of modules."""
    key = _key(model)
    while key not in _memories and len(_memories) >= _KEPT:
        _memories.pop(next(iter(_memories)), None)
    return _memories.setdefault(key, {})


def observe(model: nn.Module) -> Observation:
    """Return what a small pass shows of a model.

    Text is three rows of seven tokens: the second differs from the first in its last token, the third, in an
    encoder-decoder model, in the last token of the answer. A model that runs on none of the inputs shows nothing, and
    so does one with weights on the meta device. Parts that the pass has not reached, such as the towers for images,
    are run by themselves.
    """
    observation = Observation()
    if any(weight.is_meta for weight in model.parameters()) and not hasattr(model, "_hf_hook"):
        return observation
    _watch(model, "", observation)
    for path in _unreached(model, observation):
        _watch(model, path, observation)
    return observation


def _key(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    settings = config.to_json_string() if hasattr(config, "to_json_string") else id(model)
    implementation = getattr(config, "_attn_implementation", None)
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    kind = None if weight is None else (weight.dtype, weight.device.type)
    return type(model), settings, implementation, kind, hash(tuple((path, type(m)) for path, m in own_modules(model)))


def _unreached(model: nn.Module, observation: Observation) -> list[str]:
    """Return the outermost parts of a model with a list of modules, and inputs of their own, that have not run."""
    parts: list[str] = []
    for path, module in own_modules(model):
        if observation.within(path) or any(within(path, part) for part in parts):
            continue
        takes = {"input_ids", "pixel_values", "input_features", "input_values"} & set(arguments(module))
        if takes and any(isinstance(m, nn.ModuleList) for m in module.modules()):
            parts.append(path)
    return parts


def _watch(model: nn.Module, part: str, observation: Observation) -> None:
    """Run a part of a model, and add what that shows to an observation."""
    watching = _Watching(model, part)
    with listening(watching.modules, watching.before, watching.after):
        finished = run(model, part, *rows_apart(), begin=watching.begin)
    if not finished:
        return
    observation.modules |= watching.observation.modules
    observation.lists |= watching.observation.lists
    if not part:
        observation.causal, observation.of_text = watching.observation.causal, watching.of_text


class _Watching:
    """Collects what a pass through a part of a model shows."""

    def __init__(self, model: nn.Module, part: str):
        self.part = part
        self.modules = [(path, module) for path, module in own_modules(model) if within(path, part)]
        self.lists = {path: len(module) for path, module in self.modules if isinstance(module, nn.ModuleList)}
        self.begin({})

    def begin(self, inputs: Inputs) -> None:
        """Forget what an attempt showed that came to nothing."""
        self.observation = Observation()
        self.turn = 0
        self.of_text = not inputs.keys().isdisjoint({"input_ids", "inputs_embeds"})  # an encoder's, not an answer
        self._left: dict[str, Tensor | None] = {}  # by list, what the member that was called last has returned

    def before(self, path: str, module: nn.Module, entered: Tensor | None) -> None:
        """Note what a module is given."""
        seen = self.observation.modules.setdefault(path, Seen())
        shape = None if entered is None else tuple(entered.shape)
        seen.entered = shape if not seen.calls or seen.entered == shape else None
        seen.turn = seen.turn if seen.calls else self.turn
        seen.calls += 1
        self.turn += 1
        if parent(path) in self.lists:
            of_list = self.observation.lists.setdefault(parent(path), ListSeen(part=self.part))
            before = self._left.get(parent(path))
            if of_list.order:
                of_list.chained &= before is not None and entered is not None and same(before, entered)
            else:
                of_list.columns = None if entered is None else _columns_of_tokens(entered)
                of_list.of_text = of_list.columns is not None or self.of_text
            of_list.order.append(int(leaf(path)))
        if entered is not None and is_norm(module):
            self._notice_norm(path, entered)

    def _notice_norm(self, path: str, entered: Tensor) -> None:
        """Note a norm that is given what the last member of a list has returned."""
        for of_list, left in self._left.items():
            seen = self.observation.lists[of_list]
            done = seen.order[-1] == self.lists[of_list] - 1 and within(of_list, parent(path))
            if done and seen.norm is None and left is not None and same(left, entered):
                seen.norm = path

    def after(self, path: str, left: Tensor | None) -> None:
        """Note what a module returns."""
        seen = self.observation.modules[path]
        shape = None if left is None else tuple(left.shape)
        seen.left = shape if seen.calls == 1 or seen.left == shape else None
        if parent(path) in self.lists:
            self._left[parent(path)] = None if left is None else left.clone()
            of_list = self.observation.lists[parent(path)]
            of_list.causal = _causal(left) if of_list.of_text else None
        elif path == self.part:
            self.observation.causal = _causal(left) if self.of_text else None


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values."""
    if one is other:
        return True
    other = other.to(one.device)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _columns_apart(h: Tensor) -> list[list[int]]:
    """Return of each row but the first the columns in which it differs from the first, [rows columns …]."""
    noise = 20 * torch.finfo(h.dtype).eps
    h = h.detach().float()
    apart = (h[1:] - h[:1]).abs().flatten(2).amax(2) > noise * h.abs().max()
    return [row.nonzero().flatten().tolist() for row in apart]


def _in_rows(h: Tensor) -> Tensor | None:
    """Return a tensor of hidden states as [rows columns width]; `None` if it has another form."""
    if h.ndim == 2 and h.shape[0] == ROWS * TOKENS:
        return h.unflatten(0, (ROWS, TOKENS))
    if h.ndim == 3 and tuple(h.shape[:2]) == (TOKENS, ROWS):
        return h.transpose(0, 1)
    return h if h.ndim == 3 and h.shape[0] == ROWS and h.shape[1] > 1 else None


def _causal(h: Tensor | None) -> bool | None:
    """Return whether rows that differ in their last token differ in no earlier one; `None` if none differ."""
    rows = None if h is None else _in_rows(h)
    apart = [] if rows is None else [columns for columns in _columns_apart(rows[:, :TOKENS]) if columns]
    return any(columns == [TOKENS - 1] for columns in apart) if apart else None


def _columns_of_tokens(h: Tensor) -> int | None:
    """Return how many columns a tensor has whose rows, which differ in their last token, differ in its column alone."""
    rows = _in_rows(h)
    if rows is None or [TOKENS - 1] not in _columns_apart(rows):
        return None
    return rows.shape[1]

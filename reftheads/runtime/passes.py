"""What is known of one forward pass, while it lasts.

A `Frame` says where the columns of a pass lie, a `Run` which nodes act in it; a `Call` what the base model
was given besides, and a `Generation` what holds for all passes of one `generate`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reftheads.graph.node import Context, NodeModule, Params, apply
from reftheads.graph.positions import Positions, Selection, Tokens
from reftheads.graph.site import Side
from reftheads.runtime.output import Reading
from reftheads.runtime.plan import PlannedNode

FEW = 64  # tokens of a batch

HookKey = tuple[str, Side]
NodeKey = tuple[str, str]  # adapter, node


class SideBySide:
    """The same node of several adapters, each on an equal share of a batch's rows, with their weights stacked."""

    def __init__(self, modules: Mapping[NodeKey, NodeModule]):
        self.modules = modules
        one = next(iter(modules.values()))
        self.intervention = one.intervention
        self.training = one.training

    def __call__(self, p: Params | None, h: Tensor, context: Context) -> Tensor:
        """Edits or reads `h` [adapters·rows slots width] with parameters that have a dimension of adapters."""
        assert p is not None
        share = (len(self.modules), -1)
        x, valid = (None if t is None else t.unflatten(0, share) for t in (context.x, context.valid))
        in_dims = (0, 0, None if x is None else 0, None if valid is None else 0)
        act = torch.vmap(self._one, in_dims=in_dims, randomness="different")
        return act(p, h.unflatten(0, share), x, valid).flatten(0, 1)

    def _one(self, p: Params, h: Tensor, x: Tensor | None, valid: Tensor | None) -> Tensor:
        return apply(self.intervention, p, h, Context(x, None, self.training, valid))


class Acting(NamedTuple):
    """A node that acts in this pass; or the same one of several adapters."""

    key: NodeKey
    planned: PlannedNode
    module: NodeModule | SideBySide
    params: Params | None
    dtype: torch.dtype | None  # of the computation; None: that of the hidden states
    rows: Tensor | None  # Bool[batch]: the rows that its adapter was picked for


@dataclass(frozen=True)
class Frame:
    """Where the columns of a pass lie, before any tensor arithmetic; see `Tokens.of`."""

    past: int | Tensor
    attention_mask: Tensor | None
    prompt_mask: Tensor | None
    input_ids: Tensor | None

    def tokens(self, h: Tensor) -> Tokens:
        """As `h` sees them, on its device: a model may be spread over several."""
        given = (self.past, self.attention_mask, self.prompt_mask, self.input_ids)
        past, mask, prompt, ids = (t.to(h.device) if isinstance(t, Tensor) else t for t in given)
        return Tokens.of((h.shape[0], h.shape[1]), past, mask, prompt, ids, h.device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """One pass through one stack. Nothing in it changes what is computed once it is made."""

    frame: Frame
    acting: Mapping[HookKey, Sequence[Acting]]
    shape: tuple[int, int] | None  # batch, chunk; None until a module is called, for models without tokens
    readings: dict[NodeKey, Reading] = field(default_factory=dict)
    masks: Mapping[int, Tensor] | None = None  # by id of a rule: Bool[batch chunk], where the frame does not say
    _tokens: dict[torch.device, Tokens] = field(default_factory=dict)
    _selections: dict[tuple[int, bool, torch.device], Selection | None] = field(default_factory=dict)

    def selection(self, positions: Positions, h: Tensor, mask: bool) -> Selection | None:
        """Resolved once a pass (and device) for every rule that occurs.

        Where there are few tokens it takes less time to edit all of them and choose by a `mask` than to gather some.
        """
        key = (id(positions), mask, h.device)
        if key not in self._selections and self.masks is not None:
            self._selections[key] = positions.pick(self.masks[id(positions)].to(h.device), FEW if mask else 0)
        if key not in self._selections:
            if h.device not in self._tokens:
                self._tokens[h.device] = self.frame.tokens(h)
            self._selections[key] = positions.select(self._tokens[h.device], FEW if mask else 0)
        return self._selections[key]


@dataclass
class Call:
    """What a call of the base model was given that concerns the graph, and what was read during it."""

    labels: Tensor | None = None
    prompt_mask: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[NodeKey, Reading] = field(default_factory=dict)

    def named(self) -> dict[str, Reading]:
        """What was read by the names of the nodes; with the adapter's where several have a node of one name."""
        names = [node for _, node in self.readings]
        return {
            node if names.count(node) == 1 else f"{adapter}/{node}": reading
            for (adapter, node), reading in self.readings.items()
        }


@dataclass(frozen=True)
class Source:
    """What a node reads of another one: [batch slots outputs], and which slots hold a token."""

    value: Tensor
    valid: Tensor

    def since(self, before: "Source | None") -> "Source":
        """What is known after this chunk, where each row's one token may lie in an earlier one."""
        if before is None:
            return self
        value = torch.where(self.valid[..., None], self.value, before.value)
        return Source(value, self.valid | before.valid)

    def beside(self, h: Tensor) -> "Source":
        """On the device of `h`, and as many rows: behind an encoder, beams and return sequences repeat its rows."""
        times = max(h.shape[0] // self.value.shape[0], 1)
        return Source(*(t.to(h.device).repeat_interleave(times, 0) for t in (self.value, self.valid)))


@dataclass
class Generation:
    """What `generate` started from; holds for all passes until it ends."""

    real: Tensor  # Bool[rows columns], of the input of the stack that generates
    prompt: Tensor  # Bool[rows columns]
    encoder_prompt: Tensor | None = None  # Bool[rows columns], of the input of an encoder before it
    sources: dict[NodeKey, Source] = field(default_factory=dict)
    derived: dict[NodeModule, Params | None] = field(default_factory=dict)  # weights stay as they are meanwhile
    _expanded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def masks(self, rows: int) -> tuple[Tensor, Tensor]:
        """`real` and `prompt` of `rows` rows: beams and return sequences repeat each recorded row."""
        if rows not in self._expanded:
            times = max(rows // self.prompt.shape[0], 1)
            self._expanded[rows] = (self.real.repeat_interleave(times, 0), self.prompt.repeat_interleave(times, 0))
        return self._expanded[rows]


def derive(modules: Iterable[NodeModule]) -> dict[NodeModule, Params | None]:
    """The parameters of every module with what is derived from them; modules of one kind together."""
    out: dict[NodeModule, Params | None] = {}
    groups: dict[Any, list[dict[str, Tensor]]] = {}
    for module in modules:
        if module in out:
            continue
        stored = module.stored()
        first = next(iter(stored.values()), None)
        if hasattr(first, "ds_id"):  # ZeRO-3 gathers inside the module's call only
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

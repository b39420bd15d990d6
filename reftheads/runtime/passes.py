"""One pass through one stack of blocks: which nodes act in it, and on which tokens.

A `Run` is what is known of such a pass; nothing in it changes what is computed once it is made. A `Prompt` is what
several passes of one `generate` continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reftheads.graph.intervention import Context, Params
from reftheads.graph.positions import Positions
from reftheads.graph.selection import Selection
from reftheads.graph.site import Side
from reftheads.graph.tokens import Tokens
from reftheads.runtime.node_module import NodeModule, apply
from reftheads.runtime.output import Reading
from reftheads.runtime.plan import PlannedNode

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FEW = 64  # tokens of a batch

HookKey = tuple[str, Side]
NodeKey = tuple[str, str]  # adapter, node


@dataclass(frozen=True)
class Frame:
    """Where the columns of a pass lie, before any tensor arithmetic; see `Tokens.of`.

    Behind an encoder, also which of its tokens are real.
    """

    past: int | Tensor
    attention_mask: Tensor | None
    prompt_mask: Tensor | None
    input_ids: Tensor | None
    encoder_mask: Tensor | None = None

    def tokens(self, h: Float[Tensor, "batch chunk width"]) -> Tokens:
        """Return the columns as `h` sees them, on its device: a model may be spread over several."""
        parts = (self.past, self.attention_mask, self.prompt_mask, self.input_ids)
        past, mask, prompt, ids = (t.to(h.device) if isinstance(t, Tensor) else t for t in parts)
        return Tokens.of((h.shape[0], h.shape[1]), past, mask, prompt, ids, h.device)  # type: ignore[arg-type]

    def of_encoder(self, h: Float[Tensor, "batch encoded width"]) -> Selection:
        """Return the encoder's tokens, which a cross-attention sees, without padding."""
        return Selection(mask=None if self.encoder_mask is None else self.encoder_mask.to(h.device).bool())


class SideBySide:
    """The same node of several adapters, each on an equal share of a batch's rows, with their weights stacked."""

    def __init__(self, modules: Mapping[NodeKey, NodeModule]):
        self.modules = modules
        one = next(iter(modules.values()))
        self.intervention = one.intervention
        self.training = one.training

    def __call__(self, p: Params | None, h: Tensor, context: Context) -> Tensor:
        """Edit or read `h` [adapters·rows slots width] with parameters that have a dimension of adapters."""
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
    rows: Bool[Tensor, " batch"] | None  # the rows that its adapter was picked for
    source: PlannedNode | None  # the node that it reads
    share: slice | None = None  # the same rows, where they stand together: it sees no others
    strength: float = 1.0  # how much of its edit is made


@dataclass(frozen=True)
class Source:
    """What a node reads of another one: [batch slots outputs], and which slots hold a token."""

    value: Float[Tensor, "batch slots outputs"]
    valid: Bool[Tensor, "batch slots"]

    def since(self, before: Source | None) -> Source:
        """Return what is known after this chunk, where each row's one token may lie in an earlier one."""
        if before is None:
            return self
        value = torch.where(self.valid[..., None], self.value, before.value)
        return Source(value, self.valid | before.valid)

    def beside(self, h: Float[Tensor, "rows slots width"]) -> Source:
        """Return it with as many rows as `h`, on its device: behind an encoder, beams and samples repeat rows."""
        times = max(h.shape[0] // self.value.shape[0], 1)
        return Source(*(t.to(h.device).repeat_interleave(times, 0) for t in (self.value, self.valid)))


@dataclass(eq=False)
class Prompt:
    """A prompt and its input, which the passes of `generate` continue.

    Attributes:
        real: of the input of the stack that generates, which columns are tokens.
        prompt: which of them are the prompt; `None` where that cannot be told.
        encoder_prompt: of the input of an encoder before it.
        sources: what nodes have read in these passes that others look at.
    """

    real: Bool[Tensor, "rows columns"]
    prompt: Bool[Tensor, "rows columns"] | None
    encoder_prompt: Bool[Tensor, "rows columns"] | None = None
    sources: dict[NodeKey, Source] = field(default_factory=dict)
    _expanded: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def begin(self, real: Bool[Tensor, "rows columns"], prompt: Bool[Tensor, "rows columns"] | None) -> None:
        """Say what the input is, which is not known of a decoder behind an encoder before it begins."""
        self.real, self.prompt = real, prompt
        self._expanded.clear()

    def masks(self, rows: int) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"] | None]:
        """Return `real` and `prompt` of `rows` rows: beams and return sequences repeat each recorded row.

        Raises:
            ValueError: rows that are no such repetition.
        """
        if rows not in self._expanded:
            times, rest = divmod(rows, len(self.real))
            if rest or not times:
                raise ValueError(
                    f"a pass of {rows} rows continues a prompt of {len(self.real)}, and which is whose cannot be told: "
                    "pass prompt_mask"
                )
            repeated = (mask if mask is None else mask.repeat_interleave(times, 0) for mask in (self.real, self.prompt))
            self._expanded[rows] = tuple(repeated)  # type: ignore[assignment]
        return self._expanded[rows]


def by_place(nodes: Iterable[Acting]) -> dict[HookKey, list[Acting]]:
    """Return the nodes at each place: in the order in which a block computes what their sites name, then as listed."""
    places: dict[HookKey, list[Acting]] = {}
    for node in nodes:
        places.setdefault((node.planned.address.module, node.planned.address.side), []).append(node)
    for there in places.values():
        there.sort(key=lambda node: node.planned.address.order or (-1, -1))
    return places


class Replayed(NamedTuple):
    """What the first blocks of a stack give in a pass that does not compute them."""

    blocks: int
    output: Any


@dataclass(frozen=True)
class Run:
    """One pass through one stack.

    Attributes:
        stack: path of the stack.
        frame: where its columns lie.
        acting: the nodes at each place, in their order.
        shape: rows and columns; `None` until a module is called, for models without tokens.
        continues: the prompt that it continues, within `generate`.
        readings: what its nodes have read so far.
        masks: of every rule the columns that it selects, where the frame does not say.
        replayed: what the first blocks give instead of computing it.
    """

    stack: str
    frame: Frame
    acting: Mapping[HookKey, Sequence[Acting]]
    shape: tuple[int, int] | None
    continues: Prompt | None = None
    readings: dict[NodeKey, Reading] = field(default_factory=dict)
    masks: Mapping[Positions, Bool[Tensor, "batch chunk"]] | None = None
    replayed: Replayed | None = None
    _tokens: dict[Any, Tokens] = field(default_factory=dict)
    _selections: dict[Any, Selection | None] = field(default_factory=dict)

    def selection(
        self, positions: Positions, h: Float[Tensor, "batch chunk width"], may_mask: bool
    ) -> Selection | None:
        """Return what a rule selects, resolved once a pass and device for every rule that occurs.

        Args:
            may_mask: whether the selection may be a mask where there are few tokens: editing all of them and choosing
                then takes less time than gathering some.
        """
        # an image model may have fewer columns from block to block
        where = h.device if self.shape is not None else (h.device, h.shape[1])
        key = (positions, may_mask, where)
        if key not in self._selections:
            few = FEW if may_mask else 0
            if self.masks is not None:
                self._selections[key] = positions.pick(self.masks[positions].to(h.device), few)
            else:
                if where not in self._tokens:
                    self._tokens[where] = self.frame.tokens(h)
                self._selections[key] = positions.select(self._tokens[where], few)
        return self._selections[key]

"""Passes of the frozen base model, without gradient, in which no node acts and which end as soon as they can."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from reftheads._utils.eval_mode import evaluating
from reftheads.graph.intervention import IGNORE
from reftheads.graph.site import Side
from reftheads.reuse.facts import Facts
from reftheads.reuse.layout import Layout
from reftheads.reuse.prefix_cache import cache_of, pieces_of
from reftheads.runtime.hooks import Done, attach, in_this_thread

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FILLED = "filled"  # what is captured when the last block has added its keys and values


class Tap(NamedTuple):
    """A tensor to be captured: at which module and side, and which of its features."""

    module: str
    side: Side
    index: Any = slice(None)


@dataclass
class Capture:
    """What a pass is run for, by names, and what it has come by so far."""

    wanted: set[Any]
    tensors: dict[Any, Tensor] = field(default_factory=dict)

    def take(self, name: Any, h: Tensor) -> None:
        """Keep a tensor; ends the pass if it was the last one that is wanted.

        If the pass goes on, a copy is kept: the model may add to its tensor in place, as Falcon does.
        """
        self.tensors[name] = h.detach()
        if self.wanted <= self.tensors.keys():
            raise Done
        self.tensors[name] = self.tensors[name].clone()


def run_frozen(
    facts: Facts,
    capture: Capture,
    taps: Mapping[Any, Tap],
    inputs: Mapping[str, Tensor],
    cache: Any = None,
) -> dict[Any, Float[Tensor, "rows columns width"]]:
    """Run the stack until all that is wanted is known, and return it.

    Args:
        capture: what is wanted.
        taps: where that is; what is not here is taken by somebody else, such as a cache.
        inputs: of the stack.
    """
    shape = next(iter(inputs.values())).shape
    with ExitStack() as on_exit, torch.no_grad(), facts.layer.silent():
        for name, tap in taps.items():
            take = in_this_thread(partial(_take, capture, name, shape, tap.index))
            on_exit.callback(attach(facts.base.get_submodule(tap.module), tap.side, take).remove)
        with suppress(Done):
            facts.stack(**inputs, **({} if cache is None else {"past_key_values": cache, "use_cache": True}))
    return capture.tensors


def _take(capture: Capture, name: Any, shape: Iterable[int], index: Any, h: Tensor, x: Tensor) -> None:
    if h.ndim == 2:
        h = h.unflatten(0, tuple(shape)[:2])
    capture.take(name, h[..., index])


def inputs_of(facts: Facts, ids: Int[Tensor, "rows computed"], layout: Layout) -> dict[str, Tensor]:
    """Return what the stack is fed for the computed part of rows."""
    inputs = {"input_ids": ids, "attention_mask": layout.attention_mask.to(ids.device)}
    if "position_ids" in facts.arguments:
        inputs["position_ids"] = layout.position_ids.to(ids.device)
    return inputs


def keeps_pieces(facts: Facts) -> bool | None:
    """Return whether all blocks keep keys and values of one shape for a token; `None` if a pass over one fails."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=facts.device)
    cache = cache_of([[]], 0, 1, len(facts.blocks))
    try:
        run_frozen(facts, Capture({FILLED}), {}, inputs_of(facts, ids, Layout.behind([0], [1], [0])), cache)
        pieces_of(cache, 0, [1], 0)
    except Exception:  # whatever a cache of another kind makes of this one
        return None
    return True


def output_of_block(facts: Facts) -> Any:
    """Return what the first block returns, as one token shows; `None` where the stack does not run on one alone."""
    outputs: list[Any] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise Done

    ids = torch.zeros(1, 1, dtype=torch.long, device=facts.device)
    handle = facts.blocks[0].register_forward_hook(in_this_thread(keep), prepend=True)
    try:
        with torch.no_grad(), facts.layer.silent(), suppress(Exception):
            facts.stack(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        handle.remove()
    return outputs[0] if outputs else None


def has_usual_loss(base: nn.Module) -> bool:
    """Return whether a model has the loss function of the next tokens, which its forward may not use."""
    return getattr(base, "loss_function", None) is ForCausalLMLoss


class NextTokens(NamedTuple):
    """How a model comes to its loss.

    Attributes:
        shifted: whether it is that which its loss function makes of the next tokens.
        projected: whether its logits are what a linear projection returns, neither scaled nor capped.
    """

    shifted: bool
    projected: bool


def loss_of_next_tokens(facts: Facts) -> NextTokens | None:
    """Return how a model comes to its loss, as a few tokens show; `None` if it has none."""
    base: Any = facts.base
    projection = base.get_output_embeddings()
    if projection is None:
        return None
    returned: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    ids = torch.arange(4, device=facts.device)[None] % projection.weight.shape[0]
    labels = ids.masked_fill(ids == 1, IGNORE)
    options = {"num_items_in_batch": 3} if _takes_any(base) else {}
    handle = projection.register_forward_hook(in_this_thread(keep))
    try:
        with torch.no_grad(), facts.layer.silent(), torch.random.fork_rng(), evaluating(base):
            output = base(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **options)
            usual = base.loss_function(output.logits, labels, output.logits.shape[-1], **options)
    except Exception:  # a model that is fed more than tokens
        return None
    finally:
        handle.remove()
    shifted = bool(torch.isclose(output.loss.double(), usual.double(), rtol=1e-3))
    plain = type(projection) is nn.Linear  # else its weights may be packed
    return NextTokens(shifted, plain and len(returned) == 1 and output.logits is returned[0])


def _takes_any(module: nn.Module) -> bool:
    """Return whether a module's forward takes arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())

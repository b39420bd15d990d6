"""Where the columns of a pass lie, and above all: where the prompt ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftheads.architectures.structure import StackInfo
from reftheads.graph.intervention import IGNORE
from reftheads.graph.positions import Positions
from reftheads.runtime.passes import Frame
from reftheads.runtime.scope import Call
from reftheads.runtime.traces import cache_in, length_of

if TYPE_CHECKING:
    from jaxtyping import Bool


@dataclass(frozen=True)
class BaseKind:
    """What of a base model decides where its prompts are.

    Attributes:
        generative: whether it generates text.
        seq2seq: whether an encoder is fed the input, and a decoder the answer.
        one_stack: whether it has one stack of blocks.
    """

    generative: bool
    seq2seq: bool
    one_stack: bool

    def feeds_input(self, stack: StackInfo) -> bool:
        """Return whether a stack is fed the input that a prompt mask is about, not the answer or an image."""
        if self.seq2seq:
            return not stack.causal
        return stack.causal or self.one_stack


def frame_of(
    kind: BaseKind,
    stack: StackInfo,
    call: Call,
    inputs: Mapping[str, Any],
    shape: tuple[int, int] | None,
    rules: Sequence[Positions],
) -> Frame:
    """Return where the columns of a pass lie, by what the stack and the base model were given.

    Where the prompt ends is taken from, in this order: `generate`, which recorded it; a prompt mask; labels. Without
    any of them the whole input is the prompt.

    Args:
        inputs: what the stack was given, by the names of its arguments.
        shape: rows and columns of the pass; `None` for models without tokens.
        rules: of the nodes that act.

    Raises:
        ValueError: a rule about prompts and nothing that says where they end, or labels from a row's first token on,
            while a language model is trained; rows that hold several sequences; a mask that does not show which
            columns are tokens; a state that does not say how many tokens it has seen.
    """
    past = _past(call, inputs, shape, rules)
    past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
    mask, ids = _mask_and_ids(kind, stack, call, inputs, shape, past)
    flat = mask if _is_flat(mask) else None
    encoder_mask = inputs.get("encoder_attention_mask")
    encoder_mask = encoder_mask if _is_flat(encoder_mask) else None
    relative = next((rule for rule in rules if rule.needs_prompt), None)
    if call.continues is not None and stack.causal and shape is not None:
        if call.continues.prompt is None:
            _refuse_unclear(rules)
        return Frame(past, *call.continues.masks(shape[0]), ids, encoder_mask)
    if relative is not None and _packed(inputs):
        raise ValueError(f"positions {str(relative)!r} need one row a sequence, and these rows are packed: unpack them")
    prompt = _given_mask(kind, stack, call)
    by_labels = prompt is None
    if by_labels:
        prompt = _before_labels(kind, stack, call, shape, past)
    if mask is not None and flat is None and relative is not None and (prompt is None or call.prompt_mask is None):
        raise ValueError(
            f"positions {str(relative)!r} count real tokens, which a mask of this form does not show: pass a "
            "2-D attention_mask, or prompt_mask"
        )
    if by_labels and prompt is not None and call.training:
        _check_prompts(prompt, flat, rules)
    if prompt is None and shape is not None and relative is not None:
        # a head's target shows that rows are whole inputs to be judged, not prompts with answers
        if call.training and stack.causal and kind.generative and not call.targets:
            raise ValueError(
                f"positions {str(relative)!r} depend on where the prompt ends, and this batch does not say: pass "
                "labels with -100 on the prompt, or prompt_mask, or use positions='all'; or call model.eval()"
            )
    return Frame(past, flat, prompt, ids, encoder_mask)


def _past(
    call: Call, inputs: Mapping[str, Any], shape: tuple[int, int] | None, rules: Sequence[Positions]
) -> int | Tensor:
    """Return how many columns lie before a pass; a recurrent state does not say, but a text or a mask may.

    Raises:
        ValueError: a rule that counts tokens, after a state of which that is not known.
    """
    past, mask = length_of(cache_in(inputs)), inputs.get("attention_mask")
    if past is not None or shape is None:
        return 0 if past is None else past
    if call.generation is not None and call.continues is call.generation.main and call.generation.written is not None:
        return call.generation.written.shape[1] - shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > shape[1]:
        return mask.shape[1] - shape[1]
    rule = next((rule for rule in rules if rule.needs_prompt or rule.rule is not None), None)
    if rule is not None:
        raise ValueError(
            f"positions {str(rule)!r} count tokens, and the state that this pass goes on with does not say how many "
            "came before: pass an attention_mask over all tokens, the whole text without a state, or use generate"
        )
    return 0


def _mask_and_ids(
    kind: BaseKind,
    stack: StackInfo,
    call: Call,
    inputs: Mapping[str, Any],
    shape: tuple[int, int] | None,
    past: int | Tensor,
) -> tuple[Any, Tensor | None]:
    """Return mask and tokens of a pass: those of the stack, or of the call where its stack gets what it made of them.

    A model for images and text embeds its tokens itself, and makes masks of a form of its own.
    """
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if shape is None or call.inputs is None or not kind.feeds_input(stack):
        return mask, ids
    tokens, shown = call.inputs.get("input_ids"), call.inputs.get("attention_mask")
    if ids is None and tokens is not None and tuple(tokens.shape) == shape:
        ids = tokens
    if shown is None and mask is not None and not _is_flat(mask):
        return None, ids
    if isinstance(shown, Tensor) and shown.ndim == 2 and not _is_flat(mask):
        columns = shape[1] + past if isinstance(past, int) else shown.shape[1]
        return (shown if tuple(shown.shape) == (shape[0], columns) else mask), ids
    return mask, ids


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _refuse_unclear(rules: Sequence[Positions]) -> None:
    """Raise `ValueError` for a rule that means other tokens where a pass begins a prompt of its own."""
    rule = next((rule for rule in rules if rule.needs_prompt or rule.rule is not None), None)
    if rule is not None:
        raise ValueError(
            f"positions {str(rule)!r} depend on where the prompt ends, and this call within generate could go on with "
            "its prompt or begin one of its own: call the PeftModel, for which it is a prompt of its own, or pass "
            "prompt_mask"
        )


def _given_mask(kind: BaseKind, stack: StackInfo, call: Call) -> Bool[Tensor, "rows columns"] | None:
    """Return the prompt mask that a stack was given, if it is fed what the mask is about."""
    if not kind.feeds_input(stack):
        return None
    mask = call.prompt_mask
    if mask is None and call.continues is not None and not stack.causal:
        mask = call.continues.encoder_prompt
    return mask


def _before_labels(
    kind: BaseKind, stack: StackInfo, call: Call, shape: tuple[int, int] | None, past: int | Tensor
) -> Bool[Tensor, "rows columns"] | None:
    """Return the columns before the first label of each row; `None` where labels say nothing of a prompt."""
    labels = call.labels
    if not stack.causal or not kind.generative or labels is None or shape is None or labels.shape != shape:
        return None
    answered = (labels != IGNORE).long()
    # the decoder of an encoder-decoder model is fed the labels one column late
    before = answered.cumsum(1) - answered if kind.seq2seq else answered.cumsum(1)
    cached = before.new_zeros((shape[0], int(past)))  # labels cover this chunk; what lies before is prompt
    return torch.cat([cached, before], dim=1) == 0


def _check_prompts(prompt: Bool[Tensor, "rows columns"], mask: Tensor | None, rules: Sequence[Positions]) -> None:
    """Raise `ValueError` for a row whose labels begin at its first token, where a rule would select nothing.

    In training, since nothing would be learnt; evaluation may judge rows without a prompt, and does not wait for a
    device to look at them. A compiled call does not look at values either.
    """
    rule = next((rule for rule in rules if rule.needs_prompt and str(rule) != "generated"), None)
    if rule is None or torch.compiler.is_compiling():
        return
    real = torch.ones_like(prompt) if mask is None else mask.to(prompt.device).bool()
    width = min(prompt.shape[1], real.shape[1])
    without = real.any(1) & ~(prompt[:, :width] & real[:, :width]).any(1)
    if not bool(without.any()):
        return
    raise ValueError(
        f"positions {str(rule)!r} depend on where the prompt ends, and the labels of row {int(without.int().argmax())} "
        f"begin at its first token, as those of {int(without.sum())} of {len(without)} rows do: no token would be "
        "selected there. Pass labels with -100 on the prompt, as encode_pairs and encode_chat make them (in TRL: "
        "columns prompt and completion, or messages with assistant_only_loss=True); or prompt_mask; or use "
        "positions='all'"
    )


def _packed(inputs: Mapping[str, Any]) -> bool:
    """Return whether a row holds several sequences, as its positions show where there is no mask."""
    positions = inputs.get("position_ids")
    if inputs.get("cu_seq_lens_q") is not None:
        return True
    if inputs.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())

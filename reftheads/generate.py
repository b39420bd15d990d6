"""Recording where the prompt ends when `generate` starts, so that every later pass knows."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.runtime import Interventions

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped


def record_prompts(base: nn.Module) -> None:
    """Lets `base.generate` record its prompts, whoever calls it: PEFT's wrappers, a pipeline, a trainer."""
    if hasattr(type(base), "generate"):
        base.generate = MethodType(_generate, base)  # type: ignore[assignment]


def _generate(base: Any, *args: Any, **kwargs: Any) -> Any:
    layer: Interventions = base.interventions
    prompt_mask = kwargs.pop("prompt_mask", None)
    if base.config.is_encoder_decoder:
        start = kwargs.get("decoder_input_ids")
        real = torch.ones((1, 1) if start is None else tuple(start.shape), dtype=torch.bool, device=base.device)
        with layer.generating(real, real, encoder_prompt=None if prompt_mask is None else prompt_mask.bool()):
            return type(base).generate(base, *args, **kwargs)
    candidates = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((given for given in candidates if given is not None), None)
    if inputs is None:  # generation starts from one token that begins a text
        real = torch.ones((1, 1), dtype=torch.bool, device=base.device)
    else:
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = real_tokens(base, inputs, kwargs)
        real = kwargs["attention_mask"].bool()
    if prompt_mask is not None and prompt_mask.shape != real.shape:
        raise ValueError(
            f"prompt_mask has shape {tuple(prompt_mask.shape)}, but the input {tuple(real.shape)} (rows, columns): "
            "give one entry a column"
        )
    prompt = real if prompt_mask is None else real & prompt_mask.bool()
    with layer.generating(real, prompt):
        return type(base).generate(base, *args, **kwargs)


def real_tokens(
    base: Any, inputs: Shaped[Tensor, "rows columns *width"], kwargs: dict[str, Any]
) -> Int[Tensor, "rows columns"]:
    """The mask that `generate` makes up where none is given: padding, if it can be told from an end."""
    pad, eos = (option(base, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if inputs.ndim == 2 and pad is not None and pad not in (eos if isinstance(eos, list | tuple) else [eos]):
        return (inputs != pad).long()
    return inputs.new_ones(inputs.shape[:2], dtype=torch.long)


def option(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An option of `generate`: of the call, its configuration, or else the model's."""
    given = (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None))
    return next((value for value in given if value is not None), getattr(base.generation_config, name))

"""Recording where the prompt ends when `generate` starts, so that every later pass knows."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from reftheads.runtime import Interventions


def record_prompts(base: nn.Module) -> None:
    """Lets `base.generate` record its prompts, whoever calls it: PEFT's wrappers, a pipeline, a trainer."""
    if hasattr(type(base), "generate"):
        base.generate = MethodType(_generate, base)  # type: ignore[assignment]


def _generate(base: Any, *args: Any, **kwargs: Any) -> Any:
    layer: Interventions = base.interventions
    prompt_mask = kwargs.pop("prompt_mask", None)
    candidates = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((given for given in candidates if given is not None), None)
    if inputs is None:
        return type(base).generate(base, *args, **kwargs)
    if base.config.is_encoder_decoder:
        start = kwargs.get("decoder_input_ids")
        real = inputs.new_ones((inputs.shape[0], 1 if start is None else start.shape[1]), dtype=torch.bool)
    else:
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _real_tokens(base, inputs, kwargs)
        real = kwargs["attention_mask"].bool()
    prompt = real if prompt_mask is None else real & prompt_mask.bool()
    with layer.generating(real, prompt):
        return type(base).generate(base, *args, **kwargs)


def _real_tokens(base: Any, inputs: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mask that `generate` makes up where none is given: padding, if it can be told from an end."""
    config = kwargs.get("generation_config") or base.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    if inputs.ndim == 2 and pad is not None and pad not in (eos if isinstance(eos, list | tuple) else [eos]):
        return (inputs != pad).long()
    return inputs.new_ones(inputs.shape[:2], dtype=torch.long)

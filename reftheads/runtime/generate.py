"""What `generate` of a base model with a graph does besides.

It records where the prompt ends when it starts, so that every later pass knows; and where heads are asked for, it reads
the finished sequences once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from reftheads.architectures.paths import arguments
from reftheads.runtime.hooks import Around, ending
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.lineage import PREPARED, Generation
from reftheads.runtime.output import extend, replaced
from reftheads.runtime.passes import HookKey, Prompt
from reftheads.runtime.plan import PlannedNode
from reftheads.runtime.roster import by_name, nodes_of
from reftheads.runtime.scope import generation_around, scope_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Shaped

# arguments of a model's forward that say nothing of the tokens but what they are
_TOKENS = frozenset("input_ids attention_mask past_key_values use_cache output_hidden_states output_attentions".split())


def record_prompts(base: nn.Module, layer: Interventions) -> None:
    """Let `base.generate` record its prompts, whoever calls it: PEFT's wrappers, a pipeline, a trainer."""
    if hasattr(type(base), "generate"):
        layer.holds[None].append(Around(base, "generate", partial(_around_generate, base, layer)))
        layer.holds[None].append(Around(base, "prepare_inputs_for_generation", partial(_around_prepare, layer)))
    if hasattr(type(base), "init_continuous_batching"):
        layer.holds[None].append(Around(base, "init_continuous_batching", partial(_around_batching, layer)))
        layer.holds[None].append(Around(base, "generate_batch", _around_batch))


def _around_generate(
    base: nn.Module, layer: Interventions, generate: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    with layer.holding():
        return _generate(base, layer, generate, args, kwargs)


def _around_prepare(layer: Interventions, prepare: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Mark the inputs that `generate` prepares for its next pass: others are made within it by the same model."""
    inputs = prepare(*args, **kwargs)
    generation = scope_of(layer).generation
    text = args[0] if args else kwargs.get("input_ids")
    if generation is None or not isinstance(text, Tensor):
        return inputs
    if layer.kind.seq2seq and not generation.begun:  # which may have put a token before the decoder's input
        given = kwargs.get("decoder_attention_mask")
        real = torch.ones_like(text[:1], dtype=torch.bool) if given is None else given.bool()
        assisted = generation.assists
        generation.main.begin(real, real if assisted is None else assisted.prompt_in(text, real, goes_on=True))
    generation.note(text)
    return {**inputs, PREPARED: True}


def _around_batching(layer: Interventions, begin: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Refuse what continuous batching cannot do: it packs prompts into one row, and runs in a thread of its own."""
    call = layer.new_call()
    if (call.disabled, call.adapters) != (layer.disable_adapters, tuple(layer.active_adapters)) or call.adapter_names:
        raise ValueError(
            "continuous batching runs in a thread of its own, where disable_adapter() and adapter_names of this one do "
            "not hold: switch adapters by set_adapter, or use generate"
        )
    stacks = {stack.path for plan in layer.plans.values() for stack in plan.stacks}
    acting = [] if call.disabled else [p.node for path in stacks for _, p, _ in nodes_of(layer, path, call)]
    node = next((node for node in acting if node.positions.needs_prompt or node.positions.rule is not None), None)
    if node is not None:
        raise ValueError(
            f"continuous batching packs prompts and tokens of several sequences into one row, in which positions "
            f"{str(node.positions)!r} of node {node.name!r} have no meaning: use generate, or positions 'all'"
        )
    return begin(*args, **kwargs)


def _around_batch(generate_batch: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    unknown = sorted({"adapter_names", "prompt_mask", "return_heads"} & kwargs.keys())
    if unknown:
        raise ValueError(f"generate_batch knows no {unknown[0]}: use generate")
    return generate_batch(*args, **kwargs)


def _generate(
    base: Any, layer: Interventions, generate: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    first = args[0] if args else None
    kwargs = _by_name(generate, args) | kwargs
    prompt_mask, return_heads = kwargs.pop("prompt_mask", None), kwargs.pop("return_heads", False)
    if kwargs.get("cache_implementation") == "paged" and (prompt_mask is not None or return_heads):
        raise ValueError(
            'cache_implementation="paged" packs rows, and knows no prompt_mask and return_heads: leave it out'
        )
    readers = _readers(base, layer, kwargs) if return_heads else []
    if readers:
        _ask_for_a_dictionary(kwargs)
    candidates = (first, kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((given for given in candidates if given is not None), None)
    assisted = generation_around() if option(base, kwargs, "is_assistant") else None
    if layer.kind.seq2seq:
        start = torch.ones((1, 1), dtype=torch.bool, device=base.device)
        main = Prompt(start, start, None if prompt_mask is None else prompt_mask.bool())
        with layer.holding(Generation(main, encoder_ids=inputs, assists=assisted)):
            return generate(**kwargs)
    real, prompt = _columns(base, inputs, prompt_mask, kwargs)
    ids = inputs if inputs is not None and inputs.shape == real.shape else None
    if readers and inputs is not None and ids is None:
        raise ValueError(
            f"return_heads=True reads whole sequences, and generate was given the tokens of {inputs.shape[1]} of "
            f"{real.shape[1]} columns: give all of them, beside past_key_values too"
        )
    around = assisted or scope_of(layer).generation
    told: Tensor | None = prompt
    if prompt_mask is None and around is not None and ids is not None:  # it may go on with the text of that one
        if assisted is None:
            told = around.prompt_of({"input_ids": ids, "attention_mask": real}).prompt
        else:
            told = around.prompt_in(ids, real, goes_on=True)
    with layer.holding(Generation(Prompt(real, told), ids)):
        out = generate(**kwargs)
    return _with_readings(base, layer, readers, out, (real, prompt), kwargs) if readers else out


def _by_name(generate: Callable[..., Any], args: tuple) -> dict[str, Any]:
    """Return the arguments that were given by position."""
    return dict(zip(inspect.signature(generate).parameters, args, strict=False))


def _columns(
    base: Any, inputs: Tensor | None, prompt_mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """Return which columns of the input are tokens, and which of them the prompt."""
    if inputs is None:  # generation starts from one token that begins a text
        real = torch.ones((1, 1), dtype=torch.bool, device=base.device)
    else:
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = real_tokens(base, inputs, kwargs)
        real = kwargs["attention_mask"].bool()
    if prompt_mask is None:
        return real, real
    if prompt_mask.shape != real.shape:
        raise ValueError(
            f"prompt_mask has shape {tuple(prompt_mask.shape)}, but the input {tuple(real.shape)} (rows, columns): "
            "give one entry a column"
        )
    return real, real & prompt_mask.bool()


def real_tokens(
    base: Any, inputs: Shaped[Tensor, "rows columns *width"], kwargs: dict[str, Any]
) -> Int[Tensor, "rows columns"]:
    """Return the mask that `generate` makes up without one: padding, if it can be told from an end."""
    pad, eos = (option(base, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if inputs.ndim == 2 and pad is not None and pad not in (eos if isinstance(eos, list | tuple) else [eos]):
        return (inputs != pad).long()
    return inputs.new_ones(inputs.shape[:2], dtype=torch.long)


def option(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return an option of `generate`: of the call, its configuration, or else the model's."""
    given = (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None))
    return next((value for value in given if value is not None), getattr(base.generation_config, name))


# --- heads ------------------------------------------------------------------------------------------------


def _readers(base: Any, layer: Interventions, kwargs: dict[str, Any]) -> list[PlannedNode]:
    """Return the nodes that read finished sequences.

    Raises:
        ValueError: no node reads, a model with an encoder, or an input of more than tokens.
    """
    stacks = {stack.path for plan in layer.plans.values() for stack in plan.stacks if stack.causal}
    if base.config.is_encoder_decoder or len(stacks) != 1:
        raise ValueError(
            "return_heads=True is for models of one decoder: call the model on what was generated, as "
            "model(input_ids=…, decoder_input_ids=sequences)"
        )
    call = layer.new_call()
    [path] = stacks
    acting = () if call.disabled else nodes_of(layer, path, call)
    readers = [planned for _, planned, _ in acting if not planned.edits]
    if not readers:
        raise ValueError(
            "return_heads=True, but no node that reads acts: add one such as rh.Node(rh.LinearHead(1), layer=-1) or "
            "rh.Node(rh.Collect(), layer=-1) to the graph, or switch its adapter on"
        )
    beside = kwargs.keys() & set(arguments(base)) - _TOKENS
    given = sorted(name for name in beside if kwargs[name] is not None)
    if given:
        raise ValueError(
            f"return_heads=True reads sequences of tokens alone, and generate was given {', '.join(given)} too: leave "
            "that out, or call the model on what was generated"
        )
    return readers


def _ask_for_a_dictionary(kwargs: dict[str, Any]) -> None:
    config = kwargs.get("generation_config")
    if config is None:
        kwargs["return_dict_in_generate"] = True
    else:  # beside one, transformers wants no other options
        kwargs["generation_config"] = copy(config)
        kwargs["generation_config"].return_dict_in_generate = True


def _with_readings(
    base: Any,
    layer: Interventions,
    readers: list[PlannedNode],
    out: Any,
    masks: tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"]],
    kwargs: dict[str, Any],
) -> Any:
    """Return the output of `generate` with what nodes read of its sequences.

    Args:
        masks: of the input, which columns are tokens, and which the prompt.
    """
    times = len(out.sequences) // len(masks[0])  # beams and return sequences repeat each row
    real, prompt = (mask.repeat_interleave(times, 0) for mask in masks)
    ended = _ended(base, kwargs, out.sequences[:, real.shape[1] :])
    seen = _read(base, layer, readers, out.sequences, torch.cat([real, ~ended], 1), prompt)
    return replaced(out, **{name: seen.get(name) for name in ("predictions", "collected", "selected")})


def _ended(base: Any, kwargs: dict[str, Any], new: Int[Tensor, "rows new"]) -> Bool[Tensor, "rows new"]:
    """Return what follows the end of a row among the new tokens; the end itself belongs to the text."""
    pad, eos = (option(base, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if eos is None:  # then all rows go on to the same length
        return torch.zeros_like(new, dtype=torch.bool)
    ends = torch.isin(new, torch.as_tensor(eos, device=new.device)).long()
    ended = ends.cumsum(1) > ends
    if pad is None or bool(torch.isin(torch.as_tensor(pad), torch.as_tensor(eos))):
        return ended
    # rows that something else ended, such as stop_strings, are filled up without an end
    return ended | (new == pad).flip(1).cumprod(1).flip(1).bool()


def _read(
    base: nn.Module,
    layer: Interventions,
    readers: list[PlannedNode],
    ids: Int[Tensor, "rows columns"],
    real: Bool[Tensor, "rows columns"],
    prompt: Bool[Tensor, "rows prompt_columns"],
) -> ModelOutput:
    """Return what is read of whole sequences; blocks above the last reader, and logits, are not computed."""
    path = readers[0].address.stack
    stack = base.get_submodule(path)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    if "position_ids" in arguments(stack):
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)  # padding on the left does not count

    call = layer.new_call(prompt_mask=prompt)
    places: list[HookKey] = [(p.address.module, p.address.side) for p in readers]
    with torch.no_grad(), call, ending(base, places, lambda: len(call.runs[path].readings) == len(readers)):
        stack(**inputs)
    return extend(BaseModelOutput(), by_name(layer, call, call.readings), {})

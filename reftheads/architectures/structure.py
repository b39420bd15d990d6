"""The stacks of a model: where its blocks are, what runs them, and in which direction they look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from reftheads.architectures.blocks import attention_owner
from reftheads.architectures.paths import (
    ancestors_of,
    arguments,
    first_child,
    join,
    own_modules,
    parent,
    token_embeddings,
    within,
)
from reftheads.architectures.probe import ListSeen, Observation, memory_of, observe
from reftheads.architectures.stream import Step, steps_of_blocks
from reftheads.graph.site import Stack

_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_norm", "final_layernorm", "layer_norm", "layernorm", "norm_f")
_FED = {"input_ids", "pixel_values", "input_features", "input_values"}  # what a stack takes


@dataclass(frozen=True)
class StackInfo:
    """Describe one half of an encoder-decoder model, or the whole of any other.

    Args:
        path: the module that receives `input_ids`, `attention_mask` … and runs the blocks.
        blocks: paths of the blocks in the order in which they run; empty if none are recognised, where only dotted
            paths of modules are addresses.
        role: `"decoder"` if tokens see only earlier ones, else `"encoder"`.
        final_norm: path of the norm after the last block, if there is one.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import stacks
        >>> (info,) = stacks(rh.load_base("tiny-chat")[0])
        >>> info.path, len(info.blocks), info.causal, info.final_norm
        ('model', 6, True, 'model.norm')
        ```
    """

    path: str
    blocks: tuple[str, ...]
    role: Stack
    final_norm: str | None

    @property
    def causal(self) -> bool:
        """Return whether a token's hidden states depend on no later token."""
        return self.role == "decoder"


@dataclass(frozen=True)
class Structure:
    """Hold what is known of the structure of a model, for all sites that are located in it.

    Attributes:
        model: the model.
        stacks: its stacks.
        observation: what a small pass through it showed.
        memory: what is known of all models of its kind, for `once`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import Structure
        >>> Structure.of(rh.load_base("tiny-chat")[0]).stacks[0].path
        'model'
        ```
    """

    model: nn.Module
    stacks: tuple[StackInfo, ...]
    observation: Observation
    memory: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Look at a model, which takes one small pass through the first of its kind."""
        memory = memory_of(model)
        observation = _once(memory, "observation", lambda: observe(model))
        return cls(model, _stacks(model, observation), observation, memory)

    def once(self, what: Any, look: Callable[[], Any]) -> Any:
        """Return what `look` finds out about a model, which it does for the first of its kind."""
        return _once(self.memory, what, look)

    @property
    def why_no_blocks(self) -> str:
        """Return why a model has no blocks."""
        lists = self.observation.lists
        outermost = [path for path in lists if lists.keys().isdisjoint(ancestors_of(path))]
        for path, seen in ((path, lists[path]) for path in outermost):
            if len(set(seen.order)) < len(seen.order):
                return f"it runs the same blocks several times ({path!r}), so that a layer has no module of its own"
            if len(seen.order) > 1 and not seen.chained:
                return f"what leaves a member of {path!r} is not what enters the next"
        return "no list of modules runs one after the other on hidden states"

    def seen(self, info: StackInfo) -> ListSeen | None:
        """Return what was seen of the blocks of a stack; `None` if they did not run."""
        return self.observation.lists.get(parent(info.blocks[0])) if info.blocks else None

    def steps(self, info: StackInfo) -> dict[str, tuple[Step, ...] | None]:
        """Return by block what is added to the residual stream, see `steps_of_blocks`; empty if no block was seen."""
        seen = self.seen(info)
        if seen is None:
            return {}
        return self.once(("steps", *info.blocks), lambda: steps_of_blocks(self.model, seen.part, info.blocks))


def stacks(model: nn.Module) -> tuple[StackInfo, ...]:
    """Return the stacks of blocks in a model, in the order of its modules.

    Where no blocks are recognised, the model itself is a stack of none. The blocks of a stack are the outermost
    `ModuleList` whose members run one after the other, each on what the one before has returned, and attend, or keep
    the form of what they are given. What runs how is seen in one small pass through the model; a part that does not
    run there goes by its names.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import stacks
        >>> [info.blocks[0] for info in stacks(rh.load_base("tiny-chat")[0])]
        ['model.layers.0']
        ```
    """
    return Structure.of(model).stacks


def _once(memory: dict[Any, Any], what: Any, look: Callable[[], Any]) -> Any:
    if what not in memory:
        memory[what] = look()
    return memory[what]


def _stacks(model: nn.Module, observation: Observation) -> tuple[StackInfo, ...]:
    infos: list[StackInfo] = []
    blocks: list[str] = []
    for path, module in own_modules(model):
        if not isinstance(module, nn.ModuleList) or any(within(path, block) for block in blocks):
            continue
        if not _are_blocks(model, observation, path, module):
            continue
        infos.append(_stack_info(model, observation, path, module))
        blocks += infos[-1].blocks
    if infos:
        return tuple(infos)
    causal = observation.causal if observation.causal is not None else _keeps_a_cache(model)
    return (StackInfo("", (), "decoder" if causal else "encoder", None),)


def that_embed(model: nn.Module, infos: Iterable[StackInfo]) -> list[StackInfo]:
    """Return of some stacks the innermost that hold the model's embeddings of tokens: those of its text."""
    embeddings = token_embeddings(model)
    paths = [path for path, module in own_modules(model) if module is embeddings]
    embed = [info for info in infos if any(within(path, info.path) for path in paths)]
    return [info for info in embed if all(len(info.path) >= len(other.path) for other in embed)]


def _are_blocks(model: nn.Module, observation: Observation, path: str, members: nn.ModuleList) -> bool:
    """Return whether the members of a list are the blocks of a stack."""
    if any(isinstance(above, nn.ModuleList) and len(above) > 1 for above in _above(model, path)):
        return False  # a stage of several
    attends = any(attention_owner(member) is not None for member in members)
    seen = observation.lists.get(path)
    if seen is None:
        return attends and not any(above in observation.modules for above in ancestors_of(path) if above)
    if seen.order != sorted(set(seen.order)) or not seen.chained:
        return False
    return attends or (len(members) > 1 and _keep_form(observation, path, seen))


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules that a module lies in."""
    return (model.get_submodule(above) for above in ancestors_of(path))


def _keep_form(observation: Observation, path: str, seen: ListSeen) -> bool:
    """Return whether the members of a list return hidden states of the form that they are given."""
    members = [observation.modules[join(path, str(i))] for i in seen.order]
    forms = {shape for member in members for shape in (member.entered, member.left)}
    form = forms.pop()
    return not forms and form is not None and len(form) == 3 and seen.columns is not None


def _stack_info(model: nn.Module, observation: Observation, path: str, blocks: nn.ModuleList) -> StackInfo:
    """Describe the stack of the blocks in the list at `path`."""
    ancestors = list(ancestors_of(path))
    seen = observation.lists.get(path)
    running = [a for a in ancestors if seen is None or a in observation.modules] or ancestors
    # The blocks' direct parent often is an inner module that knows neither ids nor cache (BertEncoder).
    fed = _FED if seen is None or seen.of_text else _FED - {"input_ids"}
    receivers = (a for a in running if fed & set(arguments(model.get_submodule(a))))
    stack = next(receivers, running[0])
    causal = None if seen is None else seen.causal
    if causal is None:
        causal = _declared_causal(blocks, model.get_submodule(stack))
    paths = tuple(join(path, str(i)) for i in range(len(blocks)))
    norm = _norm_by_name(model, ancestors[: ancestors.index(stack) + 1]) if seen is None else seen.norm
    return StackInfo(stack, paths, "decoder" if causal else "encoder", norm)


def _declared_causal(blocks: nn.ModuleList, stack: nn.Module) -> bool:
    """Return what the modules of a stack say about the direction in which they look."""
    _, attention = next(filter(None, map(attention_owner, blocks)), ("", None))
    causal = getattr(attention, "is_causal", getattr(attention, "is_decoder", None))
    return _keeps_a_cache(stack) if causal is None else bool(causal)  # Bloom does not say, but keeps a cache


def _keeps_a_cache(module: nn.Module) -> bool:
    return "past_key_values" in arguments(module)


def _norm_by_name(model: nn.Module, holders: Sequence[str]) -> str | None:
    """Return the path of the norm after the last block, in the first of these modules that has one."""
    for holder in holders:
        name = first_child(model.get_submodule(holder), _FINAL_NORM)
        if name is not None:
            return join(holder, name)
    return None

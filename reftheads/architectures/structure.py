"""The stacks of a model: where its blocks are, what runs them, and in which direction they look."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from reftheads.architectures.blocks import attention_owner
from reftheads.architectures.paths import ancestors_of, first_child, join, within
from reftheads.graph.site import Stack

_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_norm", "final_layernorm", "layer_norm", "layernorm", "norm_f")


@dataclass(frozen=True)
class StackInfo:
    """Describe one half of an encoder-decoder model, or the whole of any other.

    Args:
        path: the module that receives `input_ids`, `attention_mask` … and runs the blocks.
        blocks: paths of the blocks in the order in which they run.
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


def stacks(model: nn.Module) -> tuple[StackInfo, ...]:
    """Return the stacks of blocks in a model, in the order of its modules; empty if none is recognised.

    The blocks of a stack are the outermost `ModuleList` whose members attend.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import stacks
        >>> [info.blocks[0] for info in stacks(rh.load_base("tiny-chat")[0])]
        ['model.layers.0']
        ```
    """
    infos: list[StackInfo] = []
    blocks: list[str] = []
    for path, module in own_modules(model):
        if not isinstance(module, nn.ModuleList) or any(within(path, block) for block in blocks):
            continue
        attention = next(filter(None, map(attention_owner, module)), None)
        if attention is None:
            continue
        info = _stack_info(model, path, module, attention[1])
        infos.append(info)
        blocks += info.blocks
    return tuple(infos)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, without the parameters of a graph that was compiled into it."""
    for path, module in model.named_modules():
        if path.split(".")[0] != "interventions":
            yield path, module


def arguments(module: nn.Module) -> list[str]:
    """Return the names of what a module's forward takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def _stack_info(model: nn.Module, path: str, blocks: nn.ModuleList, attention: nn.Module) -> StackInfo:
    """Describe the stack of the blocks in the list at `path`, of which one has this attention."""
    ancestors = list(ancestors_of(path))
    # The blocks' direct parent often is an inner module that knows neither ids nor cache (BertEncoder).
    receivers = (a for a in ancestors if _takes(model.get_submodule(a), "input_ids", "pixel_values"))
    stack = next(receivers, ancestors[0])
    causal = getattr(attention, "is_causal", getattr(attention, "is_decoder", None))
    if causal is None:  # Bloom and DeBERTa do not say; of the two only a decoder keeps a cache
        causal = _takes(model.get_submodule(stack), "past_key_values")
    return StackInfo(
        path=stack,
        blocks=tuple(join(path, str(i)) for i in range(len(blocks))),
        role="decoder" if causal else "encoder",
        final_norm=_final_norm(model, ancestors[: ancestors.index(stack) + 1]),
    )


def _final_norm(model: nn.Module, holders: Sequence[str]) -> str | None:
    """Return the path of the norm after the last block, in the first of these modules that has one."""
    for holder in holders:
        name = first_child(model.get_submodule(holder), _FINAL_NORM)
        if name is not None:
            return join(holder, name)
    return None


def _takes(module: nn.Module, *names: str) -> bool:
    """Return whether a module's forward takes one of these arguments."""
    return any(name in arguments(module) for name in names)

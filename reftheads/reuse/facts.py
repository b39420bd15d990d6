"""What is known of a model before anything of it is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reftheads._utils.lazy import cached
from reftheads.architectures.paths import arguments
from reftheads.architectures.structure import StackInfo, stacks, that_embed
from reftheads.graph.intervention import Head
from reftheads.reuse.fingerprint import Fingerprint
from reftheads.runtime.interventions import Interventions


@dataclass(frozen=True, eq=False)
class Facts:
    """What all parts of reuse know of a model; made once and given to each.

    Attributes:
        base: the base model, in which graphs are compiled.
        layer: its interventions.
        info: the stack of blocks that is fed the input.
        stack: that stack.
        blocks: its blocks.
        arguments: what the stack takes.
        fingerprint: of the base model's weights and settings.
        modules: of the base model, all of them.
    """

    base: nn.Module
    layer: Interventions
    info: StackInfo
    stack: nn.Module
    blocks: tuple[nn.Module, ...]
    arguments: frozenset[str]
    fingerprint: Fingerprint
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, base: nn.Module, layer: Interventions, fingerprint: Fingerprint | None = None) -> Facts:
        """Look at a model.

        Args:
            fingerprint: of the same model, if there is one already.

        Raises:
            ValueError: there is not just one stack of blocks that is fed the input.
        """
        compiled = next((plan.stacks for plan in layer.plans.values()), None)
        known = stacks(base) if compiled is None else compiled
        fed = [stack for stack in known if stack.role == "encoder" or not layer.kind.seq2seq]
        if len(fed) > 1:  # beside the text, pictures or sound
            takes_tokens = [stack for stack in fed if "input_ids" in arguments(base.get_submodule(stack.path))]
            fed = that_embed(base, takes_tokens)
        if len(fed) != 1:
            raise ValueError(
                f"activations can be reused in models with one stack of blocks that is fed, not {len(fed)}"
            )
        stack = base.get_submodule(fed[0].path)
        blocks = tuple(base.get_submodule(path) for path in fed[0].blocks)
        return cls(
            base,
            layer,
            fed[0],
            stack,
            blocks,
            frozenset(arguments(stack)),
            fingerprint or Fingerprint(base),
            tuple(base.modules()),
        )

    def hold(self, base: nn.Module, layer: Interventions) -> bool:
        """Return whether they are of this model, as it is now."""
        return base is self.base and layer is self.layer and tuple(base.modules()) == self.modules

    @cached
    def causal(self) -> bool:
        """Return whether a token of the stack depends on no later one."""
        return self.info.causal

    @property
    def seq2seq(self) -> bool:
        """Return whether an encoder is fed the input, and a decoder the answer."""
        return self.layer.kind.seq2seq

    @property
    def device(self) -> torch.device:
        """Return where the stack runs."""
        return next((p.device for p in self.stack.parameters()), torch.device("cpu"))

    @property
    def autocast(self) -> torch.dtype | None:
        """Return the type that autocast computes in here and now; `None` where it is not on."""
        kind = self.device.type
        active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if active else None

    @property
    def computing(self) -> tuple[Any, ...]:
        """Return how the stack computes here and now: the types, the device and the way of attention."""
        weight = next(self.stack.parameters(), None)
        attention = getattr(getattr(self.base, "config", None), "_attn_implementation", None)
        return attention, self.autocast, None if weight is None else weight.dtype, self.device

    @property
    def targets(self) -> set[str]:
        """Return the columns of a batch that heads are trained on."""
        return {name for plan in self.layer.plans.values() for name in plan.targets}

    @property
    def heads(self) -> list[Head]:
        """Return the heads of all adapters."""
        kinds = (planned.node.intervention for plan in self.layer.plans.values() for planned in plan.nodes)
        return [kind for kind in kinds if isinstance(kind, Head)]

    @cached
    def dtype(self) -> torch.dtype:
        """Return the type of the first of the base model's floating-point weights."""
        return next((p.dtype for p in self.base.parameters() if p.is_floating_point()), torch.float32)

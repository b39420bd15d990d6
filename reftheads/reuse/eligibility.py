"""What of a base model can be reused, in the state that it is in, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss

from reftheads.architectures.addresses import StackInfo, arguments, own_modules, stacks
from reftheads.reuse.cone import Cone
from reftheads.reuse.recorder import Recorder
from reftheads.runtime.interventions import Interventions

NO_EDIT = "no edit: all that is kept is what the readers see"

HANDED_ON = {"position_bias", "shared_kv_states"}  # what blocks take that earlier ones have computed


class Limits:
    """Says of a model with graphs what its `Replay` may leave out. Reasons are texts; `None` is no reason against.

    Args:
        base: the base model, in which graphs are compiled.
        layer: its interventions.
        info: the stack that is fed the input.
        recorder: of that stack.
    """

    def __init__(self, base: nn.Module, layer: Interventions, info: StackInfo, recorder: Recorder):
        self.base = base
        self.layer = layer
        self.info = info
        self.recorder = recorder
        self.seq2seq = layer.seq2seq
        self._blocks = [base.get_submodule(path) for path in info.blocks]
        own = list(own_modules(base))
        self._own = {f"{path}.{name}": p for path, m in own for name, p in m._parameters.items() if p is not None}
        self._random = [place for _, module in own for place in _random_settings(module)]
        self._batch_norms = [m for _, m in own if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._hands_on = bool(HANDED_ON & set(arguments(self._blocks[0])))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the base model's floating-point weights."""
        return {p.dtype for p in self._own.values() if p.is_floating_point()}

    def why_plain(self) -> str | None:
        """Why nothing can be reused, in the state that the model is in; `None` if something can."""
        if self.layer.disable_adapters:
            return "adapters are disabled"
        if any("labels" in plan.targets for plan in self.layer.plans.values()):
            return "a head has the target 'labels', as the model itself has: copy it to a column of another name"
        one = next(iter(self._own.values()), None)
        if one is not None and (one.is_meta or hasattr(one, "ds_id") or isinstance(one, DTensor)):
            return "the weights of the base model are spread over processes or kept elsewhere"
        trained = next((name for name, p in self._own.items() if p.requires_grad), None)
        if trained is not None:
            return f"weights of the base model are trained ({trained})"
        active = next((f"{type(m).__name__}.{name}" for m, name in self._random if m.training and getattr(m, name)), "")
        if active:
            return f"the base model has dropout in training mode ({active}); load_base(…, dropout=False) has none"
        if any(module.training for module in self._batch_norms):
            return "batch norms in training mode mix the rows of a batch"
        embeddings: Any = getattr(self.base, "get_input_embeddings", lambda: None)()  # type: ignore[operator]
        if getattr(embeddings, "neftune_noise_alpha", None) and embeddings.training:
            return "embeddings get noise in training mode (neftune_noise_alpha)"
        if getattr(getattr(self.base, "config", None), "output_router_logits", False):
            return "the loss of a router looks at every token in every block"
        return None

    def why_no_prefix(self, cone: Cone) -> str | None:
        """Why all tokens of a row are computed in every step; `None` if a prefix can be left out."""
        if not self.info.causal or self.seq2seq:
            return "every token sees all the others"
        if cone.first is None:
            return NO_EDIT
        first = next((str(p.node.positions) for p in cone.inside if p.node.positions.begins_with_first), None)
        if first is not None:
            return f"positions {first!r} begin with the first token"
        if any(getattr(block, "gradient_checkpointing", False) and block.training for block in self._blocks):
            return "activation checkpointing goes without a cache"
        if self.recorder.stack is not self.base and self.lm_head is None:
            return "the model's own loss looks at every token"
        if _recurrent(getattr(self.recorder.stack, "config", None)):
            return "blocks carry a recurrent state"
        if not self.recorder.keeps_pieces:
            return "blocks do not keep keys and values of one shape"
        return None

    def why_no_layers(self, cone: Cone) -> str | None:
        """Why the blocks below the first edit run in every step; `None` if they need not."""
        if self._hands_on and (cone.cut or cone.constant):
            return "blocks hand on more than the hidden state"
        return None

    @property
    def lm_head(self) -> nn.Module | None:
        """The vocabulary projection of a causal language model whose loss is the usual one."""
        if self.seq2seq or not self.layer.generative:
            return None
        usual = getattr(self.base, "loss_function", None) is ForCausalLMLoss
        return self.base.get_output_embeddings() if usual else None  # type: ignore[operator]


def fed_stack(base: nn.Module, seq2seq: bool) -> StackInfo:
    """The one stack of blocks that is fed the input. Raises `ValueError` where there is not just one."""
    fed = [stack for stack in stacks(base) if stack.role == "encoder" or not seq2seq]
    if len(fed) != 1:
        raise ValueError(f"activations can be reused in models with one stack of blocks that is fed, not {len(fed)}")
    return fed[0]


def _recurrent(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def _random_settings(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a module keeps the probability of something random that it does in training mode."""
    for name, value in vars(module).items():
        of_dropout = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
        if isinstance(value, float) and (of_dropout or "drop" in name or "jitter" in name):
            yield module, name

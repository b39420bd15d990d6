"""What of a base model can be reused, in the state that it is in, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from reftheads.architectures.paths import arguments, own_modules, token_embeddings
from reftheads.reuse.cone import Cone
from reftheads.reuse.facts import Facts
from reftheads.reuse.frozen import has_usual_loss, keeps_pieces, loss_of_next_tokens, output_of_block
from reftheads.runtime.plan import PlannedNode
from reftheads.runtime.scope import Call

NO_EDIT = "no edit: all that is kept is what the readers see"

HANDED_ON = {"position_bias", "shared_kv_states"}  # what blocks take that earlier ones have computed


class Eligibility:
    """Says of a model with graphs what may be left out. Reasons are texts; `None` is no reason against.

    Args:
        facts: of the model.
    """

    def __init__(self, facts: Facts):
        self.facts = facts
        self._modules = list(own_modules(facts.base))
        self._random = [place for _, module in self._modules for place in _random_settings(module)]
        self._batch_norms = [m for _, m in self._modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._answers: dict[Callable[[Facts], Any], Any] = {}
        self._hands_on = bool(HANDED_ON & set(arguments(facts.blocks[0])))
        self._chooses_keys = any("Indexer" in type(module).__name__ for module in facts.stack.modules())

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Return the types of the base model's floating-point weights."""
        return {weight.dtype for _, weight in self._weights() if weight.is_floating_point()}

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, module in self._modules:
            for name, weight in module._parameters.items():
                if weight is not None:
                    yield f"{path}.{name}", weight

    def why_plain(self, call: Call | None = None) -> str | None:
        """Return why nothing can be reused, in the state that the model is in.

        Args:
            call: the one in question; left out, one that begins here and now.
        """
        facts = self.facts
        if (call or facts.layer.new_call()).disabled:
            return "adapters are disabled"
        if "labels" in facts.targets:
            return "a head has the target 'labels', as the model itself has: copy it to a column of another name"
        if "input_ids" not in facts.arguments:
            return f"the blocks in {facts.info.path or 'the model'!r} are not fed tokens"
        sharded = any(isinstance(module, FSDPModule) for _, module in self._modules)  # between passes as within them
        if sharded or any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for _, weight in self._weights()):
            return "weights of the base model are spread over processes"
        away = next((name for name, weight in self._weights() if weight.is_meta), None)
        if away is not None:
            return f"weights of the base model are on disk, or kept elsewhere until they are needed ({away})"
        trained = next((name for name, weight in self._weights() if weight.requires_grad), None)
        if trained is not None:
            return f"weights of the base model are trained ({trained})"
        active = next((f"{type(m).__name__}.{name}" for m, name in self._random if m.training and getattr(m, name)), "")
        if active:
            return f"the base model has dropout in training mode ({active}); load_base(…, dropout=False) has none"
        if any(module.training for module in self._batch_norms):
            return "batch norms in training mode mix the rows of a batch"
        embeddings = token_embeddings(facts.base)
        if getattr(embeddings, "neftune_noise_alpha", None) and embeddings.training:
            return "embeddings get noise in training mode (neftune_noise_alpha)"
        if getattr(getattr(facts.base, "config", None), "expert_capacity", None) is not None:
            return "tokens compete for places in experts (expert_capacity), so that a row depends on those beside it"
        if self._has_other_columns:
            return "blocks fill up rows, or have several columns for a token"
        if getattr(getattr(facts.base, "config", None), "output_router_logits", False):
            return "the loss of a router looks at every token in every block"
        return None

    def why_no_prefix(self, cone: Cone) -> str | None:
        """Return why all tokens of a row are computed in every step."""
        facts = self.facts
        if not self._sees_earlier_alone:
            return "every token sees all the others"
        if cone.first is None:
            return NO_EDIT
        first = first_token(cone.inside)
        if first is not None:
            return first
        if any(getattr(block, "gradient_checkpointing", False) and block.training for block in facts.blocks):
            return "activation checkpointing goes without a cache"
        if facts.stack is not facts.base and self.lm_head is None:
            return "the model's own loss looks at every token"
        return self.why_no_cache() or cone.differences.prefix

    def why_no_cache(self) -> str | None:
        """Return why the stack does not go on from the keys and values of earlier tokens."""
        if not self._sees_earlier_alone:
            return "every token sees all the others"
        if _recurrent(getattr(self.facts.stack, "config", None)):
            return "blocks carry a recurrent state"
        return None if self._answer(keeps_pieces) else "blocks do not keep keys and values of one shape"

    def why_no_layers(self, cone: Cone) -> str | None:
        """Return why the blocks below the first edit run in every step."""
        if not cone.cut and not cone.constant:
            return cone.differences.layers
        if self._hands_on:
            return "blocks hand on more than the hidden state"
        if self._chooses_keys:
            return "blocks choose the tokens that they attend to, and of equal ones not the same in every batch"
        if not self._gives_hidden_state:
            return "blocks give no hidden state, alone or at the head of a tuple or list"
        return cone.differences.layers

    @property
    def _sees_earlier_alone(self) -> bool:
        return self.facts.causal and not self.facts.seq2seq

    def _answer(self, question: Callable[[Facts], Any]) -> Any:
        """Return what a small pass answers. One that fails, by a hook of somebody else perhaps, is asked again."""
        if self._answers.get(question) is None:
            self._answers[question] = question(self.facts)
        return self._answers[question]

    @property
    def lm_head(self) -> nn.Module | None:
        """Return the vocabulary projection of a causal language model whose loss is the usual one."""
        base: Any = self.facts.base
        generates = self.facts.layer.kind.generative and not self.facts.seq2seq
        loss = self._answer(loss_of_next_tokens) if generates and has_usual_loss(base) else None
        return base.get_output_embeddings() if loss is not None and loss.shifted else None

    @property
    def gives_projection(self) -> bool:
        """Return whether the logits are what the vocabulary's projection returns."""
        loss = self._answer(loss_of_next_tokens)
        return loss is not None and loss.projected

    def as_block_output(self, h: Tensor) -> Any:
        """Return what a block gives whose hidden state is `h`; whatever it gives beside that is missing."""
        output = self._block_output
        return h if isinstance(output, Tensor) else type(output)([h, *[None] * (len(output) - 1)])

    @property
    def _block_output(self) -> Any:
        return self._answer(output_of_block)

    @property
    def _gives_hidden_state(self) -> bool:
        """Return whether a block gives a hidden state, alone or at the head of a tuple or list."""
        output = self._block_output
        return isinstance(output, Tensor) or (type(output) in (tuple, list) and isinstance(output[0], Tensor))

    @property
    def _has_other_columns(self) -> bool:
        """Return whether a block works on more columns than there are tokens, as one token shows."""
        output = self._block_output
        h = output[0] if type(output) in (tuple, list) else output
        return isinstance(h, Tensor) and h.shape[:-1].numel() != 1


def first_token(nodes: Iterable[PlannedNode]) -> str | None:
    """Return why nothing comes before what nodes look at: one of them takes the first token of every row."""
    rules = (planned.node.positions for planned in nodes)
    first = next((str(rule) for rule in rules if rule.begins_with_first), None)
    return None if first is None else f"positions {first!r} begin with the first token"


def _recurrent(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def _random_settings(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield where a module keeps the probability of something random that it does in training mode."""
    for name, value in vars(module).items():
        of_dropout = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
        if isinstance(value, float) and (of_dropout or "drop" in name or "jitter" in name):
            yield module, name

"""The module that a base model gets: the parameters of all its graphs, and where they take hold of it.

`Interventions` is added to the base model as one child. A forward pass goes through four of its methods:

1. the base model is called: `around_base` takes out what is not meant for it (prompt mask, targets) and opens a `Call`;
2. a stack is called: `around_stack` says which nodes act, on which columns, and derives parameters: a `Run`;
3. modules are called: `_touch` lets the nodes that act there edit or read;
4. the base model returns: `around_base` adds predictions, activations and losses to its output.

A step does not need the ones before it: who calls the backbone alone, or `forward` instead of the model, gets the same
edits. The module itself knows nothing of any call; see `scope`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftheads.architectures.paths import arguments
from reftheads.architectures.structure import StackInfo
from reftheads.runtime.acting import touch
from reftheads.runtime.checkpointing import keep_calls, keep_no_calls
from reftheads.runtime.frame import BaseKind, frame_of
from reftheads.runtime.hooks import Around, attach, refuse_lost, take_places_again
from reftheads.runtime.lineage import PREPARED, Generation
from reftheads.runtime.output import extend, or_zero_without_labels
from reftheads.runtime.passes import HookKey, NodeKey, Prompt, Run, by_place
from reftheads.runtime.plan import Plan
from reftheads.runtime.roster import acting_on, by_name, nodes_of
from reftheads.runtime.scope import Call, call_of, change_from_here, entering, scope_of
from reftheads.runtime.traces import cache_in, leave_trace, length_of, refuse_other_edits, trace_of

RUN = "interventions_run"  # the argument by which a base model, or a stack, is handed the run of a pass


class Interventions(nn.Module, BaseTunerLayer):
    """The parameters of all adapters of one base model, and the hooks by which they act.

    Attributes:
        rh_nodes: by adapter, then by node or share, the parameters.
        plans: by adapter, its compiled graph.
        kind: what of the base model decides where prompts end.
        holds: where they take hold of the base model, by stack or place; `None`: of the model itself.
    """

    adapter_layer_names = ("rh_nodes",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.rh_nodes = nn.ModuleDict()
        self.plans: dict[str, Plan] = {}
        self.kind = BaseKind(generative=False, seq2seq=False, one_stack=True)
        self.holds: dict[Any, list[RemovableHandle | Around]] = {}
        self._argument_names: dict[str | None, list[str]] = {}
        self._checkpointing: dict[str, list[nn.Module]] = {}
        self._devices: dict[NodeKey, torch.device] = {}

    @property
    def weight(self) -> Tensor:
        """There is none: PEFT's other layers wrap one, and would look for it here without end."""
        raise AttributeError("interventions wrap no layer and have no weight")

    bias = weight

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel runs copies of a model whose hooks belong to the original: use DistributedDataParallel "
            "(DDP), as `torchrun --nproc-per-node=GPUS` makes a Trainer do, or show one GPU by CUDA_VISIBLE_DEVICES=0"
        )

    # --- adapters ---------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is made within it could never be trained
    def add(self, adapter: str, plan: Plan, base: nn.Module) -> None:
        """Make the parameters of `plan` under the name `adapter`, and take hold of the base model where it acts."""
        nodes = nn.ModuleDict()
        for key, planned in plan.owners().items():
            nodes[key] = planned.new_module()
            self._devices[adapter, key] = _device(base.get_submodule(planned.address.module), base)
        self.rh_nodes[adapter] = nodes
        self.plans[adapter] = plan
        self._move_adapter_to_device_of_base_layer(adapter)
        self._take_hold(plan, base)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's parameters, and let go of the base model where no other one acts."""
        super().delete_adapter(adapter_name)
        self.plans.pop(adapter_name, None)
        addresses = [planned.address for plan in self.plans.values() for planned in plan.nodes]
        used = {None, *(a.stack for a in addresses), *((a.module, a.side) for a in addresses)}
        for place in [place for place in self.holds if place not in used]:
            for hold in self.holds.pop(place):
                hold.remove()

    def detach(self) -> None:
        """Let go of the base model."""
        for hold in [hold for holds in self.holds.values() for hold in holds][::-1]:
            hold.remove()
        self.holds.clear()
        self.plans.clear()
        keep_no_calls(module for modules in self._checkpointing.values() for module in modules)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for key, node in self.rh_nodes[adapter_name].items():  # type: ignore[operator]
            device = self._devices[adapter_name, key]
            if device.type != "meta" and not any(t.is_meta for t in node.stored().values()):
                node.to(device)

    def _take_hold(self, plan: Plan, base: nn.Module) -> None:
        places: dict[HookKey, str] = {(p.address.module, p.address.side): p.address.stack for p in plan.nodes}
        for stack in plan.stacks:
            if stack.path in places.values() and stack.path not in self.holds:
                module = base.get_submodule(stack.path)
                self._argument_names[stack.path] = arguments(module)
                blocks = [m for b in stack.blocks for m in base.get_submodule(b).modules()]
                self._checkpointing[stack.path] = [m for m in blocks if hasattr(m, "gradient_checkpointing")]
                self.holds[stack.path] = [Around(module, "forward", partial(self.around_stack, stack))]
        if None not in self.holds:  # after the stacks, since a bare model is its own stack
            can_generate = getattr(base, "can_generate", None)
            self.kind = BaseKind(
                generative=callable(can_generate) and bool(can_generate()),
                seq2seq=bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False)),
                one_stack=len(plan.stacks) == 1,
            )
            self._argument_names[None] = arguments(base)
            self.holds[None] = [Around(base, "forward", self.around_base)]
        for place, path in places.items():
            if place not in self.holds:
                self.holds[place] = [attach(base.get_submodule(place[0]), place[1], partial(self._touch, path, place))]

    def hold_blocks(self, stack: StackInfo, base: nn.Module) -> None:
        """Let the blocks of a stack give what a run has in their place, where it has; see `Replayed`."""
        for i, path in enumerate(stack.blocks):
            place = (path, "forward")
            if place not in self.holds:
                around = partial(self._around_block, stack.path, i)
                self.holds[place] = [Around(base.get_submodule(path), "forward", around)]

    # --- a call of the base model -------------------------------------------------------------------------

    def new_call(self, **what: Any) -> Call:
        """Return a call that begins here and now.

        Args:
            what: continues, labels, prompt_mask and targets, as in `Call`.
        """
        refuse_lost(self.holds.values())
        scope = scope_of(self)
        return Call(
            layer=self,
            adapters=scope.adapters if scope.adapters is not None else tuple(self.active_adapters),
            adapter_names=scope.adapter_names,
            disabled=scope.disabled or (scope.adapters is None and self.disable_adapters),
            training=self.training,
            strengths=scope.strengths,
            generation=scope.generation,
            **what,
        )

    def around_base(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the base model's `forward` as a call, and add to its output what was read."""
        ours = {"prompt_mask", *(name for plan in self.plans.values() for name in plan.targets)} & kwargs.keys()
        targets = {name: kwargs[name] for name in ours if kwargs[name] is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ours} if ours else kwargs
        run, prepared = kwargs.pop(RUN, None), kwargs.pop(PREPARED, False)
        inputs = _named(self._argument_names[None], args) | kwargs
        prompt_mask = targets.pop("prompt_mask", None)
        call = self.new_call(labels=inputs.get("labels"), prompt_mask=prompt_mask, targets=targets, inputs=inputs)
        if call.generation is not None:
            call.continues = call.generation.continued_by(prepared, self.kind.seq2seq, inputs, prompt_mask)
        with call:
            call.handed |= {} if run is None else {run.stack: run}
            output = forward(*args, **kwargs)
        if call.readings:
            return extend(output, by_name(self, call, call.readings), call.targets, call.labels)
        judged = isinstance(call.labels, Tensor) and not call.disabled
        return or_zero_without_labels(output, call.labels) if judged else output  # type: ignore[arg-type]

    # --- a call of a stack --------------------------------------------------------------------------------

    def around_stack(self, stack: StackInfo, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a stack's `forward` with the nodes that act in it."""
        call = call_of(self)
        if call is not None and stack.path not in call.runs:
            return self._run(stack, call, forward, args, kwargs)
        with self.new_call(prompt_mask=kwargs.pop("prompt_mask", None)) as alone:
            if alone.generation is not None:
                inputs = _named(self._argument_names[stack.path], args) | kwargs
                alone.continues = alone.generation.of_stack(stack.causal, inputs, alone.prompt_mask)
            return self._run(stack, alone, forward, args, kwargs)

    def _run(
        self, stack: StackInfo, call: Call, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        run = kwargs.pop(RUN, None) or call.handed.get(stack.path)
        run = self._new_run(stack, call, args, kwargs) if run is None else run
        if run is None:
            return forward(*args, **kwargs)
        run.readings.update(call.readings)
        call.runs[stack.path] = run
        try:
            output = forward(*args, **kwargs)
        finally:
            del call.runs[stack.path]
            call.readings.update(run.readings)
        if stack.causal and not torch.compiler.is_compiling():
            leave_trace(run, cache_in(output) if isinstance(output, Mapping) else None)
        return output

    def _new_run(self, stack: StackInfo, call: Call, args: tuple, kwargs: dict[str, Any]) -> Run | None:
        cache = cache_in(kwargs)
        if _behind_prompts(self.plans.values(), stack, call, cache):
            return None
        nodes = [] if call.disabled else list(nodes_of(self, stack.path, call))
        known = call.generation is not None and stack.causal and not torch.compiler.is_compiling()
        if not nodes and not (known and trace_of(cache) is not None):
            return None
        inputs = _named(self._argument_names[stack.path], args) | kwargs
        ids = inputs.get("input_ids")
        tokens = ids if ids is not None else inputs.get("inputs_embeds")
        shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        frame = frame_of(self.kind, stack, call, inputs, shape, [p.node.positions for _, p, _ in nodes])
        acting = by_place(acting_on(self, nodes, call, tokens))
        keep_calls(self, self._checkpointing[stack.path])
        run = Run(stack.path, frame, acting, shape, call.continues)
        if known and call.generation is not None:
            refuse_other_edits(run, cache, call.generation.ids if call.continues is call.generation.main else None)
        return run if nodes else None

    # --- a call of a module -------------------------------------------------------------------------------

    def _touch(self, stack: str, place: HookKey, h: Tensor, x: Tensor) -> Tensor | None:
        call = call_of(self) or refuse_lost(self.holds.values())
        run = None if call is None else call.runs.get(stack)
        return None if run is None or place not in run.acting else touch(run, place, h, x)

    def _around_block(
        self, stack: str, number: int, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        call = call_of(self)
        run = None if call is None else call.runs.get(stack)
        if run is not None and run.replayed is not None and number < run.replayed.blocks:
            return run.replayed.output
        return forward(*args, **kwargs)

    # --- what holds for several calls -----------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, for every thread; within `generate`, for what it still calls."""
        if scope_of(self).adapters is None:
            super().enable_adapters(enabled)
        else:
            change_from_here(self, disabled=not enabled)

    def rows_by_adapter(self, adapter_names: Sequence[str] | None) -> AbstractContextManager:
        """Within, row i of a batch goes through adapter `adapter_names[i]`; `"__base__"` means none.

        Raises:
            ValueError: an adapter that there is not.
        """
        unknown = sorted(set(adapter_names or ()) - set(self.plans) - {"__base__"})
        if unknown:
            raise ValueError(f"unknown adapter {unknown[0]!r} in adapter_names: there are {', '.join(self.plans)}")
        take_places_again(self.holds.values())
        names = tuple(adapter_names) if adapter_names else None
        if scope_of(self).adapters is not None:  # a call of its own, while generate runs: by a logits processor, say
            return entering(self, adapters=None, generation=None, adapter_names=names)
        return entering(self, adapter_names=names) if names else nullcontext()

    def silent(self) -> AbstractContextManager:
        """Within, no node acts."""
        return entering(self, disabled=True)

    def holding(self, generation: Generation | None = None) -> AbstractContextManager:
        """Within, calls go on with the adapters that act now, whatever is switched elsewhere.

        Args:
            generation: within which they are made.
        """
        call = self.new_call()
        within = {} if generation is None else {"generation": generation}
        return entering(self, adapters=call.adapters, disabled=call.disabled, **within)

    def generating(self, real: Tensor, prompt: Tensor) -> AbstractContextManager:
        """Within, passes marked as `PREPARED` continue this input: Bool[rows columns] each, tokens and the prompt's."""
        return self.holding(Generation(Prompt(real, prompt)))


def _behind_prompts(plans: Iterable[Plan], stack: StackInfo, call: Call, cache: Any) -> bool:
    """Return whether this is a step of `generate` that no node can act in, as most steps of most graphs are."""
    if call.continues is None or call.continues.prompt is None or cache is None or not stack.causal:
        return False
    past = length_of(cache)
    behind = isinstance(past, int) and past >= call.continues.prompt.shape[1]
    return behind and all(plan.only_prompts(stack.path) for plan in plans)


def _named(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False))


def _device(module: nn.Module, base: nn.Module) -> torch.device:
    tensor = next(iter(module.parameters()), next(iter(base.parameters()), None))
    return torch.device("cpu") if tensor is None else tensor.device

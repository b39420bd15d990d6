"""One forward pass: which nodes act, on which tokens, with which parameters.

`Interventions` is the module that compiled graphs add to a base model. It owns the parameters and the
hooks, which are installed once and stay. A forward pass goes through four of its methods:

1. the base model is called: `_call_begins` takes out what is not meant for it (prompt mask, targets);
2. a stack is called: `_stack_begins` says which nodes act, on which columns, and derives parameters;
3. modules are called: `_touch` lets the nodes that act there edit or read;
4. the base model returns: `_call_ends` adds predictions, activations and losses to its output.

A step does not need the ones before it: who calls the backbone alone gets the same edits. What a pass
has resolved is its `Run`; activation checkpointing gets the same run again when it computes a block a
second time, even if other passes lie in between.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftheads.architectures.addresses import StackInfo, arguments
from reftheads.graph.node import IGNORE, Context, NodeModule, Params, Reader
from reftheads.graph.positions import Positions, Selection
from reftheads.runtime.checkpointing import KeepRun
from reftheads.runtime.hooks import attach
from reftheads.runtime.output import Reading, extend
from reftheads.runtime.passes import Acting, Call, Frame, Generation, HookKey, NodeKey, Run, SideBySide, Source, derive
from reftheads.runtime.plan import Plan, PlannedNode

_AS_IT_IS = nullcontext()
_PLAIN = {training: Context(training=training) for training in (True, False)}


class Interventions(nn.Module, BaseTunerLayer):
    """The parameters and hooks of all adapters of one base model, added to it as `interventions`."""

    adapter_layer_names = ("rh_nodes",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.rh_nodes = nn.ModuleDict()  # adapter -> node or share -> NodeModule
        self.plans: dict[str, Plan] = {}
        self.runs: dict[str, Run] = {}
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.prepared: dict[str, Run] = {}  # by stack, where a pass is no plain one; see replay
        self.adapter_names: Sequence[str] | None = None  # one a row, as PEFT passes them
        self.generative = False  # whether the base model generates text
        self.seq2seq = False  # whether an encoder is fed the input, and a decoder the answer
        self._handles: dict[Any, list[RemovableHandle]] = {}
        self._argument_names: dict[str, list[str]] = {}
        self._checkpointing: dict[str, list[nn.Module]] = {}
        self._devices: dict[NodeKey, torch.device] = {}
        self._indices: dict[tuple, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        """There is none: PEFT's other layers wrap one, and would look for it here without end."""
        raise AttributeError("interventions wrap no layer and have no weight of their own")

    bias = weight

    # --- adapters ---------------------------------------------------------------------------------------

    def add(self, adapter: str, plan: Plan, base: nn.Module) -> None:
        """Makes the parameters of `plan` under the name `adapter` and installs the hooks it needs."""
        nodes = nn.ModuleDict()
        for key, planned in plan.owners().items():
            nodes[key] = planned.new_module()
            self._devices[adapter, key] = _device(base.get_submodule(planned.address.module), base)
        self.rh_nodes[adapter] = nodes
        self.plans[adapter] = plan
        self._move_adapter_to_device_of_base_layer(adapter)
        self._install(plan, base)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.plans.pop(adapter_name, None)
        addresses = [planned.address for plan in self.plans.values() for planned in plan.nodes]
        used = {None, *(a.stack for a in addresses), *((a.module, a.side) for a in addresses)}
        for key in [key for key in self._handles if key not in used]:
            for handle in self._handles.pop(key):
                handle.remove()

    def detach_hooks(self) -> None:
        """Removes every hook; the base model is then as if no graph had ever been compiled into it."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        for module in (m for modules in self._checkpointing.values() for m in modules):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, KeepRun):
                module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for key, node in self.rh_nodes[adapter_name].items():  # type: ignore[operator]
            device = self._devices[adapter_name, key]
            if device.type != "meta" and not any(t.is_meta for t in node.stored().values()):
                node.to(device)

    def _install(self, plan: Plan, base: nn.Module) -> None:
        keys: dict[HookKey, str] = {(p.address.module, p.address.side): p.address.stack for p in plan.nodes}
        used = [stack for stack in plan.stacks if stack.path in keys.values()]
        if None not in self._handles:
            self.generative = callable(can := getattr(base, "can_generate", None)) and bool(can())
            self.seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
            self._argument_names[""] = arguments(base)
            self._handles[None] = [base.register_forward_pre_hook(self._call_begins, with_kwargs=True)]
        for stack in used:
            if stack.path not in self._handles:
                module = base.get_submodule(stack.path)
                self._argument_names[stack.path] = arguments(module)
                blocks = [m for b in stack.blocks for m in base.get_submodule(b).modules()]
                self._checkpointing[stack.path] = [m for m in blocks if hasattr(m, "gradient_checkpointing")]
                begins = functools.partial(self._stack_begins, stack)
                ends = functools.partial(self._stack_ends, stack)
                self._handles[stack.path] = [
                    module.register_forward_pre_hook(begins, with_kwargs=True),
                    module.register_forward_hook(ends, always_call=True),
                ]
        if len(self._handles[None]) == 1:  # after the stack's, since a bare model is its own stack
            ends = base.register_forward_hook(self._call_ends, with_kwargs=True, always_call=True)
            self._handles[None].append(ends)
        for key, stack_path in keys.items():
            if key not in self._handles:
                module = base.get_submodule(key[0])
                self._handles[key] = [attach(module, key[1], functools.partial(self._touch, stack_path, key))]

    # --- a call of the base model -------------------------------------------------------------------------

    def _call_begins(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]):
        ours = {"prompt_mask", *(name for plan in self.plans.values() for name in plan.targets)} & kwargs.keys()
        taken = {name: kwargs[name] for name in ours if kwargs[name] is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ours} if ours else kwargs
        labels = kwargs.get("labels", _named(self._argument_names[""], args).get("labels") if args else None)
        self.call = Call(labels, taken.pop("prompt_mask", None), taken)
        return (args, kwargs) if ours else None

    def _call_ends(self, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        call, self.call = self.call, None
        if call is None or not call.readings or output is None:
            return None
        return extend(output, call.named(), call.targets, call.labels)

    # --- a call of a stack --------------------------------------------------------------------------------

    def _stack_begins(self, stack: StackInfo, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.runs.pop(stack.path, None)
        if stack.path in self.prepared:
            self.runs[stack.path] = run = self.prepared[stack.path]
            run.readings.update({} if self.call is None else self.call.readings)
            return
        if self.disable_adapters or self._behind_prompts(stack, kwargs.get("past_key_values")):
            return
        nodes = list(self.nodes_of(stack.path))
        if not nodes:
            return
        given = _named(self._argument_names[stack.path], args) | kwargs
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given.get("inputs_embeds")
        shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        frame = self.frame(stack, given, shape, [p.node.positions for _, p, _ in nodes])
        acting: dict[HookKey, list[Acting]] = {}
        for act in self.acting(nodes, tokens):
            acting.setdefault((act.planned.address.module, act.planned.address.side), []).append(act)
        readings = {} if self.call is None else dict(self.call.readings)
        self.runs[stack.path] = Run(frame, acting, shape, readings)
        for block in self._checkpointing[stack.path]:
            checkpoint = getattr(block, "_gradient_checkpointing_func", None)
            if block.gradient_checkpointing and checkpoint is not None and not isinstance(checkpoint, KeepRun):
                block._gradient_checkpointing_func = KeepRun(self, stack.path, checkpoint)  # type: ignore[assignment]

    def _stack_ends(self, stack: StackInfo, module: nn.Module, args: tuple, output: Any) -> None:
        run = self.runs.pop(stack.path, None)
        if run is not None and self.call is not None:
            self.call.readings.update(run.readings)

    def _behind_prompts(self, stack: StackInfo, cache: Any) -> bool:
        """Whether this is a step of `generate` that no node can act in, which most steps of most graphs are."""
        if self.generation is None or cache is None or not stack.causal:
            return False
        past = cache.get_seq_length()
        behind = isinstance(past, int) and past >= self.generation.prompt.shape[1]
        return behind and all(plan.only_prompts(stack.path) for plan in self.plans.values())

    def acting(
        self, nodes: Sequence[tuple[NodeKey, PlannedNode, NodeModule]], tokens: Tensor | None = None
    ) -> Iterator[Acting]:
        """Each node with what it needs in one pass over `tokens`."""
        derived = self._derived([module for _, _, module in nodes])
        stacked = self.side_by_side(tokens)
        for (adapter, _), planned, module in nodes:
            key, rows, p = (adapter, str(planned.node.name)), None, derived[module]
            if len(stacked) > 1 and planned.node.source is None and p is not None:
                if adapter != stacked[0]:
                    continue
                modules: dict[NodeKey, NodeModule] = {
                    (other, key[1]): self.rh_nodes[other][planned.node.key]  # type: ignore[index,misc]
                    for other in stacked
                }
                every = [derived[other] or {} for other in modules.values()]
                p = {name: torch.stack([params[name] for params in every]) for name in p}
                yield Acting(key, planned, SideBySide(modules), p, module.dtype, None)
                continue
            if self.adapter_names is not None and tokens is not None:
                rows = self._rows_of(adapter, tokens)
            yield Acting(key, planned, module, p, module.dtype, rows)

    def side_by_side(self, tokens: Tensor | None) -> list[str]:
        """The adapters of a batch's rows, if they have one graph and the rows are theirs in equal shares, in order."""
        names = list(self.adapter_names or ())
        adapters = list(dict.fromkeys(names))
        if tokens is None or len(tokens) != len(names) or not all(name in self.plans for name in adapters):
            return []
        share = len(names) // max(len(adapters), 1)
        same = all(self.plans[name].graph == self.plans[adapters[0]].graph for name in adapters)
        return adapters if same and names == [name for name in adapters for _ in range(share)] else []

    def nodes_of(self, stack: str) -> Iterator[tuple[NodeKey, PlannedNode, NodeModule]]:
        adapters = self.active_adapters if self.adapter_names is None else dict.fromkeys(self.adapter_names)
        for adapter in adapters:
            if adapter not in self.plans:
                continue
            modules = self.rh_nodes[adapter]
            for planned in self.plans[adapter].of_stack(stack):
                yield (adapter, planned.node.key), planned, modules[planned.node.key]  # type: ignore[index]

    def _rows_of(self, adapter: str, tokens: Tensor) -> Tensor:
        assert self.adapter_names is not None
        keep = torch.tensor([name == adapter for name in self.adapter_names], device=tokens.device)
        if tokens.shape[0] % len(keep):
            raise ValueError(f"adapter_names has {len(keep)} entries for {tokens.shape[0]} rows: give one a row")
        return keep.repeat_interleave(tokens.shape[0] // len(keep))

    def frame(
        self, stack: StackInfo, given: Mapping[str, Any], shape: tuple[int, int] | None, rules: Sequence[Positions]
    ) -> Frame:
        """Where the columns of a pass lie, by what the stack and the base model were given.

        Raises:
            ValueError: a rule about prompts, and nothing that says where they end.
        """
        cache = given.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.generation is not None and stack.causal and shape is not None:
            return Frame(past, *self.generation.masks(shape[0]), ids)
        relative = [str(rule) for rule in rules if rule.needs_prompt]
        if relative and _packed(given):
            raise ValueError(
                f"positions {relative[0]!r} need one row a sequence, and these rows are packed: unpack them"
            )
        prompt = self._prompt_mask(stack, shape, past)
        if prompt is None and shape is not None:
            if relative and mask is not None and flat is None:
                raise ValueError(
                    f"positions {relative[0]!r} count real tokens, which a mask of this form does not show: pass a "
                    "2-D attention_mask, or prompt_mask"
                )
            if relative and self.training and stack.causal and self.generative and not self._classifies:
                raise ValueError(
                    f"positions {relative[0]!r} depend on where the prompt ends, and this batch does not say: pass "
                    "labels with -100 on the prompt, or prompt_mask, or use positions='all'; or call model.eval()"
                )
        return Frame(past, flat, prompt, ids)

    @property
    def _classifies(self) -> bool:
        """Whether a head's target came along: then rows are whole inputs to be judged, not prompts with answers."""
        return self.call is not None and bool(self.call.targets)

    def _prompt_mask(self, stack: StackInfo, shape: tuple[int, int] | None, past: int | Tensor) -> Tensor | None:
        if self._reads_input(stack):
            given = self.call.prompt_mask if self.call is not None else None
            if self.generation is not None and not stack.causal:
                given = self.generation.encoder_prompt
            if given is not None:
                return given
        labels = None if self.call is None else self.call.labels
        if not stack.causal or not self.generative or labels is None or shape is None or labels.shape != shape:
            return None
        answered = (labels != IGNORE).long()
        # the decoder of an encoder-decoder model is fed the labels one column late
        before = answered.cumsum(1) - answered if self.seq2seq else answered.cumsum(1)
        cached = before.new_zeros((shape[0], int(past)))  # labels cover this chunk; what lies before is prompt
        return torch.cat([cached, before], dim=1) == 0

    def _reads_input(self, stack: StackInfo) -> bool:
        """Whether the stack is fed the input that a prompt mask is about, not the answer or an image."""
        if self.seq2seq:
            return not stack.causal
        return stack.causal or all(len(plan.stacks) == 1 for plan in self.plans.values())

    def _derived(self, modules: Sequence[NodeModule]) -> Mapping[NodeModule, Params | None]:
        if self.generation is None or torch.is_grad_enabled():
            return derive(modules)
        known = self.generation.derived
        known.update(derive(module for module in modules if module not in known))
        return known

    # --- a call of a module -------------------------------------------------------------------------------

    def _touch(self, stack: str, key: HookKey, h: Tensor, x: Tensor) -> Tensor | None:
        run = self.runs.get(stack)
        if run is None or key not in run.acting:
            return None
        flat = h.ndim != 3
        if flat:
            if h.ndim != 2 or run.shape is None or h.shape[0] != run.shape[0] * run.shape[1]:
                raise ValueError(
                    f"{key[0]!r} works on a tensor of shape {tuple(h.shape)}: nodes need [batch, sequence, width]"
                )
            h, x = h.unflatten(0, run.shape), x.unflatten(0, run.shape)
        new, device = h, h.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS:
            for node in run.acting[key]:
                new = self._act(run, node, new, x)
        if new is h:
            return None
        return new.flatten(0, 1) if flat else new

    def _act(self, run: Run, node: Acting, h: Tensor, x: Tensor) -> Tensor:
        planned, module = node.planned, node.module
        positions = planned.node.positions
        selection = Selection() if planned.sees_other_tokens else run.selection(positions, h, planned.may_use_a_mask)
        if selection is None:
            return h
        if node.rows is not None:
            selection = selection.rows(node.rows.to(h.device), h.shape[1])
        source = None
        if planned.node.source is not None:
            source = self._source(run, node).beside(h)
            if self._single(node):  # a row without the token that decides stays as it is
                self._check_decided(run, node, h.shape[1])
                selection = selection.rows(source.valid[:, 0], h.shape[1])
        index = self._index(planned, h.device)
        picked = selection.gather(h)
        part = picked if index is None else picked[..., index]
        dtype = node.dtype or h.dtype
        context = _PLAIN[module.training]
        if source is not None or module.intervention.needs_linear:
            entered = selection.gather(x).to(dtype) if module.intervention.needs_linear else None
            context = Context(entered, None if source is None else source.value, module.training)
        if not planned.edits:
            self.read(run, node, part, selection, h.shape[1], context)
            return h
        result = module(node.params, part if part.dtype == dtype else part.to(dtype), context)
        result = result if result.dtype == h.dtype else result.to(h.dtype)
        if index is not None:
            whole = picked.clone()
            whole[..., index] = result
            result = whole
        return selection.scatter(h, picked, result)

    def read(
        self, run: Run, node: Acting, h: Tensor, selection: Selection, length: int, context: Context | None = None
    ) -> None:
        """Lets a node read the tokens `h` that `selection` gathered from a pass of `length` columns."""
        module = node.module
        assert isinstance(module.intervention, Reader)
        valid, columns = selection.validity(h), selection.columns
        context = replace(context or _PLAIN[module.training], valid=valid)
        value = module(node.params, h.to(node.dtype or h.dtype), context)
        if module.intervention.pools:
            valid, columns = valid.any(1, keepdim=True), None
        owned = {node.key: (valid, module.stored())} if isinstance(module, NodeModule) else {}
        if isinstance(module, SideBySide):
            whose = torch.arange(len(h), device=h.device)[:, None] // (len(h) // len(module.modules))
            owned = {key: (valid & (whose == i), own.stored()) for i, (key, own) in enumerate(module.modules.items())}
        single = node.planned.node.positions.bound == 1 or module.intervention.pools
        for key, (own, p) in owned.items():
            seen = torch.where(own[..., None], value, torch.zeros_like(value))
            run.readings[key] = Reading(module.intervention, seen, own, columns, length, single, p)
            if single and self.generation is not None:
                sources = self.generation.sources
                sources[key] = Source(seen, own).since(sources.get(key))

    def _source(self, run: Run, node: Acting) -> Source:
        key = (node.key[0], str(node.planned.node.source))
        if self.generation is not None and key in self.generation.sources:
            return self.generation.sources[key]
        if key not in run.readings:
            raise ValueError(
                f"node {node.key[1]!r} reads {key[1]!r}, which has not run in this pass: its tokens lie before this "
                "chunk. Pass the whole input, or use generate, which remembers"
            )
        return Source(run.readings[key].value, run.readings[key].valid)

    def _check_decided(self, run: Run, node: Acting, chunk: int) -> None:
        """Raises `ValueError` where tokens of this chunk may hang on one that comes in a later chunk."""
        frame, rule = run.frame, node.planned.node.positions
        source = self.plans[node.key[0]][str(node.planned.node.source)].node
        if source.positions == rule or str(rule) == "generated" or str(source.positions) in ("f1", "0"):
            return
        prompt = frame.prompt_mask
        if prompt is not None and isinstance(frame.past, int) and frame.past + chunk < prompt.shape[1]:
            raise ValueError(
                f"node {node.key[1]!r} at {rule} reads {source.name!r} at {source.positions}, which may lie behind "
                "this chunk of the prompt: feed the prompt whole, or edit at positions 'generated'"
            )

    def _single(self, node: Acting) -> bool:
        """Whether the node's source selects one token a row, by its rule."""
        return self.plans[node.key[0]][str(node.planned.node.source)].node.positions.bound == 1

    def _index(self, planned: PlannedNode, device: torch.device) -> slice | Tensor | None:
        columns = planned.address.columns
        if columns is None or isinstance(columns, range):
            return None if columns is None else slice(columns.start, columns.stop)
        key = (columns, device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(columns, device=device)
        return self._indices[key]

    # --- what holds for several calls -----------------------------------------------------------------------

    @contextmanager
    def rows_by_adapter(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Within, row i of a batch goes through adapter `adapter_names[i]`; `"__base__"` means none."""
        unknown = sorted(set(adapter_names or ()) - set(self.plans) - {"__base__"})
        if unknown:
            raise ValueError(f"unknown adapter {unknown[0]!r} in adapter_names: there are {', '.join(self.plans)}")
        before, self.adapter_names = self.adapter_names, adapter_names or self.adapter_names
        try:
            yield
        finally:
            self.adapter_names = before

    @contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """Within, this is what the base model was called with."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    @contextmanager
    def running(self, runs: Mapping[str, Run]) -> Iterator[None]:
        """Within, a pass through one of these stacks is this run, whatever the stack is given."""
        before, self.prepared = self.prepared, {**self.prepared, **runs}
        try:
            yield
        finally:
            self.prepared = before

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, no node acts."""
        before, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = before

    @contextmanager
    def generating(self, real: Tensor, prompt: Tensor, encoder_prompt: Tensor | None = None) -> Iterator[None]:
        """Within, every pass continues this input: Bool[rows columns] each, real tokens and those of the prompt."""
        before, self.generation = self.generation, Generation(real, prompt, encoder_prompt)
        try:
            yield
        finally:
            self.generation = before


def _packed(given: Mapping[str, Any]) -> bool:
    """Whether a row holds several sequences, as its positions show where there is no mask."""
    positions = given.get("position_ids")
    if given.get("cu_seq_lens_q") is not None:
        return True
    if given.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())


def _named(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False))


def _device(module: nn.Module, base: nn.Module) -> torch.device:
    tensor = next(iter(module.parameters()), next(iter(base.parameters()), None))
    return torch.device("cpu") if tensor is None else tensor.device

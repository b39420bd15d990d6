"""The net under all of reuse: a few short rows run on both paths, and what comes out otherwise is not reused.

What is recorded is recorded in a batch with more padding than the one that finds it, so that a model which looks at
what stands where padding was shows that. Parts of reuse are left out, one or both of them, until loss, gradients and
all that is read agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reftheads._utils.eval_mode import evaluating
from reftheads._utils.kept import nothing_kept
from reftheads._utils.lazy import cached
from reftheads.reuse import short_rows
from reftheads.reuse.cone import Cone, Differences
from reftheads.reuse.execution import Execution
from reftheads.runtime.scope import entering

Values = dict[str, Tensor]


class Comparison:
    """What the plain path and reuse give for some graphs that act together.

    Args:
        execution: of the model, without a store.
        adapters: one for each of the graphs.
        cone: of all of them.
    """

    def __init__(self, execution: Execution, adapters: Sequence[str], cone: Cone):
        self.execution = execution
        self.adapters = tuple(adapters)
        self.every = cone
        self.bound = max((planned.node.positions.bound or 0 for planned in cone.nodes), default=0)
        self.failed = False  # on the plain path, such as by a hook of somebody else: it shows nothing that lasts

    @cached
    def cone(self) -> Cone:
        """Return the cone without what comes out otherwise than on the plain path."""
        with self._undisturbed(), torch.enable_grad():
            first = self._difference(self.every)
            if first is None:
                return self.every
            for prefix, layers in ((first, None), (None, first), (first, first)) if not self.failed else ():
                part = self.every if layers is None else self.every.with_all_layers(layers)
                part = replace(part, differences=replace(part.differences, prefix=prefix))
                if self._difference(part) is None:
                    return part
        return replace(self.every, differences=Differences(everything=first))

    @cached
    def generation(self) -> str | None:
        """Return how `generate` comes out otherwise if it begins with what is kept; `None` if it does not."""
        base: Any = self.execution.facts.base
        options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "output_logits": True}
        with self._undisturbed(), torch.no_grad():
            prompts = short_rows.prompts_of(self.execution.facts, self.bound)
            try:
                cache = self.execution.prefilled(self.cone, **prompts)
                if cache is None:
                    return None
                runs = []
                for more in ({}, {"past_key_values": cache}):
                    with nothing_kept(base) as kept:
                        runs.append(base.generate(**prompts, **options, **more, return_dict_in_generate=True))
                    if kept:
                        return f"the model keeps {kept[0]!r} from one pass to the next"
                plain, begun = runs
            except Exception as error:
                return f"it fails ({_short(error)})"
        length = prompts["input_ids"].shape[1]
        for step, logits in enumerate(zip(plain.logits, begun.logits, strict=False)):
            if not torch.equal(*(run.sequences[:, : length + step] for run in (plain, begun))):
                return None  # of two tokens that are as likely, each has taken another one
            difference = _apart("the logits", *logits, self._tolerance)
            if difference is not None:
                return difference
        return None

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Let passes be plain ones, of the graphs alone, in evaluation mode, and change no random numbers."""
        facts = self.execution.facts
        devices = [facts.device] if facts.device.type == "cuda" else []
        base = facts.base
        with torch.random.fork_rng(devices), nothing_kept(base), evaluating(base), torch.inference_mode(False):
            scope = {"adapters": self.adapters, "adapter_names": None, "disabled": False}
            with entering(facts.layer, replay=None, generation=None, **scope):
                yield

    # --- what comes out ---------------------------------------------------------------------------------------

    def _difference(self, cone: Cone) -> str | None:
        """Return how something comes out otherwise, of the first batch in which it does.

        A batch of which the plain path makes NaN shows nothing, as with padding at the left, eager attention, float64.
        """
        compared = 0
        try:
            for batch, wider in short_rows.batches(self.execution.facts, self.bound):
                self.failed = True
                plain = self._values(self.execution.facts.base(**batch), batch)
                self.failed = False
                if not all(bool(value.isfinite().all()) for value in plain.values()):
                    continue
                compared += 1
                reused = self._values(self._reused(cone, batch, wider), batch)
                alike = [name for name, value in plain.items() if name in reused and value.shape == reused[name].shape]
                pairs = [{name: values[name] for name in alike} for values in (plain, reused)]
                difference = self._first_apart(*pairs) or self._first_apart(*map(self._gradients, pairs))
                if difference is not None:
                    return difference
        except Exception as error:  # whatever an unknown architecture makes of short rows, or of a pass in two parts
            return f"a few short rows fail ({_short(error)})"
        return None if compared else "what a plain pass over a few short rows gives is not finite"

    def _reused(self, cone: Cone, batch: dict[str, Tensor], wider: dict[str, Tensor]) -> Any:
        execution = self.execution
        call = execution.facts.layer.new_call()
        recorded = execution.recorder.rows(cone, execution.split.rows(cone, wider, call), above=True)
        return execution.through(call, cone, batch, recorded, whole=True)

    def _values(self, output: Any, batch: Mapping[str, Tensor]) -> Values:
        """Return what an output holds of real tokens: its loss, what nodes have read, and what the model gives."""
        facts, real = self.execution.facts, batch["attention_mask"].bool()
        # an encoder classifies a row by its first column; where that is padding, a batch takes the plain path
        rows = slice(None) if facts.causal or facts.seq2seq else real[:, 0]
        values: Values = {}
        for name, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "head_loss":
                by_token = value.shape[:2] == real.shape
                values[f"the {name}"] = value[real] if by_token else value[rows] if value.ndim else value
        for field in ("predictions", "collected"):
            for name, value in (output.get(field) or {}).items():
                selected = output.selected[name]
                values[f"what {name!r} reads"] = value.reshape(*selected.shape, -1)[selected]
        return values

    def _gradients(self, values: Values) -> Values:
        """Return the gradients of the nodes' parameters for the sum of all values, each with a weight of its own."""
        nodes = {name: self.execution.facts.layer.rh_nodes[name] for name in self.adapters}
        named = {f"the gradient of {n}": p for node in nodes.values() for n, p in node.named_parameters()}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        weighted = [value.flatten().double() @ _weights(value) for value in values.values() if value.requires_grad]
        if not weighted or not trained:
            return {}
        total = torch.stack([value.cpu() for value in weighted]).sum()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), gradients, strict=True)
        }

    def _first_apart(self, plain: Values, reused: Values) -> str | None:
        of_gradients = [value.double().norm().cpu() for name, value in plain.items() if "gradient" in name]
        least = 0.01 * float(torch.stack(of_gradients).norm()) if of_gradients else 0.0
        found = (_apart(name, value, reused[name], self._tolerance, least) for name, value in plain.items())
        return next(filter(None, found), None)

    @property
    def _tolerance(self) -> float:
        """Return the largest difference, in relation to a tensor's norm, that is rounding in these types."""
        autocast = self.execution.facts.autocast
        dtypes = self.execution.eligibility.dtypes | ({autocast} if autocast is not None else set())
        return max(2e-4, 16 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))


def _apart(what: str, plain: Tensor, reused: Tensor, tolerance: float, least: float = 0.0) -> str | None:
    """Return how far two tensors are apart; `None` where they are not.

    Args:
        least: what counts as the norm of a smaller tensor.
    """
    a, b = plain.detach().double(), reused.detach().double()
    difference, norm = float((a - b).norm()), max(float(a.norm()), least)
    if difference <= tolerance * norm * (0.25 if what == "the loss" else 1):
        return None
    if a.numel() == 1:
        return f"{what} would be {float(b):.6g} instead of {float(a):.6g}"
    return f"{what} would be off by {difference / norm:.1%}" if norm else f"{what} would not be 0"


def _weights(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), dtype=torch.float64, device=value.device).cos()


def _short(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

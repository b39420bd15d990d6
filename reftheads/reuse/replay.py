"""Computing only the cone of influence: what no parameter can change is recorded once and replayed.

A batch goes through `Execution` in four steps:

1. its rows are divided into a prefix that no node and no label looks at, and the rest (`Split`);
2. a `Recorder` gives what the base model computes below and before the cone, from its store or anew;
3. the rest of the rows goes through the model as a run in which the blocks below the cone give what was recorded
   (`_prepared`), and no further than somebody looks: one of four ways (`through`);
4. logits are computed where there is a label, and the losses of the model and of its heads are added.

The result is that of the plain path. Where that cannot be promised, a batch takes the plain path, or leaves out the
part that cannot; `Eligibility` says why, or a `Comparison` has found it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reftheads.reuse.comparison import Comparison
from reftheads.reuse.cone import Cone
from reftheads.reuse.eligibility import Eligibility, first_token
from reftheads.reuse.execution import Execution
from reftheads.reuse.facts import Facts
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.plan import Plan
from reftheads.runtime.scope import Call

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

KNOWN = 16  # comparisons that are remembered, of the adapters that acted together last


class Replay:
    """Runs a model with intervention graphs on what they can change alone.

    Args:
        facts: of the model.
        store: where the base model's activations are kept; `None` records them anew for every batch, still without
            gradient and without keeping what a backward pass would need.
    """

    def __init__(self, facts: Facts, store: ActivationStore | None = None):
        self.facts = facts
        self.store = store
        self.eligibility = Eligibility(facts)
        self.execution = Execution(facts, self.eligibility, store)
        self.split = self.execution.split
        self._compared: list[tuple[list[Plan], Any, Comparison]] = []  # the latest first

    def kept_in(self, store: ActivationStore | None) -> Replay:
        """Return the same with another store; what was compared is known to both."""
        other = copy(self)
        other.store, other.execution = store, Execution(self.facts, self.eligibility, store)
        return other

    def why_plain(self, call: Call | None = None) -> str | None:
        """Return why nothing can be reused, in the state that the model is in.

        Args:
            call: the one in question; left out, one that begins here and now.
        """
        call = call or self.facts.layer.new_call()
        return self.eligibility.why_plain(call) or self._comparison(call).cone.differences.everything

    def why_no_generation(self) -> str | None:
        """Return why `generate` does not begin with what is kept."""
        no_cache = self.eligibility.why_no_cache()
        if no_cache is not None:
            return no_cache
        comparison = self._comparison(self.facts.layer.new_call())
        first = first_token(comparison.cone.nodes)
        return comparison.generation if first is None else first

    @property
    def cone(self) -> Cone:
        """Return the cone of the adapters that act now, as far as it can be used."""
        return self._comparison(self.facts.layer.new_call()).cone

    def _comparison(self, call: Call) -> Comparison:
        """Return what is compared with the plain path for the adapters of a call; it is made once for their graphs.

        Nothing runs until it is asked for what came out.
        """
        plans, state = self.facts.layer.plans, self.facts.computing
        acting = {name: plans[name] for name in call.adapter_names or call.adapters if name in plans}
        for known, then, comparison in self._compared:
            of_these = then == state and list(map(id, known)) == list(map(id, acting.values()))
            if of_these and not comparison.failed:
                return comparison
        one_each: dict[str, Plan] = {}
        for name, plan in acting.items():
            if all(plan.graph != other.graph for other in one_each.values()):
                one_each[name] = plan
        cone = Cone.of([planned for plan in one_each.values() for planned in plan.nodes], self.facts.info)
        reason = self.eligibility.why_no_layers(cone)
        cone = cone if reason is None else cone.with_all_layers(reason)
        comparison = Comparison(Execution(self.facts, self.eligibility, None), list(one_each), cone)
        self._compared.insert(0, (list(acting.values()), state, comparison))
        del self._compared[KNOWN:]
        return comparison

    # --- one batch ------------------------------------------------------------------------------------------

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Return the model's output for a batch, with losses and without logits; `None`: it takes the plain path.

        `loss`, `losses` and `head_loss` are those of the plain path, and so is what is read by rules that select a
        bounded number of tokens. Other rules give the tokens that were computed.
        """
        given = {name: value for name, value in batch.items() if value is not None}
        call = self.facts.layer.new_call()
        if self.eligibility.why_plain(call) is not None or not self.split.understands(given):
            return None
        cone = self._comparison(call).cone
        return None if cone.differences.everything is not None else self.execution.through(call, cone, given)

    # --- generation -----------------------------------------------------------------------------------------

    def prefill(
        self, input_ids: Int[Tensor, "rows columns"], attention_mask: Bool[Tensor, "rows columns"] | None = None
    ) -> Any:
        """Return a cache of the columns before the first that a node looks at, for `generate`; `None`: there is none.

        Args:
            input_ids, attention_mask: prompts padded at the left.
        """
        if self.why_plain() is not None or self.why_no_generation() is not None:
            return None
        return self.execution.prefilled(self.cone, input_ids, attention_mask)

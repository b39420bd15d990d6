"""InterventionModel: the PeftModel of a base model and a graph."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from reftheads._utils.deprecation import deprecate, renamed
from reftheads.adapter.checkpoint import SavablePeftModel
from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.files import check_adapter_name
from reftheads.graph.graph import InterventionGraph
from reftheads.reuse.facts import Facts
from reftheads.reuse.forecast import describe
from reftheads.reuse.replay import Replay
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.generate import option, real_tokens
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import Plan
from reftheads.runtime.scope import entering, scope_of
from reftheads.runtime.strengths import read_strengths

# arguments of `generate` by which it does not begin with the prompt's tokens and a cache that grows
_OTHER_WAYS = frozenset(
    "inputs inputs_embeds past_key_values assistant_model adapter_names prompt_mask position_ids".split()
)
# and its options, from wherever they come, with the values by which it does
_USUAL = {
    "num_beams": (None, 1), "num_return_sequences": (None, 1), "use_cache": (None, True),
    "cache_implementation": (None,), "prompt_lookup_num_tokens": (None,),
    "output_hidden_states": (None, False), "output_attentions": (None, False),
}  # fmt: skip


class InterventionModel(SavablePeftModel):
    """Wrap a base model with an intervention graph, as a `PeftModel`.

    The same as `peft.get_peft_model(base, InterventionConfig(graph=graph))`, with saving that is atomic
    and a few conveniences. The base model is changed in place: it gets hooks and one child module, and
    its weights are frozen.

    Args:
        model: any transformers model, quantised or not.
        graph: what to do where; or an `InterventionConfig`.
        adapter_name: the name under which the parameters are kept.

    Raises:
        ValueError: an address that the model does not have, or any other mistake in the graph.
            The base model is then as it was.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> edit = rh.Node(rh.LoReFT(rank=4), layer=3, positions="l1", name="emoji")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(edit))
        >>> model.node("emoji").R.shape
        torch.Size([4, 192])
        >>> model.print_trainable_parameters()
        trainable params: ...
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        graph: InterventionGraph | PeftConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ):
        if isinstance(model, PeftModel):
            raise ValueError("this model is a PeftModel already: add a graph to it by model.add_adapter(name, config)")
        check_adapter_name(adapter_name)
        config = _config(graph)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        super().__init__(model, config, adapter_name, **kwargs)
        self._known: Replay | None = None  # without a store
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base model's output with what was read; see `reusing` for how less of it is computed."""
        layer = self.tuner.layer
        replay = scope_of(layer).replay
        if replay is not None and not args:
            batch = dict(kwargs)
            with layer.rows_by_adapter(batch.pop("adapter_names", None)):
                output = replay(batch)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base model does; within `reusing`, what comes before all nodes is taken from the store.

        With `return_heads=True` it returns a `ModelOutput` as with `return_dict_in_generate=True`, with `predictions`
        and `selected` of all heads over the columns of `sequences`, as a call of the model gives them: one more pass,
        of which nothing above the deepest head is computed.
        """
        asked = {name: value for name, value in kwargs.items() if value is not None}
        replay = scope_of(self.tuner.layer).replay
        if replay is not None and not args and not asked.keys() & _OTHER_WAYS and "input_ids" in asked:
            base: Any = self.get_base_model()
            if all(option(base, kwargs, name) in usual for name, usual in _USUAL.items()):
                ids, mask = asked["input_ids"], asked.get("attention_mask")
                cache = replay.prefill(ids, real_tokens(base, ids, kwargs) if mask is None else mask)
                kwargs |= {} if cache is None else {"past_key_values": cache}
        return super().generate(*args, **kwargs)

    @contextmanager
    def reusing(self, replay: Replay | ActivationStore | None = None) -> Iterator[Replay]:
        """Compute in calls within the block only what the graph can change, and take the rest from a store.

        Losses and gradients are those of a plain call. The output has no logits, and the activations of the frozen
        base model are computed once for every content; see `reuse_summary` for what that spares. A call that asks
        for more, such as `output_hidden_states`, is a plain one, and so is one in a state of the model in which
        the result could differ. Before the first call, a few short rows run on both paths, once for a graph: of an
        architecture that gives something else in parts, these parts are not reused.

        Args:
            replay: where activations are kept; or what an earlier `reusing` gave; `None` records them for every
                batch anew, which still spares the backward pass and its memory outside of the cone.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        if not isinstance(replay, Replay):
            replay = self.replay(replay)
        elif not replay.facts.hold(self.get_base_model(), self.tuner.layer):  # of what this model was before
            replay = self.replay(replay.store)
        with entering(self.tuner.layer, replay=replay):
            yield replay

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the graph off within the block: the base model answers, bit for bit.

        It holds, as `torch.no_grad` does, for calls made by the thread or coroutine that entered the block. Calls of
        others, and calls that have begun before, go on as they are. A thread that is started within the block enters
        one of its own, or runs in `contextvars.copy_context()`.
        """
        with self.tuner.layer.silent():
            yield

    @contextmanager
    def at_strength(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """Let edits act more or less than they learnt to within the block: h ↦ h + s · (edit(h) − h).

        0 leaves a node out, as if it were not there, 1 is what it learnt, 2 twice as much. It holds for whose calls
        `disable_adapter` holds: those of the thread or coroutine that entered the block.

        Args:
            strengths: s by the name of a node, in every adapter that has one; or by `adapter/node`. The others keep the
                strength that they have around the block.

        Raises:
            ValueError: a name that no node has, a node that reads, or a strength that is no finite number.

        Example:
            ```python
            >>> import torch
            >>> import reftheads as rh
            >>> base, tokenizer = rh.load_base("tiny-chat")
            >>> model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), 3, name="edit")))
            >>> batch = tokenizer("Tell me about owls.", return_tensors="pt")
            >>> with model.at_strength({"edit": 0}):
            ...     without = model(**batch).logits
            >>> with model.disable_adapter():
            ...     torch.equal(without, model(**batch).logits)
            True
            ```
        """
        layer = self.tuner.layer
        changed = read_strengths(layer, strengths)
        with entering(layer, strengths={**scope_of(layer).strengths, **changed}):
            yield

    @renamed(adapter="adapter_name")
    def node(self, name: str, adapter_name: str | None = None) -> NodeModule:
        """Return the parameters of a node, by the paper's letters: `model.node("emoji").R`.

        Args:
            name: of the node.
            adapter_name: the adapter whose node it is; the (first) active one if left out.

        Raises:
            KeyError: no such node or adapter.
        """
        return self.tuner.node(name, adapter_name)

    @renamed(adapter="adapter_name")
    def plan(self, adapter_name: str | None = None) -> Plan:
        """Return the compiled graph of an adapter; of the (first) active one if left out."""
        return self.tuner.plan(adapter_name)

    @renamed(adapter="adapter_name")
    def summary(self, adapter_name: str | None = None) -> None:
        """Print a table, one line per node: what it is, where, its width, positions and number of parameters."""
        self.tuner.summary(adapter_name)

    def reuse_summary(self, batch: Mapping[str, Any] | None = None) -> str:
        """Say what `reusing` reuses in the state that the model is in, what it does not, and why.

        Args:
            batch: rows as for a call; then also the share of a plain training step's floating-point operations that
                is left, and how much has to be kept a row.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        return describe(self.replay(), [] if batch is None else [batch])

    def plan_summary(self, batch: Mapping[str, Any] | None = None) -> None:
        """Print `reuse_summary`, which replaces it."""
        deprecate("InterventionModel.plan_summary(batch)", "print(InterventionModel.reuse_summary(batch))")
        print(self.reuse_summary(batch))

    def replay(self, store: ActivationStore | None = None) -> Replay:
        """Return what computes only what the graph can change, with a store or none.

        What is found out about the base model is kept with this one, so that its weights are hashed once.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        base, known = self.get_base_model(), self._known
        if known is None or not known.facts.hold(base, self.tuner.layer):
            fingerprint = known.facts.fingerprint if known is not None and known.facts.base is base else None
            known = self._known = Replay(Facts.of(base, self.tuner.layer, fingerprint))
        return known.kept_in(store)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def add_adapter(self, adapter_name: str, peft_config: InterventionGraph | PeftConfig, **kwargs: Any) -> None:
        """Add a second graph, or a second set of parameters for the same one; `set_adapter` makes it act.

        Raises:
            ValueError: a name that is taken or unfit, or what compiling finds; the model is then as it was.

        Example:
            ```python
            >>> import reftheads as rh
            >>> base, tokenizer = rh.load_base("tiny-chat")
            >>> graph = rh.InterventionGraph.over(rh.LoReFT(rank=4), [2, 3])
            >>> model = rh.InterventionModel(base, graph, adapter_name="formal")
            >>> model.add_adapter("funny", graph)
            >>> model.set_adapter("funny")
            >>> model.active_adapters
            ['funny']
            ```
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"this model has an adapter {adapter_name!r} already: take another name, or delete it first"
            )
        super().add_adapter(adapter_name, _config(peft_config), **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its parameters.

        Raises:
            ValueError: an adapter that the model does not have, or the last one.
        """
        if list(self.peft_config) == [adapter_name]:
            raise ValueError(f"{adapter_name!r} is the last adapter: unload() gives the base model back")
        super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Switch to an adapter, or to several that act together in the order given.

        Raises:
            ValueError: an adapter that the model does not have.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names:
            raise ValueError(
                f"unknown adapter {unknown[0] if unknown else names!r}: there are {', '.join(self.peft_config)}"
            )
        self.active_adapter = names[0]
        self.tuner.set_adapter(names, inference_mode=inference_mode)


def _config(graph: InterventionGraph | PeftConfig) -> Any:
    if isinstance(graph, InterventionGraph):
        return InterventionConfig(graph=graph)
    if isinstance(graph, InterventionConfig):
        return graph
    raise ValueError(f"InterventionModel needs an InterventionGraph or InterventionConfig, got {graph!r}")

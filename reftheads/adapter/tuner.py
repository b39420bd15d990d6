"""The tuner: how PEFT puts the child module of a graph into a base model, and takes it out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from rich.table import Table
from torch import Tensor, nn

from reftheads._utils.deprecation import renamed
from reftheads._utils.packing import PACKS
from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.files import check_adapter_name
from reftheads.adapter.fit import check_beside, check_memory, check_nodes, split
from reftheads.architectures.paths import CHILD
from reftheads.graph.graph import render
from reftheads.runtime.generate import record_prompts
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import Plan, compile_graph

PREFIX = "rh_"


class InterventionTuner(BaseTuner):
    """Add one child module, `interventions`, to the base model; none of its own is replaced.

    PEFT makes it, between an `InterventionModel` and the base model: `model.tuner`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph.over(rh.LoReFT(rank=4), [2, 3]))
        >>> model.tuner.model is base, base.interventions is model.tuner.layer
        (True, True)
        >>> model.tuner.unload() is base
        True
        ```
    """

    prefix = PREFIX
    tuner_layer_cls = Interventions
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str, **kwargs: Any):
        if adapter_name in getattr(getattr(model, CHILD, None), "plans", ()):
            # before PEFT replaces the configuration of the adapter that is there
            raise ValueError(
                f"this model has an adapter {adapter_name!r} already: call unload() on the PeftModel that wraps it, or "
                "take a fresh base model"
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.training = model.training

    @property
    def layer(self) -> Interventions:
        """Return the module that holds the parameters and hooks of all adapters."""
        return getattr(self.model, CHILD)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("nodes are hooks: no module is replaced")

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Compile the adapter's graph against `model`, then make parameters and hooks.

        Raises:
            ValueError: what `compile_graph` raises, an adapter name that is taken or unfit, or parameters that are
                larger than free memory; the model is then as before.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, InterventionConfig)
        try:
            check_adapter_name(adapter_name)
            plan = compile_graph(config.graph, model)
            check_memory(plan)
            layer = getattr(model, CHILD, None) or Interventions()
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                layer.add(adapter_name, plan, model)
            layer.train(model.training)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        if getattr(model, CHILD, None) is None:
            setattr(model, CHILD, layer)
            record_prompts(model, layer)
            self._mark_only_adapters_as_trainable(model)  # once: later, what of the base is trained goes on
        # so that the base model's own save_pretrained writes the base model alone
        _not_saved(model).update(layer.state_dict(prefix=f"{CHILD}."))
        inference = config.inference_mode
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=inference)
        else:
            layer.set_requires_grad(adapter_name, False)

    def train(self, mode: bool = True) -> "InterventionTuner":
        """Set the mode, as everywhere; and, for training, keep bitsandbytes from packing 4-bit weights.

        On a CPU it packs them for inference at an evaluation, and no gradient gets through packed weights any more.
        Warns if it has packed them already.
        """
        four_bit = [module for module in self.model.modules() if hasattr(module, PACKS)] if mode else []
        for module in four_bit:
            setattr(module, PACKS, False)
        if any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in four_bit):  # type: ignore[union-attr]
            warnings.warn(
                "bitsandbytes has packed the 4-bit weights for inference on this CPU, and no gradient gets through "
                "them: load the base model again and call train() before its first use",
                stacklevel=2,
            )
        return super().train(mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: parameters have the dtype that their node names."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with self.layer.rows_by_adapter(kwargs.get("adapter_names")):
            yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "an edit of activations cannot be merged into weights. LoRA nodes can: "
            "reftheads.interop.peft_lora.merge_lora(model) merges them through PEFT"
        )

    def unload(self) -> nn.Module:
        """Return the base model, without hooks and parameters of the graph."""
        self.layer.detach()
        left_out = _not_saved(self.model)
        left_out.difference_update([name for name in left_out if name.startswith(f"{CHILD}.")])
        delattr(self.model, CHILD)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    # --- saving and loading -------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"{CHILD}.rh_nodes.{adapter_name}.", f"{CHILD}.rh_nodes.", 1)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT has dropped every key in which the name of another adapter occurs, be it the name of a node
        path, layer = _find_layer(model)
        tensors = layer.rh_nodes[adapter_name].state_dict(prefix=f"{path}.rh_nodes.{adapter_name}.")
        return {key: state_dict[key] if key in state_dict else tensor for key, tensor in tensors.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # not by way of model.state_dict(), as PEFT would: bitsandbytes changes 4-bit weights that are asked for it
        assert isinstance(config, InterventionConfig)
        path, layer = _find_layer(model)
        prefix = path.removesuffix(CHILD)
        nodes, beside = split(state_dict, prefix)
        check_nodes(nodes, dict(layer.rh_nodes[adapter_name].items()))  # type: ignore[operator]
        check_beside(beside, model.get_submodule(prefix.removesuffix(".")), config.embeddings)
        weights = {f"{path}.rh_nodes.{adapter_name}.{name}": tensor for name, tensor in nodes.items()}
        return weights | {f"{prefix}{name}": tensor for name, tensor in beside.items()}

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to mix the parameters of adapters, as PEFT does for LoRA.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "what an edit does is no linear function of its parameters (R of a LoReFT must stay orthonormal), so that "
            "their weighted sum would do something else: set_adapter([…]) lets adapters act together; adapters of LoRA "
            "nodes alone can be mixed by PEFT, from the files that reftheads.interop.to_peft_lora writes"
        )

    # --- what users ask -------------------------------------------------------------------------------------

    @renamed(adapter="adapter_name")
    def node(self, name: str, adapter_name: str | None = None) -> NodeModule:
        """Return the parameters of a node, by the paper's letters: `tuner.node("emoji").R`.

        Args:
            name: of the node.
            adapter_name: the adapter whose node it is; the (first) active one if left out.

        Raises:
            KeyError: no such node or adapter.
        """
        plan = self.plan(adapter_name)
        return self.layer.rh_nodes[adapter_name or self.active_adapters[0]][plan.graph[name].key]  # type: ignore[index,return-value]

    @renamed(adapter="adapter_name")
    def plan(self, adapter_name: str | None = None) -> Plan:
        """Return the compiled graph of an adapter; of the (first) active one if left out.

        Raises:
            KeyError: no such adapter.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.layer.plans:
            raise KeyError(f"no adapter {adapter_name!r}: there are {', '.join(self.layer.plans)}")
        return self.layer.plans[adapter_name]

    @renamed(adapter="adapter_name")
    def summary(self, adapter_name: str | None = None) -> None:
        """Print a table, one line per node: what it is, where, its width, positions and number of parameters.

        Raises:
            KeyError: no such adapter.
        """
        table = Table("node", "what", "where", "module", "width", "positions", "parameters", box=None, pad_edge=False)
        counted: set[str] = set()  # by key: nodes with the same one share their parameters
        total = 0
        for planned in self.plan(adapter_name).nodes:
            node, address = planned.node, planned.address
            count = sum(p.numel() for p in self.node(str(node.name), adapter_name).parameters())
            shared = node.key in counted
            counted.add(node.key)
            total += 0 if shared else count
            table.add_row(
                node.name, str(node.intervention), str(address.site), f"{address.module or '·'}:{address.side}",
                str(address.width), str(node.positions), f"(shared) {count:,}" if shared else f"{count:,}",
            )  # fmt: skip
        table.add_row("total", "", "", "", "", "", f"{total:,}")
        print(render(table))


def _not_saved(model: nn.Module) -> set[str]:
    """Return the names of what the `save_pretrained` of a model of transformers leaves out."""
    names = getattr(model, "_keys_to_ignore_on_save", None)
    return names if isinstance(names, set) else set()


def _find_layer(model: nn.Module) -> tuple[str, Interventions]:
    return next((path, module) for path, module in model.named_modules() if isinstance(module, Interventions))


register_peft_method(name="reftheads", config_cls=InterventionConfig, model_cls=InterventionTuner, prefix=PREFIX)

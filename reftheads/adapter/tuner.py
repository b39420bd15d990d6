"""The PEFT method: its configuration, its tuner, and their registration.

PEFT takes a method from outside by `register_peft_method`, but its `PeftType` is a closed enumeration;
`_add_peft_type` opens it for one member. That is the only step that PEFT does not offer.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import huggingface_hub
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from rich.table import Table
from torch import Tensor, nn

from reftheads.graph.graph import InterventionGraph, render
from reftheads.graph.node import check_key
from reftheads.runtime.generate import record_prompts
from reftheads.runtime.interventions import Interventions
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import Plan, compile_graph

PREFIX = "rh_"
CHILD = "interventions"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def _add_peft_type(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


REFTHEADS = _add_peft_type("REFTHEADS")


@dataclass
class InterventionConfig(PeftConfig):
    """The adapter's configuration: a graph, and what every PEFT configuration has.

    Raises:
        ValueError: no graph, or one that cannot be read.
    """

    graph: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFTHEADS
        if isinstance(self.graph, dict):
            self.graph = InterventionGraph.from_dict(self.graph)
        if not isinstance(self.graph, InterventionGraph):
            raise ValueError(f"InterventionConfig needs graph=InterventionGraph(…), got {self.graph!r}")

    def to_dict(self) -> dict[str, Any]:
        fields = {k: v for k, v in self.__dict__.items() if k != "graph"}
        return {**fields, "graph": self.graph.to_dict()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Reads `adapter_config.json`.

        Raises:
            ValueError: no such file, a damaged one, or weights beside it that would need unpickling.
        """
        path = pretrained_model_name_or_path
        try:
            config = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"the adapter_config.json of {path} is damaged ({error}): save or copy it again"
            ) from error
        refuse_pickle(path, subfolder=subfolder, **kwargs)
        return config


def has_file(model_id: str, name: str, subfolder: str | None = None, revision: str | None = None, **hub: Any) -> bool:
    """Whether a directory, or a repository of the Hub (offline: what is cached of it), holds a file."""
    path = os.path.join(subfolder, name) if subfolder else name
    if os.path.isdir(model_id):
        return os.path.exists(os.path.join(model_id, path))
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = huggingface_hub.try_to_load_from_cache(model_id, path, hub.get("cache_dir"), revision)
        return isinstance(cached, str)
    return huggingface_hub.file_exists(model_id, path, revision=revision, token=hub.get("token"))


def refuse_pickle(model_id: str, **hub: Any) -> None:
    """Raises `ValueError` where PEFT would fall back to a pickle, since there is nothing else."""
    if has_file(model_id, PICKLE, **hub) and not has_file(model_id, WEIGHTS, **hub):
        raise ValueError(
            f"{model_id} holds {PICKLE}, a pickle, which could run any code: convert it to {WEIGHTS} where you trust "
            "it (safetensors.torch.save_file)"
        )


class InterventionTuner(BaseTuner):
    """Adds one child module, `interventions`, to the base model and replaces none."""

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
        """The module that holds the parameters and hooks of all adapters."""
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
        """Compiles the adapter's graph against `model`, then makes parameters and hooks.

        Raises:
            ValueError: what `compile_graph` raises, or an adapter name that is taken or unfit; the
                model is then as before.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, InterventionConfig)
        try:
            check_key(adapter_name, "adapter name")
            plan = compile_graph(config.graph, model)
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
        # so that the base model's own save_pretrained writes the base model alone
        _not_saved(model).update(layer.state_dict(prefix=f"{CHILD}."))
        inference = config.inference_mode
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=inference)
        else:
            layer.set_requires_grad(adapter_name, False)
        self._mark_only_adapters_as_trainable(model)

    def train(self, mode: bool = True) -> "InterventionTuner":
        """As everywhere; and keeps bitsandbytes from packing 4-bit weights for inference on a CPU at an evaluation
        in between, since no gradient gets through packed weights any more. Warns if it has packed them already.
        """
        four_bit = [m for m in self.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")] if mode else []
        for module in four_bit:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in four_bit):  # type: ignore[union-attr]
            warnings.warn(
                "bitsandbytes has packed the 4-bit weights for inference on this CPU, and no gradient gets through "
                "them: load the base model again and call train() before its first use",
                stacklevel=2,
            )
        return super().train(mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: parameters have the dtype that their node names."""

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
        """The base model, without hooks and parameters of the graph."""
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
        own = layer.rh_nodes[adapter_name].state_dict(prefix=f"{path}.rh_nodes.{adapter_name}.")
        return {key: state_dict[key] if key in state_dict else tensor for key, tensor in own.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # not by way of model.state_dict(), as PEFT would: bitsandbytes changes 4-bit weights that are asked for it
        path, layer = _find_layer(model)
        nodes = layer.rh_nodes[adapter_name]
        marker = f"{CHILD}.rh_nodes."
        base = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        beside = {key: tensor for key, tensor in state_dict.items() if key in base}  # embeddings, where PEFT saves them
        given = {key.rpartition(marker)[2]: tensor for key, tensor in state_dict.items() if key not in beside}
        check_weights(given, nodes)  # type: ignore[arg-type]
        return beside | {f"{path}.rh_nodes.{adapter_name}.{key}": tensor for key, tensor in given.items()}

    # --- what users ask -------------------------------------------------------------------------------------

    def node(self, name: str, adapter: str | None = None) -> NodeModule:
        """The parameters of a node, by the paper's letters: `model.node("emoji").R`.

        Args:
            name: of the node.
            adapter: which adapter's; the (first) active one if left out.

        Raises:
            KeyError: no such node or adapter.
        """
        plan = self.plan(adapter)
        return self.layer.rh_nodes[adapter or self.active_adapters[0]][plan.graph[name].key]  # type: ignore[index,return-value]

    def plan(self, adapter: str | None = None) -> Plan:
        """The compiled graph of an adapter; of the (first) active one if left out."""
        adapter = adapter or self.active_adapters[0]
        if adapter not in self.layer.plans:
            raise KeyError(f"no adapter {adapter!r}: there are {', '.join(self.layer.plans)}")
        return self.layer.plans[adapter]

    def summary(self, adapter: str | None = None) -> None:
        """Prints a table, one line a node: what it is, where, its width, positions and number of parameters."""
        table = Table("node", "what", "where", "module", "width", "positions", "parameters", box=None, pad_edge=False)
        seen: set[str] = set()
        total = 0
        for planned in self.plan(adapter).nodes:
            node, address = planned.node, planned.address
            count = sum(p.numel() for p in self.node(str(node.name), adapter).parameters())
            shared = node.key in seen
            seen.add(node.key)
            total += 0 if shared else count
            table.add_row(
                node.name, str(node.intervention), str(address.site), f"{address.module or '·'}:{address.side}",
                str(address.width), str(node.positions), f"(shared) {count:,}" if shared else f"{count:,}",
            )  # fmt: skip
        table.add_row("total", "", "", "", "", "", f"{total:,}")
        print(render(table))


def _not_saved(model: nn.Module) -> set[str]:
    """The names of what the `save_pretrained` of a model of transformers leaves out."""
    names = getattr(model, "_keys_to_ignore_on_save", None)
    return names if isinstance(names, set) else set()


def _find_layer(model: nn.Module) -> tuple[str, Interventions]:
    return next((path, module) for path, module in model.named_modules() if isinstance(module, Interventions))


def check_weights(given: dict[str, Tensor], nodes: nn.Module) -> None:
    """Raises `ValueError` unless `given` has exactly the tensors of `nodes`, in their shapes."""
    expected = nodes.state_dict()
    problems = [f"no weights for {key!r}" for key in expected if key not in given]
    problems += [f"weights for {key!r}, which the graph does not have" for key in given if key not in expected]
    problems += [
        f"{key!r} has shape {tuple(given[key].shape)}, and this model needs {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"this checkpoint does not fit the model: {'; '.join(problems[:3])}{more}. "
            "Load it onto the model that it was trained on"
        )


register_peft_method(name="reftheads", config_cls=InterventionConfig, model_cls=InterventionTuner, prefix=PREFIX)

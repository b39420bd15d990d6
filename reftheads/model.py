"""InterventionModel: the PeftModel of a base model and a graph."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from reftheads.graph import InterventionGraph
from reftheads.nodes import NodeModule
from reftheads.plan import Plan
from reftheads.tuner import WEIGHTS, InterventionConfig, InterventionTuner, has_file, refuse_pickle

_CARD = """
## How to load

PEFT knows this type of adapter once `reftheads` has been imported:

```python
import reftheads as rh

model = rh.InterventionModel.from_pretrained(base, "path or Hub id of this adapter")
```

The intervention graph:

```
{graph}
```
"""


class InterventionModel(PeftModel):
    """A base model with an intervention graph: `InterventionModel(base, graph)`.

    The same as `peft.get_peft_model(base, InterventionConfig(graph=graph))`, with saving that is atomic
    and a few conveniences. The base model is changed in place: it gets hooks and one child module, and
    its weights are frozen.

    Args:
        model: any transformers model, quantised or not.
        graph: what to do where; or an `InterventionConfig`.
        adapter_name: under which name the parameters are kept.

    Raises:
        ValueError: an address that the model does not have, and everything else that compiling finds.
            The base model is then as it was.
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
        config = _config(graph)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        super().__init__(model, config, adapter_name, **kwargs)

    @property
    def tuner(self) -> InterventionTuner:
        """The PEFT tuner between this wrapper and the base model."""
        assert isinstance(self.base_model, InterventionTuner)
        return self.base_model

    def node(self, name: str, adapter: str | None = None) -> NodeModule:
        """The parameters of a node; see `InterventionTuner.node`."""
        return self.tuner.node(name, adapter)

    def plan(self, adapter: str | None = None) -> Plan:
        """The compiled graph of an adapter."""
        return self.tuner.plan(adapter)

    def summary(self, adapter: str | None = None) -> None:
        """Prints a table, one line a node."""
        self.tuner.summary(adapter)

    def add_adapter(self, adapter_name: str, peft_config: InterventionGraph | PeftConfig, **kwargs: Any) -> None:
        """Adds a second graph, or a set of parameters of its own for the same one."""
        super().add_adapter(adapter_name, _config(peft_config), **kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Switches to an adapter, or to several that act together in the order given.

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

    # --- saving and loading -------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Writes `adapter_config.json`, `adapter_model.safetensors` and a model card.

        All files are written beside the directory first and then moved into place one by one, the
        weights first: whenever the process is killed, what lies there is whole.

        Raises:
            ValueError: `safe_serialization=False`, which would write a pickle; positions given by a
                function, which no file can hold.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: adapters are saved as safetensors only")
        for config in self.peft_config.values():
            config.to_dict()
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file: give a directory to save into")
        push = kwargs.pop("push_to_hub", False)
        kwargs.setdefault("save_embedding_layers", False)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            if (target / "README.md").exists():
                shutil.copy(target / "README.md", folder)
            super().save_pretrained(folder, **kwargs)
            target.mkdir(exist_ok=True)
            files = sorted((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.name != WEIGHTS)
            for file in files:
                destination = target / file.relative_to(folder)
                destination.parent.mkdir(exist_ok=True)
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(file, destination)
        if push:
            self.push_to_hub(kwargs.pop("repo_id", target.name))

    def create_or_update_model_card(self, output_dir: str) -> None:
        super().create_or_update_model_card(output_dir)
        path = Path(output_dir) / "README.md"
        text = path.read_text(encoding="utf-8")
        if "## How to load" not in text:
            graphs = "\n\n".join(str(plan.graph) for plan in self.tuner.layer.plans.values())
            path.write_text(f"{text.rstrip()}\n{_CARD.format(graph=graphs)}", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> "InterventionModel":
        """Loads a saved adapter onto `model`.

        Args:
            model: the base model; a graph is compiled into it.
            model_id: a directory, or the id of a Hub repository.
            is_trainable: whether to go on training it.
            kwargs: such as `revision` or `subfolder`.

        Raises:
            ValueError: a checkpoint that would need unpickling, is truncated or damaged, or belongs to a
                model of other widths. The base model is then as it was.
        """
        model_id = os.fspath(model_id)
        config = config or InterventionConfig.from_pretrained(model_id, **kwargs)
        if not isinstance(config, InterventionConfig):
            raise ValueError(
                f"{model_id} holds a {config.peft_type} adapter, not an intervention graph: load it by peft"
            )
        config.inference_mode = not is_trainable
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loaded = cls(model, config, adapter_name)
        try:
            loaded.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        except Exception:
            loaded.tuner.unload()
            for parameter in trained:
                parameter.requires_grad = True
            raise
        return loaded

    def load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Loads the weights of a saved adapter, adding it if there is none of that name.

        Raises:
            ValueError: as in `from_pretrained`; an adapter that this call added is gone again.
        """
        model_id = os.fspath(model_id)
        refuse_pickle(model_id, **kwargs)
        if not has_file(model_id, WEIGHTS, **kwargs):
            raise ValueError(f"{model_id} holds no {WEIGHTS}: give the directory or Hub id of a saved adapter")
        new = adapter_name not in self.peft_config
        try:
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        except Exception as error:
            if new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            if type(error).__name__ == "SafetensorError":
                raise ValueError(
                    f"{os.path.join(model_id, WEIGHTS)} is truncated or damaged ({error}): save or copy it again"
                ) from error
            raise


def _config(graph: InterventionGraph | PeftConfig) -> Any:
    if isinstance(graph, InterventionGraph):
        return InterventionConfig(graph=graph)
    if isinstance(graph, InterventionConfig):
        return graph
    raise ValueError(f"InterventionModel needs an InterventionGraph or InterventionConfig, got {graph!r}")

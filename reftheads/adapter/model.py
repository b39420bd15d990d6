"""InterventionModel: the PeftModel of a base model and a graph."""

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from reftheads.adapter.tuner import CHILD, WEIGHTS, InterventionConfig, InterventionTuner, has_file, refuse_pickle
from reftheads.graph.graph import InterventionGraph
from reftheads.reuse.facts import Facts
from reftheads.reuse.forecast import describe
from reftheads.reuse.replay import Replay
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.generate import option, real_tokens
from reftheads.runtime.node_module import NodeModule
from reftheads.runtime.plan import Plan
from reftheads.runtime.scope import entering, scope_of

_CARD = """<!-- reftheads -->
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
<!-- /reftheads -->
"""


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
        self._known: Replay | None = None  # without a store
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output with what was read; see `reusing` for how less of it is computed."""
        replay = scope_of(self.tuner.layer).replay
        if replay is not None and not args:
            batch = dict(kwargs)
            with self.tuner.layer.rows_by_adapter(batch.pop("adapter_names", None)):
                output = replay(batch)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's; within `reusing`, the keys and values of what no node looks at come from the store.

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
        """Within, a call computes only what the graph can change, and takes the rest from a store.

        Losses and gradients are those of a plain call. The output has no logits, and the activations of the frozen
        base model are computed once for every content; see `plan_summary` for what that spares. A call that asks
        for more, such as `output_hidden_states`, is a plain one, and so is one in a state of the model in which
        the result could differ.

        Args:
            replay: where activations are kept; or what an earlier `reusing` gave; `None` records them for every
                batch anew, which still spares the backward pass and its memory outside of the cone.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        if not isinstance(replay, Replay):
            replay = self.replay(replay)
        with entering(self.tuner.layer, replay=replay):
            yield replay

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the base model answers, bit for bit.

        It holds, as `torch.no_grad` does, for calls made by the thread or coroutine that entered the block; calls of
        others, and calls that have begun before, go on as they are.
        """
        with self.tuner.layer.silent():
            yield

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

    def plan_summary(self, batch: Mapping[str, Any] | None = None) -> None:
        """Prints what `reusing` reuses in the state that the model is in, what it does not, and why.

        Args:
            batch: rows as for a call; then also the share of a plain training step's floating-point operations that
                is left, and how much has to be kept a row.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        print(describe(self.replay(), [] if batch is None else [batch]))

    def replay(self, store: ActivationStore | None = None) -> Replay:
        """Return what computes only what the graph can change, with a store or none.

        What is found out about the base model is kept with this one, so that its weights are hashed once.

        Raises:
            ValueError: a model in which nothing can be reused, since it has no one stack of blocks.
        """
        base, known = self.get_base_model(), self._known
        if known is None or not known.facts.hold(base):
            fingerprint = known.facts.fingerprint if known is not None and known.facts.base is base else None
            known = self._known = Replay(Facts.of(base, self.tuner.layer, fingerprint))
        return known.kept_in(store)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def add_adapter(self, adapter_name: str, peft_config: InterventionGraph | PeftConfig, **kwargs: Any) -> None:
        """Adds a second graph, or a set of parameters of its own for the same one; `set_adapter` makes it act.

        Raises:
            ValueError: a name that is taken, or what compiling finds; the model is then as it was.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"this model has an adapter {adapter_name!r} already: take another name, or delete it first"
            )
        super().add_adapter(adapter_name, _config(peft_config), **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its parameters.

        Raises:
            ValueError: an adapter that the model does not have, or the last one.
        """
        if list(self.peft_config) == [adapter_name]:
            raise ValueError(f"{adapter_name!r} is the last adapter: unload() gives the base model back")
        super().delete_adapter(adapter_name)

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

        All files are written to a temporary directory first, and moved into place when they are complete, the
        weights first: a process that is killed while it saves the same graph again leaves the old weights or the
        new ones.

        Args:
            kwargs: as for PEFT, such as `selected_adapters`; and `push_to_hub=True` with `repo_id`, `token`, `private`.

        Raises:
            ValueError: `safe_serialization=False`, which would write a pickle; positions given by a
                function, which no file can hold.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: adapters are saved as safetensors only")
        for name in kwargs.get("selected_adapters") or self.peft_config:
            if name in self.peft_config:
                self.peft_config[name].to_dict()
        target = Path(os.path.realpath(save_directory))
        if target.is_file():
            raise ValueError(f"{target} is a file: give a directory to save into")
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in ("repo_id", "token", "private") if name in kwargs}
        kwargs.setdefault("save_embedding_layers", False)
        # the whole state is not needed, and bitsandbytes changes 4-bit weights that are asked for theirs
        if kwargs.get("state_dict") is None and not kwargs["save_embedding_layers"]:
            kwargs["state_dict"] = self.tuner.layer.state_dict(prefix=f"base_model.model.{CHILD}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if target.is_dir() else target.parent  # on one file system with the target in any case
        prefix = f".{target.name}.saving-"
        _remove_abandoned(place, prefix)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
            if (target / "README.md").exists():
                shutil.copy(target / "README.md", folder)
            super().save_pretrained(folder, **kwargs)
            files = sorted((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.name != WEIGHTS)
            for file in files:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            for file in files:
                destination = target / file.relative_to(folder)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, destination)
        if push:
            self.push_to_hub(hub.pop("repo_id", target.name), **hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload adapter",
        **kwargs: Any,
    ) -> Any:
        """Uploads what `save_pretrained` writes; a model card that is there already is kept and completed.

        Args:
            repo_id: of the repository, which is made if there is none.
            kwargs: go to `save_pretrained`.
        """
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "adapter")
            if api.file_exists(repo_id, "README.md", revision=revision):
                folder.mkdir()
                shutil.copy(api.hf_hub_download(repo_id, "README.md", revision=revision), folder)
            self.save_pretrained(folder, **kwargs)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card, with a section on how to load this adapter and its graph, written anew at every save."""
        super().create_or_update_model_card(output_dir)
        path = Path(output_dir) / "README.md"
        text = path.read_text(encoding="utf-8").rstrip() + "\n"
        before, _, rest = text.partition("<!-- reftheads -->\n")
        after = rest.partition("<!-- /reftheads -->\n")[2]
        graphs = "\n\n".join(str(plan.graph) for plan in self.tuner.layer.plans.values())
        path.write_text(f"{before.rstrip()}\n\n{_CARD.format(graph=graphs)}{after}", encoding="utf-8")

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
        config = config or _read_config(model_id, **kwargs)
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
        new = adapter_name not in self.peft_config
        if new:
            _read_config(model_id, **kwargs)
        refuse_pickle(model_id, **kwargs)
        if not has_file(model_id, WEIGHTS, **kwargs):
            raise ValueError(f"{model_id} holds no {WEIGHTS}: give the directory or Hub id of a saved adapter")
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


def _remove_abandoned(place: Path, prefix: str) -> None:
    """Removes what saves that were killed at least an hour ago have left."""
    for folder in place.glob(f"{glob.escape(prefix)}*"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _read_config(model_id: str, **kwargs: Any) -> InterventionConfig:
    config = InterventionConfig.from_pretrained(model_id, **kwargs)
    if not isinstance(config, InterventionConfig):
        raise ValueError(
            f"{model_id} holds a {PeftType(config.peft_type).value} adapter, not an intervention graph: load it by peft"
        )
    return config


def _config(graph: InterventionGraph | PeftConfig) -> Any:
    if isinstance(graph, InterventionGraph):
        return InterventionConfig(graph=graph)
    if isinstance(graph, InterventionConfig):
        return graph
    raise ValueError(f"InterventionModel needs an InterventionGraph or InterventionConfig, got {graph!r}")

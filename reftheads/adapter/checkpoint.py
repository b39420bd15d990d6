"""A `PeftModel` that is saved as a whole or not at all, and never read from a pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from peft import PeftConfig, PeftModel
from torch import nn

from reftheads._utils.atomic import filling
from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.embeddings import embeddings_of, tell_of_trained_base, with_embeddings
from reftheads.adapter.files import (
    CARD,
    CONFIG,
    WEIGHTS,
    check_adapter_name,
    check_seal,
    find_file,
    refuse_pickle,
)
from reftheads.adapter.fit import check_file
from reftheads.adapter.tuner import InterventionTuner
from reftheads.architectures.paths import CHILD
from reftheads.runtime.plan import compile_graph

if TYPE_CHECKING:
    from typing_extensions import Self

_BEGIN, _END = "<!-- reftheads -->\n", "<!-- /reftheads -->\n"
_SECTION = """## How to load

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


class SavablePeftModel(PeftModel):
    """Save and load adapters, here and on the Hub, with a model card: the part of `InterventionModel` about files."""

    @property
    def tuner(self) -> InterventionTuner:
        """Return PEFT's tuner between this wrapper and the base model."""
        assert isinstance(self.base_model, InterventionTuner)
        return self.base_model

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and a model card.

        All files are moved into place once they are complete, the weights first: a process that is killed while it
        saves the same graph again leaves the old weights or the new ones. Killed while it saves another graph, it may
        leave weights that do not belong to the configuration: loading says so.

        Embeddings come with the adapter if they were resized, or are all of the base model that is trained. A warning
        names what of it is trained and not saved here.

        Args:
            save_directory: is made if there is none; other files in it are left alone.
            kwargs: as for PEFT, such as `selected_adapters`, or `save_embedding_layers=True` or `False`; and
                `push_to_hub=True` with `repo_id`, `token`, `private`.

        Raises:
            ValueError: `safe_serialization=False`, which would write a pickle; positions given by a
                function, which no file can hold; a directory that is a file. Nothing is written then.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: adapters are saved as safetensors only")
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in ("repo_id", "token", "private") if name in kwargs}
        base = self.get_base_model()
        kwargs["save_embedding_layers"] = beside = with_embeddings(base, kwargs.get("save_embedding_layers"))
        # the whole state is not needed, and bitsandbytes changes 4-bit weights that are asked for theirs
        if kwargs.get("state_dict") is None:
            state = {f"base_model.model.{name}": t for name, t in (embeddings_of(base) if beside else {}).items()}
            kwargs["state_dict"] = state | self.tuner.layer.state_dict(prefix=f"base_model.model.{CHILD}.")
        for name in kwargs.get("selected_adapters") or self.peft_config:
            if name in self.peft_config:
                self.peft_config[name].to_dict()  # raises before anything is written
        with filling(save_directory, first=(WEIGHTS,)) as folder:
            card = Path(save_directory, CARD)
            if card.exists():
                shutil.copy(card, folder)
            super().save_pretrained(str(folder), **kwargs)
        if push:
            name = os.path.basename(os.path.realpath(save_directory))
            self.push_to_hub(hub.pop("repo_id", name), **hub, **kwargs)

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
        """Upload what `save_pretrained` writes; a model card that is there already is kept and completed.

        Args:
            repo_id: of the repository, which is made if there is none.
            token, private, revision, create_pr, commit_message: as for `huggingface_hub.HfApi`.
            kwargs: for `save_pretrained`.
        """
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "adapter")
            if api.file_exists(repo_id, CARD, revision=revision):
                folder.mkdir()
                shutil.copy(api.hf_hub_download(repo_id, CARD, revision=revision), folder)
            self.save_pretrained(folder, **kwargs)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write PEFT's card, and in it a section on how to load this adapter, with its graph, new at every save."""
        super().create_or_update_model_card(output_dir)
        path = Path(output_dir, CARD)
        text = path.read_text(encoding="utf-8").rstrip() + "\n"
        before, _, rest = text.partition(_BEGIN)
        _, _, after = rest.partition(_END)
        section = _SECTION.format(graph="\n\n".join(str(plan.graph) for plan in self.tuner.layer.plans.values()))
        path.write_text(f"{before.rstrip()}\n\n{_BEGIN}{section}{_END}{after}", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved adapter onto `model`.

        Args:
            model: the base model; a graph is compiled into it.
            model_id: a directory, or the id of a Hub repository.
            is_trainable: whether its training goes on.
            kwargs: such as `revision` or `subfolder`.

        Raises:
            ValueError: a checkpoint that would need unpickling, is truncated, damaged or a mixture of two saves,
                belongs to a model of other widths, or brings weights of the base model other than embeddings that
                its configuration names. The base model is then as it was.

        Example:
            ```python
            >>> import tempfile
            >>> import reftheads as rh
            >>> base, tokenizer = rh.load_base("tiny-chat")
            >>> graph = rh.InterventionGraph.over(rh.LoReFT(rank=4), [2, 3])
            >>> model = rh.InterventionModel(base, graph)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     again = rh.InterventionModel.from_pretrained(model.unload(), folder)
            >>> again.plan().graph == graph
            True
            ```
        """
        model_id = os.fspath(model_id)
        check_adapter_name(adapter_name)
        config = config or InterventionConfig.from_pretrained(model_id, **kwargs)
        config.inference_mode = not is_trainable
        _check_weights(model_id, config, model, **kwargs)
        tell_of_trained_base(model_id, model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loaded = cls(model, config, adapter_name)
        try:
            loaded.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        except Exception:
            loaded.tuner.unload()
            for parameter in trainable:
                parameter.requires_grad = True
            raise
        return loaded

    def load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Load the weights of a saved adapter, and add it if there is none of that name.

        Raises:
            ValueError: as in `from_pretrained`; an adapter that this call added is gone again.
        """
        check_adapter_name(adapter_name)
        model_id, present = os.fspath(model_id), self.peft_config.get(adapter_name)
        config: Any = present or InterventionConfig.from_pretrained(model_id, **kwargs)
        before = config.embeddings
        try:
            if present is not None:  # else what reads the configuration has looked at the weights
                check_seal(_weights(model_id, **kwargs))
                config.embeddings = _announced(model_id, **kwargs)
            _check_weights(model_id, config, self.get_base_model(), **kwargs)
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        except Exception:
            config.embeddings = before
            if present is None and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise


def _announced(model_id: str, **hub: Any) -> list[str] | None:
    """Return the embeddings that a saved adapter says it brings."""
    file = find_file(model_id, CONFIG, **hub)
    return None if file is None else InterventionConfig.from_json_file(file).get("embeddings")


def _weights(model_id: str, **hub: Any) -> str:
    """Return the path of a saved adapter's weights. Raise `ValueError` where there are none but a pickle."""
    refuse_pickle(model_id, **hub)
    path = find_file(model_id, WEIGHTS, **hub)
    if path is None:
        raise ValueError(f"{model_id} holds no {WEIGHTS}: give the directory or Hub id of a saved adapter")
    return path


def _check_weights(model_id: str, config: Any, base: nn.Module, **hub: Any) -> None:
    """Raise `ValueError` for weights that are not there, or do not fit the graph in this base model."""
    check_file(_weights(model_id, **hub), compile_graph(config.graph, base), base, config.embeddings)

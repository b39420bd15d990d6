"""A saved adapter: `adapter_config.json`, `adapter_model.safetensors` and a model card. Never a pickle.

`write` and `push` are what `InterventionModel.save_pretrained` and `push_to_hub` do; the other functions say whether
what is to be loaded can be.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from reftheads._utils.atomic import filling
from reftheads.graph.graph import InterventionGraph

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CARD = "README.md"

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


# --- saving -----------------------------------------------------------------------------------------------


def write(model: PeftModel, directory: str | os.PathLike, **kwargs: Any) -> None:
    """Write what PEFT writes of a model, as a whole: the weights first, and a card that is there is kept.

    Args:
        model: whose adapters are written.
        directory: is made if there is none; other files in it are left alone.
        kwargs: go to `PeftModel.save_pretrained`.

    Raises:
        ValueError: an adapter whose graph no file can hold, or a directory that is a file. Nothing is written then.
    """
    for name in kwargs.get("selected_adapters") or model.peft_config:
        if name in model.peft_config:
            model.peft_config[name].to_dict()
    with filling(directory, first=(WEIGHTS,)) as folder:
        card = Path(directory, CARD)
        if card.exists():
            shutil.copy(card, folder)
        PeftModel.save_pretrained(model, str(folder), **kwargs)


def push(
    model: PeftModel,
    repo_id: str,
    *,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    **kwargs: Any,
) -> huggingface_hub.CommitInfo:
    """Upload what `model.save_pretrained(folder, **kwargs)` writes; a card that is on the Hub is kept and completed."""
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "adapter")
        if api.file_exists(repo_id, CARD, revision=revision):
            folder.mkdir()
            shutil.copy(api.hf_hub_download(repo_id, CARD, revision=revision), folder)
        model.save_pretrained(str(folder), **kwargs)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def complete_card(directory: str | os.PathLike, graphs: Iterable[InterventionGraph]) -> None:
    """Add a section on how to load the adapter, with its graphs, to a model card; or write that section anew."""
    path = Path(directory, CARD)
    text = path.read_text(encoding="utf-8").rstrip() + "\n"
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    section = _SECTION.format(graph="\n\n".join(map(str, graphs)))
    path.write_text(f"{before.rstrip()}\n\n{_BEGIN}{section}{_END}{after}", encoding="utf-8")


# --- loading ----------------------------------------------------------------------------------------------


def has_file(model_id: str, name: str, subfolder: str | None = None, revision: str | None = None, **hub: Any) -> bool:
    """Return whether a directory, or a repository of the Hub (offline: what is cached of it), holds a file."""
    path = os.path.join(subfolder, name) if subfolder else name
    if os.path.isdir(model_id):
        return os.path.exists(os.path.join(model_id, path))
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = huggingface_hub.try_to_load_from_cache(model_id, path, hub.get("cache_dir"), revision)
        return isinstance(cached, str)
    return huggingface_hub.file_exists(model_id, path, revision=revision, token=hub.get("token"))


def refuse_pickle(model_id: str, **hub: Any) -> None:
    """Raise `ValueError` where PEFT would fall back to a pickle, since there is nothing else."""
    if has_file(model_id, PICKLE, **hub) and not has_file(model_id, WEIGHTS, **hub):
        raise ValueError(
            f"{model_id} holds {PICKLE}, a pickle, which could run any code: convert it to {WEIGHTS} where you trust "
            "it (safetensors.torch.save_file)"
        )


@contextmanager
def reading_weights(model_id: str, **hub: Any) -> Iterator[None]:
    """Make sure that there are weights in safetensors, and say so where the block finds them damaged.

    Raises:
        ValueError: a pickle, no weights, or weights that are truncated or damaged.
    """
    refuse_pickle(model_id, **hub)
    if not has_file(model_id, WEIGHTS, **hub):
        raise ValueError(f"{model_id} holds no {WEIGHTS}: give the directory or Hub id of a saved adapter")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{os.path.join(model_id, WEIGHTS)} is truncated or damaged ({error}): save or copy it again"
        ) from error


def check_weights(weights: Mapping[str, Tensor], nodes: nn.Module) -> None:
    """Raise `ValueError` unless `weights` are exactly the tensors of `nodes`, in their shapes."""
    expected = nodes.state_dict()
    problems = [f"no weights for {key!r}" for key in expected if key not in weights]
    problems += [f"weights for {key!r}, which the graph does not have" for key in weights if key not in expected]
    problems += [
        f"{key!r} has shape {tuple(weights[key].shape)}, and this model needs {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"this checkpoint does not fit the model: {'; '.join(problems[:3])}{more}. "
            "Load it onto the model that it was trained on"
        )

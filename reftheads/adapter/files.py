"""The files of a saved adapter: which there are, whether they may be read, and whether they fit."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import huggingface_hub
from safetensors import SafetensorError
from torch import Tensor, nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # which is never read
CARD = "README.md"


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

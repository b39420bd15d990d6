"""What of the base model is saved with an adapter: embeddings that were resized or trained, and nothing else."""

import os
import warnings
from contextlib import suppress
from typing import Any

import huggingface_hub
from torch import Tensor, nn
from transformers import PretrainedConfig

from reftheads.architectures.paths import CHILD


def embeddings_of(base: Any) -> dict[str, Tensor]:
    """Return the tensors of a base model's input and output embeddings by name; none, where it cannot say which."""
    modules = []
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # of no language model
            modules.append(getattr(base, f"get_{side}_embeddings")())
    paths = [path for path, module in base.named_modules() if any(module is one for one in modules)]
    return {
        f"{path}.{name}": tensor for path in paths for name, tensor in base.get_submodule(path).state_dict().items()
    }


def with_embeddings(base: Any, asked: bool | str | None) -> bool:
    """Return whether a base model's embeddings are saved with an adapter; warn of what is trained and is not saved."""
    embeddings = dict.fromkeys(embeddings_of(base))
    trained = [name for name, p in base.named_parameters() if p.requires_grad and not name.startswith(f"{CHILD}.")]
    changed = _resized(base) or (bool(trained) and all(name in embeddings for name in trained))
    saved = changed if asked in (None, "auto") else bool(asked)
    left = [name for name in trained if not (saved and name in embeddings)]
    left += [*embeddings] if changed and not saved and not left else []
    if left:
        warnings.warn(
            f"the base model has weights that were trained or resized, {left[0]} among them, and that the adapter does "
            "not hold: save them too, by model.get_base_model().save_pretrained(…)",
            stacklevel=3,
        )
    return saved


def _resized(base: Any) -> bool:
    """Return whether a base model has another number of tokens than where it came from, as far as is known here."""
    config, name = getattr(base, "config", None), base.__dict__.get("name_or_path")
    if not isinstance(config, PretrainedConfig) or not name:
        return False
    with suppress(OSError, ValueError):  # no id of the Hub, or a configuration that cannot be read
        path: Any = os.path.join(name, "config.json")
        if not os.path.isdir(name):
            commit = getattr(config, "_commit_hash", None)
            path = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=commit)
        if isinstance(path, str) and os.path.exists(path):
            first = type(config).from_pretrained(path)
            sizes = [getattr(one.get_text_config(), "vocab_size", None) for one in (first, config)]
            return sizes[0] != sizes[1]
    return False


def tell_of_trained_base(model_id: str, base: nn.Module) -> None:
    """Warn of a checkpoint with weights of the base model that this one was not loaded from."""
    folder = os.path.join(model_id, "base")
    if os.path.exists(os.path.join(folder, "config.json")) and base.__dict__.get("name_or_path") != folder:
        warnings.warn(
            f"{model_id} holds weights of the base model too, which were trained with the adapter: load the base model "
            f"from {folder}",
            stacklevel=3,
        )

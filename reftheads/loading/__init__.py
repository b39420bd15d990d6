"""A base model and its tokenizer: the embedded toy, a small chat model, a local folder, a Hub id or a GGUF file."""

from reftheads.loading.base import load_base

__all__ = ["load_base"]

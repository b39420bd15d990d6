"""A base model and its tokenizer: the embedded toy, a local folder or a Hub id, quantised if wanted."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

EMBEDDED = {"tiny-chat": Path(__file__).parent / "tiny_chat"}


def load_base(
    name: str = "tiny-chat",
    *,
    bits: int | None = None,
    auto_class: Any = None,
    dtype: str | torch.dtype | None = None,
    dropout: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, in evaluation mode, and its tokenizer.

    A tokenizer without a pad token gets its EOS token as one, which is safe where lengths come from the
    `attention_mask`, as everywhere here. The tokenizer of a decoder pads at the left, as generation needs it.

    Args:
        name: "tiny-chat", the toy chat model that comes with the package; or a local path or Hub id.
        bits: 4 (nf4, double quantisation) or 8, by bitsandbytes; `None` leaves the weights as they are.
        auto_class: such as `AutoModelForSequenceClassification`; left out, the checkpoint's own kind:
            a language model if it is one, else the bare encoder.
        dtype: of the weights; left out, float32 for the embedded model and the checkpoint's own for others.
        dropout: `False` sets every dropout probability of the model's configuration to 0. A base model whose dropout
            is active while its adapter is trained computes something new in every step, so that nothing of it can
            be reused.
        kwargs: go to `from_pretrained`, such as `device_map` or `revision`.

    Raises:
        ValueError: bits other than 4 and 8, or bits together with a `quantization_config`.
        OSError: transformers finds no model of that name.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> type(base).__name__, tokenizer.padding_side
        ('LlamaForCausalLM', 'left')
        ```
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"bits must be 4, 8 or None, got {bits!r}")
    if bits is not None and kwargs.get("quantization_config") is not None:
        raise ValueError(f"bits={bits} makes a quantization_config of its own: give one of the two")
    path = str(EMBEDDED.get(name, name))
    if bits is not None:
        kwargs["quantization_config"] = _quantisation(bits)
    if dtype is None:
        dtype = "float32" if name in EMBEDDED else "auto"
    where = {name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in kwargs}
    if not dropout:
        kwargs["config"] = _without_dropout(kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **where))
    model = (auto_class or _auto_class(path, **where)).from_pretrained(path, dtype=dtype, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not model.config.is_encoder_decoder and model.can_generate():
        tokenizer.padding_side = "left"
    return model, tokenizer


def _without_dropout(config: Any) -> Any:
    """Set every probability of dropout in a configuration to 0."""
    for name in config.to_dict():
        drops = "drop" in name or name == "jitter_noise"
        if drops and isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    return config


def _quantisation(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _auto_class(path: str, **where: Any) -> Any:
    """Return the class of transformers for what a checkpoint holds: a language model, or the bare body."""
    config = AutoConfig.from_pretrained(path, **where)
    kinds = config.architectures or []
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return AutoModelForCausalLM
    if config.is_encoder_decoder and any(kind.endswith("ForConditionalGeneration") for kind in kinds):
        return AutoModelForSeq2SeqLM
    return AutoModel

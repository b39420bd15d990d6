"""A base model and its tokenizer: the embedded toy, a local folder or a Hub id, quantised if wanted."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

EMBEDDED = {"tiny-chat": Path(__file__).parent / "tiny_chat"}
# options of `from_pretrained` that say where files are, and so hold for configuration, model and tokenizer
_WHERE = "revision subfolder token cache_dir local_files_only force_download proxies code_revision".split()


@torch.inference_mode(False)  # through what is loaded within it no gradient would pass
def load_base(
    name: str = "tiny-chat",
    *,
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

    Args:
        name: "tiny-chat", the toy chat model that comes with the package; or a local path or Hub id.
        bits: 4 (nf4, double quantisation) or 8, by bitsandbytes; `None` leaves the weights as they are.
        auto_class: such as `AutoModelForSequenceClassification`; left out, the checkpoint's own kind: the class that
            generates if it is one, of text, images or sounds, else the bare body.
        dtype: of the weights; left out, float32 for the embedded model and the checkpoint's own for others.
        dropout: `False` sets every dropout probability of the model's configuration to 0. A base model whose dropout
            is active while its adapter is trained computes something new in every step, so that nothing of it can
            be reused.
        trust_remote_code: whether Python code that comes with the checkpoint may run, for its configuration, model and
            tokenizer. Without it none runs, and nobody is asked.
        kwargs: go to `from_pretrained`, such as `device_map` or `revision`.

    Returns:
        The model and its tokenizer; `None` in its place where a model of images or sounds has none.

    Raises:
        ValueError: bits other than 4 and 8, or bits together with a `quantization_config`; a checkpoint that needs code
            of its own, without `trust_remote_code=True`.
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
    where: dict[str, Any] = {name: kwargs[name] for name in _WHERE if name in kwargs}
    where["trust_remote_code"] = trust_remote_code
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **where)
    if not dropout:
        _drop_nothing(config)
    model_class = auto_class or _model_class(config, trust_remote_code)
    kwargs |= {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    model = model_class.from_pretrained(path, **kwargs).eval()
    tokenizer = _tokenizer(path, model, where)
    if tokenizer is None:
        return model, None  # type: ignore[return-value]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not model.config.is_encoder_decoder and model.can_generate():
        tokenizer.padding_side = "left"
    return model, tokenizer


def _tokenizer(path: str, model: PreTrainedModel, where: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(path, **where)
    except (OSError, TypeError, ValueError):  # by the kind of tokenizer that has no files
        if model.main_input_name == "input_ids":
            raise
        return None


def _drop_nothing(config: PretrainedConfig) -> None:
    """Set every probability of dropout in a configuration, and in those that it is made of, to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _drop_nothing(value)
        elif isinstance(value, float) and ("drop" in name or name == "jitter_noise"):
            setattr(config, name, 0.0)


def _quantisation(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _model_class(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Return the class, or Auto class, for what a checkpoint holds: what generates, or the bare body."""
    kinds = config.architectures or []
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        mapped = [cls for cls in (*_GENERATING, AutoModel) if cls.__name__ in auto_map]
        if mapped:
            return mapped[0]
    for kind in kinds:
        native = getattr(transformers, kind, None) if kind in dir(transformers) else None
        if isinstance(native, type) and issubclass(native, PreTrainedModel) and native.config_class is type(config):
            return native if native.can_generate() or kind.endswith("Model") else AutoModel
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return AutoModelForCausalLM
    if any(kind.endswith("ForConditionalGeneration") for kind in kinds):
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForImageTextToText
    return AutoModel


_GENERATING = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)

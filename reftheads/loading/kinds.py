"""What a checkpoint's configuration says about its model: the class, quantisation, dropout."""

from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)


def model_class(config: PretrainedConfig, trust_remote_code: bool) -> Any:
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


def quantisation(bits: int) -> BitsAndBytesConfig:
    """Return the configuration of bitsandbytes for 4 bits (nf4, double quantisation) or 8."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def drop_nothing(config: PretrainedConfig) -> None:
    """Set every probability of dropout in a configuration, and in those that it is made of, to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            drop_nothing(value)
        elif isinstance(value, float) and ("drop" in name or name == "jitter_noise"):
            setattr(config, name, 0.0)


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this machine has instructions for it, else float32.

    On a CPU without them bfloat16 is two to four times slower than float32, with them up to two times faster.
    """
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for them yet
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return torch.bfloat16 if fast else torch.float32

"""Reading a GGUF file, the format of llama.cpp, as a checkpoint of transformers."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reftheads.loading.kinds import model_class

# ways to cut a text into words that first set every digit apart, a step that transformers leaves out
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


@dataclass(frozen=True)
class GGUF:
    """A GGUF file that can be read, and what it says of its model."""

    file: Path
    config: PretrainedConfig
    words: str | None
    """The name of the way in which its tokenizer cuts a text into words, if it does."""


def open_gguf(file: Path) -> GGUF:
    """Read what a GGUF file says, or raise an error that says what to do.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: no GGUF file, a damaged one, or one of an architecture that transformers does not read.
    """
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start != b"GGUF":
        raise ValueError(f"{file} is no GGUF file, since it begins with {start!r}: give one in the format of llama.cpp")
    if find_spec("gguf") is None:
        raise ImportError(f"the package gguf is needed to read {file}: run `pip install gguf`")
    fields = _fields(file)
    architecture = fields.get("general.architecture")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is a model of the architecture {architecture!r}, which transformers {transformers.__version__} "
            "does not read from GGUF files: load the checkpoint that it was made from"
        ) from error
    return GGUF(file, config, fields.get("tokenizer.ggml.pre"))


def convert_gguf(opened: GGUF, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder, as `from_pretrained` takes them.

    The weights lose nothing: those that the file holds quantised become the float32 numbers that they stand for.

    Raises:
        ValueError: a file without all the tensors of its model, or without its tokenizer.
    """
    tokenizer = _tokenizer(opened)
    _savable(_model(opened)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fields(file: Path) -> dict[str, Any]:
    """Return the short fields of a GGUF file, of which all tensors must be there."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        return {
            name: reader.fields[name].contents()
            for name in ("general.architecture", "tokenizer.ggml.pre")
            if name in reader.fields
        }
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(
            f"{file} cannot be read to its end ({file.stat().st_size:,} bytes): it is damaged, or was not downloaded "
            f"completely; get it again ({error})"
        ) from error


def _model(opened: GGUF) -> PreTrainedModel:
    file, config = opened.file, opened.config
    if config.architectures:
        cls = model_class(config, False)
    elif type(config) in AutoModelForCausalLM._model_mapping:
        cls = AutoModelForCausalLM
    else:
        cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel
    options: dict[str, Any] = {"config": config, "gguf_file": file.name, "output_loading_info": True}
    options["dtype"] = torch.float32  # which holds what blocks, float16 and bfloat16 stand for
    if hasattr(transformers, "GgufConfig"):  # older releases never keep the weights in the file's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = cls.from_pretrained(file.parent, **options)  # type: ignore[misc]
    if info["missing_keys"]:
        raise ValueError(f"{file} lacks tensors of its model: {', '.join(sorted(info['missing_keys'])[:5])}")
    return model


def _savable(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights that may be saved: transformers saves none that was read from a GGUF."""
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _tokenizer(opened: GGUF) -> PreTrainedTokenizerBase:
    file, context = opened.file, getattr(opened.config, "max_position_embeddings", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} has no tokenizer that transformers can read: {error}") from error
    if opened.words in _DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if context is not None:
        tokenizer.model_max_length = context
    return tokenizer

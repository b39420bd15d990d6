"""Small inputs for a model, made of what its configuration says: token ids, an image, a sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftheads.architectures.paths import arguments

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_IMAGES, _SOUNDS = ("pixel_values",), ("input_features", "input_values")
_BINS = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
_FRAMES, _SAMPLES = 48, 4000  # of audio features, and of audio, where the configuration does not say

Inputs = dict[str, Any]


def samples(model: nn.Module, ids: Int[Tensor, "rows tokens"], answer: Int[Tensor, "rows tokens"]) -> Iterator[Inputs]:
    """Yield inputs that a model may run on, the likeliest first.

    Args:
        ids: numbers of tokens, from 0, that are to be different tokens of the vocabulary.
        answer: the same for the decoder of an encoder-decoder model.
    """
    takes = set(arguments(model))
    config = getattr(model, "config", None)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in takes
    plain: Inputs = {"use_cache": False} if takes & {"use_cache", "kwargs"} else {}
    if seq2seq:
        plain["decoder_input_ids"] = _tokens(model, answer)
    text: Inputs = {"input_ids": _tokens(model, ids)} if "input_ids" in takes else {}
    texts = [text] if text else []
    if text and "bbox" in takes:  # where on a page each token stands, which some count in whole numbers
        place = torch.zeros(*ids.shape, 4, device=device_of(model))
        texts = [text | {"bbox": place.long()}, text | {"bbox": place.to(_dtype(model))}]
    rows = len(ids)
    other = 1 if seq2seq else 2  # the row that has another image: not the one whose text or answer must stand out
    images = {name: _image(model, rows, other) for name in _IMAGES if name in takes}
    sounds = [{name: sound} for name in _SOUNDS if name in takes for sound in _sounds(model, name, rows)]
    for text in texts:
        yield plain | text
        if "attention_mask" in takes:
            yield plain | text | {"attention_mask": torch.ones_like(text["input_ids"])}
    for text in texts:
        if images:
            yield plain | text | images
        for sound in sounds:
            yield plain | text | sound
    if images:
        yield plain | images
    for sound in sounds:
        yield plain | sound
    if "inputs_embeds" in takes and not text:
        yield plain | {"inputs_embeds": _vectors(model, ids)}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its input."""
    hook = getattr(model, "_hf_hook", None)  # of accelerate: weights come from elsewhere when they are needed
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _tokens(model: nn.Module, numbers: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """Return token ids, a different one for each number, none of them special."""
    config: Any = getattr(model, "config", None)
    special = set() if config is None else set(special_tokens(config.to_dict()))
    usual = [token for token in range(4, min(_vocabulary(model), 1000)) if token not in special]
    spread = max(len(usual) // (int(numbers.max()) + 1), 1)  # not all of one neighbourhood
    table = torch.tensor(usual[::spread] or [0])
    return table[numbers % len(table)].to(device_of(model))


def _vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model knows."""
    config: Any = getattr(model, "config", None)
    texts = [config]
    if hasattr(config, "get_text_config"):  # an encoder and a decoder may know different ones
        texts = [config.get_text_config(decoder=True), config.get_text_config(encoder=True), config]
    sizes = [getattr(text, "vocab_size", None) for text in texts]
    known = [size for size in sizes if isinstance(size, int)]
    if known:
        return min(known)
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, default=100)


def special_tokens(settings: Any, name: str = "") -> Iterator[int]:
    """Yield the ids of all tokens that a configuration, as a dictionary, names."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from special_tokens(value, str(key))
    elif name.endswith(("token_id", "token_index", "token_ids")):
        values = settings if isinstance(settings, list | tuple) else [settings]
        yield from (value for value in values if isinstance(value, int))


def _image(model: nn.Module, rows: int, other: int) -> Float[Tensor, "rows channels height width"]:
    """Return one random image for all rows but one, whose image differs from it in the last corner."""
    config: Any = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 32
    if isinstance(size, dict):
        size = (size.get("height", 32), size.get("width", 32))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    images = torch.randn(1, channels, height, width).repeat(rows, 1, 1, 1)
    images[other, :, -1, -1] += 1
    return images.to(device_of(model), _dtype(model))


def _sounds(model: nn.Module, name: str, rows: int) -> Iterator[Tensor]:
    """Yield random sounds, or features of them, in the shapes that are usual."""
    config: Any = getattr(model, "config", None)
    device, dtype = device_of(model), _dtype(model)
    if name == "input_values":
        yield torch.randn(1, _SAMPLES).repeat(rows, 1).to(device, dtype)
    said = [(part, getattr(part, name, None)) for part in _parts(config) for name in _BINS]
    audio, bins = next(((part, value) for part, value in said if isinstance(value, int) and value), (config, 80))
    positions = getattr(audio, "max_source_positions", None)
    frames = 2 * positions if isinstance(positions, int) and positions <= 1500 else _FRAMES
    features = torch.randn(1, bins, frames).repeat(rows, 1, 1).to(device, dtype)
    yield features
    yield features.transpose(1, 2)
    yield features.transpose(1, 2)[:, None]


def _parts(config: Any) -> Iterator[Any]:
    """Yield the configuration of a sound's encoder where it is known by name, then the whole one and its parts."""
    if config is None:
        return
    names = ("audio_config", *config.sub_configs) if hasattr(config, "sub_configs") else ("audio_config",)
    parts = {name: getattr(config, name, None) for name in names}
    yield from (part for part in (parts.pop("audio_config"), config, *parts.values()) if part is not None)


def _vectors(model: nn.Module, numbers: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens width"]:
    """Return random embeddings, one for each number."""
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 1)
    table = torch.randn(int(numbers.max()) + 1, width)
    return table[numbers].to(device_of(model), _dtype(model))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

"""Tiny random models of every type, and batches for them."""

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as mappings

from census.shrinking import VOCAB, WORDS, parts, tiny

GROUPS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "encoder": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "classifier": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "vision": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "multimodal": ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "audio": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
}
"""Group of the census -> the class that builds its models, and the table of transformers with its types."""

CLASSES = {
    "evolla": "EvollaForProteinText2Text",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Types that the class of their group does not build of the configuration -> the class that does."""

ROWS = (12, 9)
"""Tokens of the rows of a ragged batch; padding is shorter than any window."""
PROMPTS = (8, 6)
"""Tokens of the prompt of each row, where the rest is the answer."""


@dataclass(frozen=True)
class Species:
    """Name one entry of the census: a group and a model type of it."""

    group: str
    model_type: str

    def __str__(self) -> str:
        return f"{self.group}/{self.model_type}"


def everything() -> list[Species]:
    """Return all entries of the census: a type is in the first group that lists it, and its causal form beside it."""
    entries: list[Species] = []
    pairs = getattr(mappings, GROUPS["encoder-decoder"][1])
    for group, (_, table) in GROUPS.items():
        names = list(getattr(mappings, table))
        if group in ("encoder", "encoder-decoder"):  # what also has a causal form is another model there
            known = {entry.model_type for entry in entries if entry.group != "causal"}
        else:
            known = {entry.model_type for entry in entries}
        if group in ("encoder", "classifier"):
            known |= pairs.keys()
        entries += [Species(group, name) for name in names if name not in known]
    return entries


def build(species: Species, dtype: torch.dtype = torch.float64) -> Any:
    """Return a tiny model with random weights that no zero or one hides anything in, in eval mode.

    Raises:
        Exception: whatever transformers says of a type that cannot be built.
    """
    config = configuration(species)
    torch.manual_seed(0)
    if species.model_type in CLASSES:
        model = getattr(tf, CLASSES[species.model_type])(config)
    else:
        model = getattr(tf, GROUPS[species.group][0]).from_config(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    if config.is_encoder_decoder and getattr(model, "generation_config", None) is not None:
        model.generation_config.decoder_start_token_id = 2
    model = model.to(dtype).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    gc.collect()
    return model


def configuration(species: Species) -> Any:
    """Return the tiny configuration of an entry."""
    config = tiny(species.model_type)
    if species.group == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    names = getattr(mappings, GROUPS[species.group][1])[species.model_type]
    if isinstance(names, list | tuple):  # which of several classes it is stands in the configuration
        config.architectures = [names[0]]
    return config


@dataclass(frozen=True)
class Kind:
    """Describe inputs that a model may run with.

    Attributes:
        ids: the name of the tokens' argument; None where a model has none.
        extra: what a row is given beside its tokens: [1 …] tensors, such as pixels or the decoder's tokens.
        prefix: tokens that each row begins with, such as those that stand for an image.
        beside: what goes with each token, made of the ids: [rows tokens] -> [rows tokens …].
    """

    ids: str | None
    extra: dict[str, Tensor] = field(default_factory=dict)
    prefix: tuple[int, ...] = ()
    beside: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass
class Subject:
    """A model under examination, and how batches of it are made.

    Attributes:
        kind: the inputs that it runs with.
        positions: whether its forward takes `position_ids` that count each row's tokens.
    """

    species: Species
    model: Any
    dtype: torch.dtype
    kind: Kind
    positions: bool = False

    @property
    def ids(self) -> str | None:
        """Return the name of the tokens' argument; None where the model has none."""
        return self.kind.ids

    @property
    def extra(self) -> dict[str, Tensor]:
        """Return what a row is given beside its tokens."""
        return self.kind.extra

    @property
    def exact(self) -> float:
        """Return how far apart two ways to one result may lie, in relation to it."""
        return 1e-6 if self.dtype == torch.float64 else 2e-3

    def batch(self, rows: list[list[int]], side: str = "right") -> dict[str, Tensor]:
        """Return a batch of rows that are padded on one side, without a mask if none is."""
        made = {name: value.expand(len(rows), *value.shape[1:]).clone() for name, value in self.extra.items()}
        if self.ids is None:
            return made
        text = padded([[*self.kind.prefix, *row] for row in rows], side, pad_id(self.model))
        if self.ids != "input_ids":
            return made | {self.ids: text["input_ids"], "decoder_attention_mask": text["attention_mask"]}
        if self.positions:
            text["position_ids"] = (text["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return made | text | self.beside(text["input_ids"])

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what goes with each token."""
        return {name: made(ids) for name, made in self.kind.beside.items()}


def subject(species: Species) -> Subject:
    """Return a model with the inputs that its forward runs with, in float64 if it can.

    Raises:
        RuntimeError: with the reason, where no inputs are known with which it runs.
    """
    reason = ""
    for dtype in (torch.float64, torch.float32):
        model = build(species, dtype)
        takes = inspect.signature(model.forward).parameters
        for kind in _inputs(model, species, dtype):
            if kind.ids is not None and kind.ids not in takes:  # it would be taken without a word, and left aside
                continue
            made = Subject(species, model, dtype, kind)
            try:
                _try(made)
            except Exception as error:  # the next kind of input may do
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            return replace(made, positions=_counts_positions(made))
    raise RuntimeError(f"no inputs known with which it runs; {reason}")


def _try(made: Subject) -> None:
    """Raise an error where a model does not run with these inputs, or gives what is no number."""
    with torch.no_grad():
        logits = first_tensor(made.model(**made.batch(words((12, 12)))))
    if not torch.isfinite(logits).all():
        raise RuntimeError("it gives infinities or NaN")
    if made.dtype == torch.float32 or made.ids is None:
        return
    ragged = made.batch(words(), "left")  # some masks are NaN in float64 where a token sees padding alone
    with torch.no_grad():
        logits = first_tensor(made.model(**ragged))
    if not torch.isfinite(logits[:, -1]).all():
        raise RuntimeError("it gives infinities or NaN beside padding")


def first_tensor(out: Any) -> Tensor:
    """Return the logits of an output, or the first tensor in it."""
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits
    values = out.values() if hasattr(out, "values") else out
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _counts_positions(made: Subject) -> bool:
    """Return whether a model takes `position_ids` of two dimensions, and gives the same with those that it makes."""
    if made.ids != "input_ids" or "position_ids" not in inspect.signature(made.model.forward).parameters:
        return False
    batch = made.batch(words((12, 12)))
    try:
        with torch.no_grad():
            plain = first_tensor(made.model(**batch))
            count = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
            counted = first_tensor(made.model(**batch, position_ids=count))
    except Exception:  # it takes other ones
        return False
    return plain.shape == counted.shape and torch.allclose(plain, counted, rtol=1e-5, atol=1e-6)


def _inputs(model: Any, species: Species, dtype: torch.dtype) -> Iterator[Kind]:
    """Yield kinds of inputs to try, the simplest first."""
    random = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random, dtype=torch.float64).to(dtype)

    pixels = [noise(3, size, size) for size in _image_sizes(model.config)]
    if species.group == "vision":
        yield from (Kind(None, {"pixel_values": p}) for p in pixels)
        yield Kind("input_ids")  # ImageGPT takes tokens
        yield Kind(None, _patches(noise(16, 3 * 4 * 4)))
        yield from (Kind("input_ids", {"pixel_values": p}, _stand_ins(model.config)) for p in pixels)
        return
    if species.group == "speech":  # Dia speaks a text
        yield from _codes(model.config, "num_channels")
    elif species.group != "audio":
        yield from _texts(model.config, pixels, noise)
    yield from _sounds(model.config, noise, species.group != "audio")


Noise = Callable[..., Tensor]


def _image_sizes(config: Any) -> list[int]:
    """Return the widths of images that may do."""
    given = (getattr(part, "image_size", None) for part in parts(config))
    sizes = {size[0] if isinstance(size, list | tuple) and size else size for size in given}
    return sorted({size for size in sizes if isinstance(size, int)} | {16, 32, 64})


def _patches(patches: Tensor) -> dict[str, Tensor]:
    """Return an image that is given as its patches: [1 patches values]."""
    side = int(patches.shape[1] ** 0.5)
    mask = torch.ones(patches.shape[:2], dtype=torch.long)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[side, side]])}


def _stand_ins(config: Any) -> tuple[int, ...]:
    """Return the tokens that stand for an image or a sound in a text, as far as the configuration says."""
    for name in ("image_token_id", "image_token_index", "video_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            counts = (getattr(config, n, None) for n in ("num_query_tokens", "mm_tokens_per_image", "num_image_tokens"))
            return (token,) * next((count for count in counts if isinstance(count, int)), 4)
    return ()


def _texts(config: Any, pixels: list[Tensor], noise: Noise) -> Iterator[Kind]:
    """Yield kinds of inputs that have a text, and perhaps an image."""
    answer = torch.tensor(words((6,), seed=5))
    second = {"decoder_input_ids": answer}
    if config.is_encoder_decoder:
        box = noise(4).abs()
        yield Kind("input_ids", second)
        yield Kind("input_ids", second, beside={"bbox": lambda ids: box.expand(*ids.shape, 4)})
    yield Kind("input_ids")
    if config.is_encoder_decoder:  # of an image alone, before it is given a text that it makes nothing of
        yield from (Kind("decoder_input_ids", {"pixel_values": p}) for p in pixels)
    yield from _codes(config, "num_codebooks")
    if _stand_ins(config):
        yield from (Kind("input_ids", {"pixel_values": p}, _stand_ins(config)) for p in pixels)
    for more in ({}, second):
        yield from (Kind("input_ids", {"pixel_values": p} | more) for p in pixels)
    for more in (second, {}):
        yield from (Kind("input_ids", {"pixel_values": p[:, None]} | more) for p in pixels)
    yield Kind("decoder_input_ids", {"flattened_patches": noise(8, 2 + 3 * 16).abs()})
    yield from _images_in_text(config, pixels, noise)
    protein = torch.tensor(words((7,), seed=6))
    yield Kind("input_ids", {"protein_input_ids": protein, "protein_attention_mask": torch.ones_like(protein)})


def _images_in_text(config: Any, pixels: list[Tensor], noise: Noise) -> Iterator[Kind]:
    """Yield kinds of inputs where tokens of the text stand for the image, or see it."""
    tokens = _stand_ins(config)
    question = {"qformer_input_ids": torch.tensor(words((3,), seed=6))}
    robot = {"state": noise(32), "noise": noise(50, 32), "timestep": torch.tensor([0.5]), "pixel_attention_mask": _YES}
    for p in pixels:
        yield Kind("input_ids", {"pixel_values": p} | question, tokens)
        yield Kind("input_ids", {"pixel_values": p[:, None].expand(-1, 4, -1, -1, -1)} | question, tokens * 4)
        yield Kind("input_ids", {"pixel_values": p[:, None]}, beside={"image_attention_mask": _everywhere})
        yield Kind("input_ids", {"pixel_values": p[:, None]} | robot, tokens)
    latent = getattr(config, "latent_query_num", 0)
    if latent:  # which tokens stand for the image is said beside them
        stand_in = VOCAB - 1
        where = {"image_embeds_position_mask": lambda ids: ids == stand_in}
        yield from (Kind("input_ids", {"pixel_values": p}, (stand_in,) * latent, where) for p in pixels)


def _codes(config: Any, name: str) -> Iterator[Kind]:
    """Yield kinds of inputs where a token has an id of each of several codebooks, whose number has a name."""
    counts = {getattr(part, name, None) for part in parts(config)}
    for count in sorted(count for count in counts if isinstance(count, int)):
        answers = torch.tensor(words((6,) * count, seed=5))
        yield Kind("input_ids", {"decoder_input_ids": answers[None]})
        yield Kind("input_ids", {"decoder_input_ids": answers.T.contiguous()[None]})
        yield Kind("input_ids", beside={"input_ids": partial(_repeated, count=count + 1)})


def _repeated(ids: Tensor, count: int) -> Tensor:
    """[rows tokens] -> [rows tokens count]."""
    return ids[..., None].repeat(1, 1, count)


_YES = torch.ones(1, 1, dtype=torch.bool)


def _everywhere(ids: Tensor) -> Tensor:
    """Return that each token sees the one image: [rows tokens images]."""
    return torch.ones(*ids.shape, 1, dtype=torch.long)


def _sounds(config: Any, noise: Noise, asks: bool) -> Iterator[Kind]:
    """Yield kinds of inputs that have a sound, and tokens of an answer where the model asks for them."""
    bands = {
        value
        for part in parts(config)
        for name in ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", "d_model")
        for value in [getattr(part, name, None)]
        if isinstance(value, int)
    }
    sounds = {"input_values": [noise(2000), noise(128, 64)], "input_features": []}
    for band in sorted(bands | {64, 80, 128}):
        sounds["input_features"] += [noise(band, 256), noise(256, band), noise(64, band)]
    for band in sorted(bands):  # a sound that runs beside the tokens
        yield Kind("input_ids", beside={"input_features": partial(_running, noise(band, 1000))})
    for name, values in sounds.items():
        for value in values:
            if asks:
                yield Kind("decoder_input_ids", {name: value})
            yield Kind(None, {name: value})


def _running(sound: Tensor, ids: Tensor) -> Tensor:
    """Return the beginning of a sound, 8 frames for each token: [rows bands frames]."""
    return sound[..., : 8 * ids.shape[1]].expand(len(ids), -1, -1)


def words(rows: Iterable[int] = ROWS, seed: int = 0) -> list[list[int]]:
    """Return rows of ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(*WORDS, (n,), generator=generator).tolist() for n in rows]


def padded(rows: list[list[int]], side: str, pad: int = 0) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of rows that are padded on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        there = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, there] = torch.tensor(row)
        mask[i, there] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_id(model: nn.Module) -> int:
    """Return what padding consists of."""
    for part in parts(model.config):
        if isinstance(getattr(part, "pad_token_id", None), int):
            return part.pad_token_id
    return 0

"""Tiny random models of every type, and batches for them."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as mappings

from census.shrinking import WORDS, parts, tiny

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
    """Return all entries of the census; a type is in the first group that lists it, but for the causal forms of encoders."""
    entries: list[Species] = []
    for group, (_, table) in GROUPS.items():
        if group in ("encoder", "encoder-decoder"):  # types that also have a causal form: it is another model
            known = {e.model_type for e in entries if e.group != "causal"}
        else:
            known = {e.model_type for e in entries}
        entries += [Species(group, name) for name in getattr(mappings, table) if name not in known]
    return entries


def build(species: Species, dtype: torch.dtype = torch.float64) -> Any:
    """Return a tiny model with random weights that no zero or one hides anything in, in eval mode.

    Raises:
        Exception: whatever transformers says of a type that cannot be built.
    """
    auto = getattr(tf, GROUPS[species.group][0])
    config = configuration(species)
    torch.manual_seed(0)
    model = auto.from_config(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
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
    return config


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

"""Finetuning language models by intervening on their representations, and heads for them."""

import importlib
from typing import TYPE_CHECKING, Any

from reftheads._utils.deprecation import deprecate
from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.model import InterventionModel
from reftheads.data.collator import Collator
from reftheads.data.encoding import encode_chat, encode_pairs, encode_preferences
from reftheads.data.rows import mix
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions
from reftheads.graph.site import Site
from reftheads.inference.conversation import chat, reply
from reftheads.inference.prediction import predict
from reftheads.interop.torch_module import export_head
from reftheads.interventions.heads import LinearHead, MLPHead
from reftheads.interventions.lora import LoRA
from reftheads.interventions.losses import losses
from reftheads.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.interventions.steering import Ablate, Collect, Gated, Replace, Steering
from reftheads.loading import load_base
from reftheads.presets import preset
from reftheads.reuse.store import ActivationStore

if TYPE_CHECKING:
    from reftheads.probing import fit_probes
    from reftheads.training.sweeps import sweep
    from reftheads.training.trainer import InterventionTrainer
    from reftheads.tuning import Space, tune
    from reftheads.webpage import page

__version__ = "0.1.0"

__all__ = [
    "Ablate", "ActivationStore", "Collator", "Collect", "ConsReFT", "DiReFT", "Gated", "InterventionConfig",
    "InterventionGraph", "InterventionModel", "InterventionTrainer", "LinearHead", "LoRA", "LoReFT", "LobiReFT",
    "MLPHead", "NoDiReFT", "NoReFT", "Node", "Positions", "Replace", "ScaleAndBias", "Site", "Space", "Steering",
    "chat", "encode_chat", "encode_pairs", "encode_preferences", "export_head", "fit_probes", "load_base", "losses",
    "mix", "page", "predict", "preset", "reply", "sweep", "tune",
]  # fmt: skip

# transformers' Trainer takes longer to import than all the rest together, and inference needs none
_LATE = {
    "InterventionTrainer": "reftheads.training", "Space": "reftheads.tuning", "fit_probes": "reftheads.probing",
    "page": "reftheads.webpage", "sweep": "reftheads.training", "tune": "reftheads.tuning",
}  # fmt: skip

# what authors of node types and readers of results name; once at this level, now in the packages alone
_MOVED = {
    "Context": "reftheads.graph", "Edit": "reftheads.graph", "Estimate": "reftheads.probing",
    "Head": "reftheads.graph", "LowRank": "reftheads.interventions", "Probe": "reftheads.probing",
    "Probes": "reftheads.probing", "Reader": "reftheads.graph", "Shape": "reftheads.graph",
    "Tokens": "reftheads.graph", "Trial": "reftheads.training", "compile_graph": "reftheads.runtime",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        deprecate(f"reftheads.{name}", f"from {_MOVED[name]} import {name}")
    elif name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module((_LATE | _MOVED)[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

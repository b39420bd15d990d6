"""Finetuning language models by intervening on their representations, and heads for them."""

import importlib
from typing import TYPE_CHECKING, Any

from reftheads.chat import chat, reply
from reftheads.data import Collator, encode_chat, encode_pairs, encode_preferences, mix
from reftheads.export import export_head
from reftheads.graph import InterventionGraph
from reftheads.heads import LinearHead, MLPHead
from reftheads.interventions import ConsReFT, DiReFT, LobiReFT, LoReFT, LowRank, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.loading import load_base
from reftheads.lora import LoRA
from reftheads.losses import losses
from reftheads.model import InterventionModel
from reftheads.nodes import Context, Edit, Head, Node, Reader, Shape
from reftheads.plan import compile_graph
from reftheads.positions import Positions, Tokens
from reftheads.predicting import predict
from reftheads.presets import preset
from reftheads.sites import Site
from reftheads.steering import Ablate, Collect, Gated, Replace, Steering
from reftheads.store import ActivationStore
from reftheads.tuner import InterventionConfig

if TYPE_CHECKING:
    from reftheads.probing import Estimate, Probe, Probes, fit_probes
    from reftheads.sweeps import Trial, sweep
    from reftheads.trainer import InterventionTrainer

__version__ = "0.1.0"

_LATE = {
    "Estimate": "reftheads.probing", "InterventionTrainer": "reftheads.trainer", "Probe": "reftheads.probing",
    "Probes": "reftheads.probing", "Trial": "reftheads.sweeps", "fit_probes": "reftheads.probing",
    "sweep": "reftheads.sweeps",
}  # fmt: skip

__all__ = [
    "Ablate", "ActivationStore", "Collator", "Collect", "ConsReFT", "Context", "DiReFT", "Edit", "Estimate",
    "Gated", "Head", "InterventionConfig", "InterventionGraph", "InterventionModel", "InterventionTrainer",
    "LinearHead", "LoRA", "LoReFT", "LobiReFT", "LowRank", "MLPHead", "NoDiReFT", "NoReFT", "Node", "Positions",
    "Probe", "Probes", "Reader", "Replace", "ScaleAndBias", "Shape", "Site", "Steering", "Tokens", "Trial", "chat",
    "compile_graph", "encode_chat", "encode_pairs", "encode_preferences", "export_head", "fit_probes", "load_base",
    "losses", "mix", "predict", "preset", "reply", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes longer to import than all the rest together, and inference needs none
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

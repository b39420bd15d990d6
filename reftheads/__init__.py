"""Finetuning language models by intervening on their representations, and heads for them."""

import importlib
from typing import TYPE_CHECKING, Any

from reftheads.adapter.model import InterventionModel
from reftheads.adapter.tuner import InterventionConfig
from reftheads.data.collator import Collator
from reftheads.data.encoding import encode_chat, encode_pairs, encode_preferences
from reftheads.data.rows import mix
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Context, Edit, Head, Reader, Shape
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions
from reftheads.graph.site import Site
from reftheads.graph.tokens import Tokens
from reftheads.inference.conversation import chat, reply
from reftheads.inference.prediction import predict
from reftheads.interop.torch_module import export_head
from reftheads.interventions.heads import LinearHead, MLPHead
from reftheads.interventions.lora import LoRA
from reftheads.interventions.losses import losses
from reftheads.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, LowRank, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.interventions.steering import Ablate, Collect, Gated, Replace, Steering
from reftheads.loading import load_base
from reftheads.presets import preset
from reftheads.reuse.store import ActivationStore
from reftheads.runtime.plan import compile_graph

if TYPE_CHECKING:
    from reftheads.probing import Estimate, Probe, Probes, fit_probes
    from reftheads.training.sweeps import Trial, sweep
    from reftheads.training.trainer import InterventionTrainer

__version__ = "0.1.0"

_LATE = {
    "Estimate": "reftheads.probing", "InterventionTrainer": "reftheads.training.trainer", "Probe": "reftheads.probing",
    "Probes": "reftheads.probing", "Trial": "reftheads.training.sweeps", "fit_probes": "reftheads.probing",
    "sweep": "reftheads.training.sweeps",
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

"""Finetuning language models by intervening on their representations, and heads for them."""

from typing import TYPE_CHECKING, Any

from reftheads.chat import chat, reply
from reftheads.data import Collator, encode_chat, encode_pairs
from reftheads.graph import InterventionGraph
from reftheads.heads import LinearHead
from reftheads.interventions import ConsReFT, DiReFT, LobiReFT, LoReFT, LowRank, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.loading import load_base
from reftheads.lora import LoRA
from reftheads.losses import losses
from reftheads.model import InterventionModel
from reftheads.nodes import Context, Edit, Head, Node, Reader, Shape
from reftheads.plan import compile_graph
from reftheads.positions import Positions, Tokens
from reftheads.sites import Site
from reftheads.steering import Ablate, Collect, Gated, Replace, Steering
from reftheads.tuner import InterventionConfig

if TYPE_CHECKING:
    from reftheads.trainer import InterventionTrainer

__version__ = "0.1.0"

__all__ = [
    "Ablate", "Collator", "Collect", "ConsReFT", "Context", "DiReFT", "Edit", "Gated", "Head", "InterventionConfig",
    "InterventionGraph", "InterventionModel", "InterventionTrainer", "LinearHead", "LoRA", "LoReFT", "LobiReFT",
    "LowRank", "NoDiReFT", "NoReFT", "Node", "Positions", "Reader", "Replace", "ScaleAndBias", "Shape", "Site",
    "Steering", "Tokens", "chat", "compile_graph", "encode_chat", "encode_pairs", "load_base", "losses", "reply",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes longer to import than all the rest together, and inference needs none
    if name == "InterventionTrainer":
        from reftheads.trainer import InterventionTrainer

        return InterventionTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Finetuning language models by intervening on their representations, and heads for them."""

from reftheads.graph import InterventionGraph
from reftheads.heads import LinearHead
from reftheads.interventions import ConsReFT, DiReFT, LobiReFT, LoReFT, LowRank, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.lora import LoRA
from reftheads.losses import losses
from reftheads.model import InterventionModel
from reftheads.nodes import Context, Edit, Head, Node, Reader, Shape
from reftheads.plan import compile_graph
from reftheads.positions import Positions, Tokens
from reftheads.sites import Site
from reftheads.steering import Ablate, Collect, Gated, Replace, Steering
from reftheads.tuner import InterventionConfig

__version__ = "0.1.0"

__all__ = [
    "Ablate", "Collect", "ConsReFT", "Context", "DiReFT", "Edit", "Gated", "Head", "InterventionConfig",
    "InterventionGraph", "InterventionModel", "LinearHead", "LoRA", "LoReFT", "LobiReFT", "LowRank", "NoDiReFT",
    "NoReFT", "Node", "Positions", "Reader", "Replace", "ScaleAndBias", "Shape", "Site", "Steering", "Tokens",
    "compile_graph", "losses",
]  # fmt: skip

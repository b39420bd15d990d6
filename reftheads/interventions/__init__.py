"""The node types, each with its equation: ReFT, steering, LoRA, heads and their losses."""

from reftheads.interventions.heads import LinearHead, MappingHead, MLPHead
from reftheads.interventions.lora import LoRA
from reftheads.interventions.losses import Loss
from reftheads.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, LowRank, NoDiReFT, NoReFT, ScaleAndBias
from reftheads.interventions.steering import Ablate, Collect, Gated, Replace, Steering

__all__ = [
    "Ablate", "Collect", "ConsReFT", "DiReFT", "Gated", "LinearHead", "LoRA", "LoReFT", "LobiReFT", "Loss", "LowRank",
    "MLPHead", "MappingHead", "NoDiReFT", "NoReFT", "Replace", "ScaleAndBias", "Steering",
]  # fmt: skip

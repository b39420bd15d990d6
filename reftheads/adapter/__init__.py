"""The PEFT method: configuration, tuner, model, and how it is saved and loaded."""

from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.model import InterventionModel
from reftheads.adapter.tuner import InterventionTuner

__all__ = ["InterventionConfig", "InterventionModel", "InterventionTuner"]

"""Training graphs: a Trainer, and many adapters side by side."""

from reftheads.training.sweeps import Trial, sweep
from reftheads.training.trainer import InterventionTrainer

__all__ = ["InterventionTrainer", "Trial", "sweep"]

"""Training graphs: a Trainer, and many adapters side by side."""

from reftheads.training.side_by_side import Trial
from reftheads.training.sweeps import sweep
from reftheads.training.trainer import InterventionTrainer

__all__ = ["InterventionTrainer", "Trial", "sweep"]

"""Computing only what a graph can change: the rest of a frozen model is computed once, kept and found again."""

from reftheads.reuse.cone import Cone
from reftheads.reuse.store import ActivationStore

__all__ = ["ActivationStore", "Cone"]

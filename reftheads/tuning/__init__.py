"""Where to edit: a search over layers, positions, rank and learning rate, whose candidates are trained side by side.

1. A `Space` says what may be chosen; Optuna chooses (`space`).
2. A round is a successive halving: of many candidates the best go on, as far as the budget allows (`halving`).
3. Those of a rung are trained in few passes over the base model, and judged on rows held out (`passes`).
4. What every pass gave is written down (`journal`): a search that is called again runs through the same rounds
   (`search`), and trains only what nobody has written down.
5. What was found is a trained model, a table and a picture (`result`).
"""

from reftheads.tuning.result import Tuning
from reftheads.tuning.search import tune
from reftheads.tuning.space import Candidate, Space

__all__ = ["Candidate", "Space", "Tuning", "tune"]

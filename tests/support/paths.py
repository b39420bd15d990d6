"""Where things lie."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
DATA = Path(os.environ.get("REFTHEADS_DATA", ROOT.parent / "shared" / "data"))
"""Real data and models, which need not be there."""

"""The page that shows what came of the census."""
from pathlib import Path


def write(results: Path, page: Path) -> None:
    """Write the page."""

"""A chat page in the browser: base and edited answers side by side, nodes to switch, adapters to retrain.

Needs the extra `demo`, which brings Gradio; it is imported where a page is made.
"""

from reftheads.webpage.serving import page
from reftheads.webpage.session import Session

__all__ = ["Session", "page"]

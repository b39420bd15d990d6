"""Serving a page, on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from reftheads.adapter.model import InterventionModel
from reftheads.webpage.folder import Folder
from reftheads.webpage.layout import CSS, HEAD, build
from reftheads.webpage.session import Session

if TYPE_CHECKING:
    import gradio as gr

_FONTS = ("system-ui", "sans-serif")
_WAITING = 32  # visitors' questions, beyond which another one is turned away
_VISITORS = 64  # whose models are kept; another one takes the place of who came first


def page(
    model: InterventionModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    demonstrations: Sequence[tuple[str, str]] = (),
    directory: str | os.PathLike = "adapters",
    steps: int = 60,
    learning_rate: float = 2e-2,
    max_new_tokens: int = 128,
    **launch: Any,
) -> gr.Blocks:
    """Serve a chat page for a model: its base and edited answers side by side, its nodes to switch and retrain.

    It is served on 127.0.0.1, sends nothing elsewhere and loads nothing from there. Each visitor works on adapters of
    their own, above base weights that all share.

    Args:
        model: with the adapters that a visitor begins with.
        tokenizer: of the model.
        demonstrations: pairs of a question and its answer on which the adapters were trained; a visitor adds more,
            and trains on all of them.
        directory: where visitors save adapters, and load them by name.
        steps, learning_rate: of a visitor's training.
        max_new_tokens: of an answer.
        launch: goes to the `launch` of Gradio's `Blocks`, such as `server_port`; or `prevent_thread_lock=True`, which
            returns while the page is served.

    Returns:
        The page; `close()` ends it.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: a model that is no `InterventionModel`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(rh.LoReFT(rank=4), 1, positions="l1")))
        >>> shown = rh.page(model, tokenizer, prevent_thread_lock=True, quiet=True)
        >>> shown.local_url
        'http://127.0.0.1:...'
        >>> shown.close(verbose=False)
        ```
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported, and for whatever of it would ask
    try:
        from gradio.themes import Soft
    except ImportError as error:
        raise ImportError("rh.page needs Gradio: pip install 'reftheads[demo]'") from error
    new_session = partial(
        Session, model, tokenizer, Folder(directory), demonstrations,
        steps=steps, learning_rate=learning_rate, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    new_session()  # raises now what each visitor's would
    blocks = build(new_session)
    blocks.queue(max_size=_WAITING, default_concurrency_limit=4)
    ours: dict[str, Any] = {
        "server_name": "127.0.0.1", "share": False, "allowed_paths": [], "max_file_size": 1, "max_threads": 8,
        "state_session_capacity": _VISITORS, "theme": Soft(font=_FONTS, font_mono="monospace"),
        "css": CSS, "head": HEAD, "footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False,
        "enable_monitoring": False,
    }  # fmt: skip
    blocks.launch(**ours | launch)
    return blocks

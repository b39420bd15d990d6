"""From text to rows, and from rows to padded batches."""

from reftheads.data.collator import Collator, prompts_only
from reftheads.data.encoding import encode_chat, encode_continuations, encode_pairs, encode_preferences
from reftheads.data.rows import complete, mix

__all__ = [
    "Collator", "complete", "encode_chat", "encode_continuations", "encode_pairs", "encode_preferences", "mix",
    "prompts_only",
]  # fmt: skip

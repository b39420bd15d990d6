"""From text to rows, and from rows to padded batches."""

from reftheads.data.rows import Collator, encode_chat, encode_pairs, encode_preferences, mix

__all__ = ["Collator", "encode_chat", "encode_pairs", "encode_preferences", "mix"]

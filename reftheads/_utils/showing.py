"""Values as errors show them."""

from typing import Any

_LONGEST = 200


def shown(value: Any) -> str:
    """Return what `repr` gives, cut where it is long: a file may hold megabytes in place of a word."""
    if isinstance(value, str | bytes):
        value = value if len(value) <= _LONGEST else value[:_LONGEST]
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

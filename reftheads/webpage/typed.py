"""What visitors type: text that a model can be given, or an error that they can read."""

import unicodedata
from typing import Any

LONGEST = 20_000  # letters; more would only be tokenised in order to be refused
_LINES = "\n\t"


def check_text(text: Any, what: str) -> str:
    """Return what was typed, without blanks at its ends.

    Args:
        what: how an error calls it.

    Raises:
        ValueError: no text, none but blanks, too much of it, or characters that control something.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a text, got {type(text).__name__}")
    if len(text) > LONGEST:
        raise ValueError(f"{what} has {len(text):,} letters: give at most {LONGEST:,}")
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise ValueError(f"{what} is empty: type something")
    for letter in text:
        if letter not in _LINES and unicodedata.category(letter) in ("Cc", "Cs"):
            raise ValueError(f"{what} holds the control character U+{ord(letter):04X}: leave it out")
    return text

"""Show the examples of docstrings as what they are, a console: prompts, input and output in colours of their own."""

import re
from typing import Any

import griffe


class Consoles(griffe.Extension):
    """Name the language of blocks that begin with a prompt `pycon`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the fences of one docstring; the source stays as it is."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"```python(?=\n\s*>>>)", "```pycon", obj.docstring.value)

"""Where a node acts: a layer, a component of that layer and, if wanted, one attention head.

A `Site` is plain data and knows no model. `reftheads.architectures.locate` finds the module of a
given model that it means.
"""

from dataclasses import dataclass
from typing import Literal

from reftheads._utils.showing import shown

Stack = Literal["encoder", "decoder"]
Side = Literal["input", "output"]

# In the order in which a block computes them; the order decides which node may read from which.
BLOCK_COMPONENTS = (
    "block_input",  # the residual stream that enters the block
    "attention_input",  # what the query, key and value projections read
    "query_output",
    "key_output",
    "value_output",
    "head_output",  # per-head input of the attention's output projection
    "attention_output",  # what the attention adds to the residual stream
    "mlp_input",
    "mlp_activation",  # input of the down projection
    "mlp_output",  # what the MLP adds to the residual stream
    "block_output",  # the residual stream that leaves the block
)
STACK_COMPONENTS = ("embedding_output", "final_norm_output")
COMPONENTS = BLOCK_COMPONENTS + STACK_COMPONENTS
HEAD_COMPONENTS = ("query_output", "key_output", "value_output", "head_output")


@dataclass(frozen=True)
class Site:
    """Say where in any transformer a node acts: its address, which knows no model.

    Args:
        layer: index of the block; negative counts from the end. `None` for `embedding_output`,
            `final_norm_output` and module paths, which belong to no layer or name their own.
        component: one of `COMPONENTS`, or the dotted path of any module of the base model,
            such as `"model.layers.3.mlp.gate_proj"`.
        head: one attention head of `query_output`, `key_output`, `value_output` or `head_output`;
            negative counts from the end. `None` means all of them.
        stack: which half of an encoder-decoder model; `None` means its decoder, or the only stack.
        side: for a module path, whether what enters or what leaves the module is meant.

    Raises:
        ValueError: a component that is neither in the vocabulary nor a dotted path, a layer that is
            missing or superfluous, a head where there are none.

    Example:
        ```python
        >>> import reftheads as rh
        >>> print(rh.Site(layer=-1, component="query_output", head=2))
        query_output[-1].head[2]
        >>> rh.Site(component="model.layers.3.mlp.gate_proj").is_path
        True
        ```
    """

    layer: int | None = None
    component: str = "block_output"
    head: int | None = None
    stack: Stack | None = None
    side: Side = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.component, str) or (self.component not in COMPONENTS and "." not in self.component):
            raise ValueError(
                f"unknown component {shown(self.component)}: use one of {', '.join(COMPONENTS)}, "
                "or the dotted path of a module such as 'model.layers.3.mlp.gate_proj'"
            )
        if self.component in BLOCK_COMPONENTS and (not isinstance(self.layer, int) or isinstance(self.layer, bool)):
            raise ValueError(f"component {self.component!r} needs a layer: an integer, got {shown(self.layer)}")
        if self.component not in BLOCK_COMPONENTS and self.layer is not None:
            raise ValueError(
                f"component {self.component!r} belongs to no layer: leave layer out, got {shown(self.layer)}"
            )
        if self.head is not None and (not isinstance(self.head, int) or isinstance(self.head, bool)):
            raise ValueError(f"head must be an integer, or None for all heads, got {shown(self.head)}")
        if self.head is not None and self.component not in HEAD_COMPONENTS:
            raise ValueError(
                f"component {self.component!r} has no attention heads: head={self.head!r} goes with "
                f"{', '.join(HEAD_COMPONENTS)}"
            )
        if self.stack not in (None, "encoder", "decoder"):
            raise ValueError(f"stack must be 'encoder', 'decoder' or None, got {shown(self.stack)}")
        if self.side not in ("input", "output"):
            raise ValueError(f"side must be 'input' or 'output', got {shown(self.side)}")
        if self.side == "input" and not self.is_path:
            raise ValueError(f"side goes with a module path; {self.component!r} says its side by its name")

    @property
    def is_path(self) -> bool:
        """Return whether the component is a module path rather than a word of the vocabulary."""
        return self.component not in COMPONENTS

    def __str__(self) -> str:
        where = self.component if self.layer is None else f"{self.component}[{self.layer}]"
        if self.head is not None:
            where += f".head[{self.head}]"
        if self.side == "input":
            where += ":input"
        return f"{self.stack} {where}" if self.stack else where

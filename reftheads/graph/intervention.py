"""What is done at a site: the abstract kinds of intervention.

An intervention is a frozen dataclass: its fields are its hyperparameters, and its methods are pure
functions of the parameters and the hidden states. An `Edit` writes, a `Reader` reads, and a `Head` is a reader
with a loss. The parameters themselves live in a module that is made when a graph is compiled.

A type of one's own is one small class; docs/nodes.md shows one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped

Params = Mapping[str, Tensor]
"""Parameters of an intervention by name, with what was derived from them."""

IGNORE = -100
"""What stands for no target, as in all of torch and transformers."""


@dataclass(frozen=True)
class Shape:
    """Describe the place for which an intervention makes its parameters.

    Attributes:
        width: features that it sees.
        input_width: features that enter the linear module whose output it edits, if it `needs_linear`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Shape
        >>> {name: tuple(p.shape) for name, p in rh.LoRA(rank=4).parameters(Shape(width=32, input_width=64)).items()}
        {'A': (4, 64), 'B': (32, 4)}
        ```
    """

    width: int
    input_width: int | None = None

    def __str__(self) -> str:
        return f"{self.width}" if self.input_width is None else f"{self.input_width} → {self.width}"


@dataclass(frozen=True)
class Context:
    """Hold what an intervention may look at besides the hidden states.

    Attributes:
        x: what entered the module, at the same tokens.
        source: the output of the node named as source, in the same slots or in one slot for all of them.
        training: whether dropout is active.
        valid: which slots hold a token, for what reads; the others hold anything. `None`: all of them.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> from reftheads.graph import Context
        >>> p = {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
        >>> rh.LoRA(rank=1).edit(p, torch.zeros(1, 1, 2), Context(x=torch.ones(1, 1, 2)))  # h + B A x
        tensor([[[2., 2.]]])
        ```
    """

    x: Float[Tensor, "batch slots input_width"] | None = None
    source: Float[Tensor, " batch #slots outputs"] | None = None
    training: bool = False
    valid: Bool[Tensor, "batch slots"] | None = None


class Intervention(ABC):
    """Say what is done at a site. Subclasses are frozen dataclasses of JSON values and `Constant`s.

    A type of one's own derives from `Edit`, `Reader` or `Head`.

    Attributes:
        needs_linear: whether it acts only on the output of a linear module, whose input it reads.
        reads_source: whether it looks at another node's output, `context.source`, where there is one.
        needs_source: whether it cannot do without it.
        source_outputs: how many outputs that node must have; `None`: any number.
        letters: by the paper's letter, the name of the stored parameter that stands for it.
        lr: learning rate of its parameters; `None`: that of the trainer.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Intervention
        >>> isinstance(rh.LoReFT(rank=4), Intervention), str(rh.LoReFT(rank=4, act_fn="relu"))
        (True, "LoReFT(rank=4, act_fn='relu')")
        ```
    """

    needs_linear: bool = False
    reads_source: bool = False
    needs_source: bool = False
    source_outputs: int | None = None
    letters: Mapping[str, str] = {}
    lr: float | None = None

    @abstractmethod
    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        """Make new parameters: an `nn.Parameter` is trained, a plain tensor is saved but not trained."""

    def __str__(self) -> str:
        options = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                options.append(f"{f.name}={value if isinstance(value, Intervention) else repr(value)}")
        return f"{type(self).__name__}({', '.join(options)})"

    def constants(self) -> list[Constant]:
        """Return the tensors that the user gave, here and in interventions within this one."""
        values = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        within = [value for value in values if isinstance(value, Intervention)]
        return [value for value in values if isinstance(value, Constant)] + [c for i in within for c in i.constants()]

    @property
    def derives_from(self) -> tuple[str, ...]:
        """Return the names of the stored parameters that `derive` needs; none, if there is nothing to derive."""
        return ()

    def derive(self, p: Params) -> Params:
        """Compute further tensors for `edit` and `read` from stored ones, once a forward pass.

        The parameters may carry leading batch dimensions: nodes of one kind are derived together.
        """
        return {}

    def check_parameters(self, p: Params) -> None:  # noqa: B027, since all will do for most
        """Raise `ValueError` for stored parameters with which nothing can be computed."""


class Edit(Intervention):
    """Write new hidden states in place of those at the selected tokens.

    Example:
        ```python
        >>> from dataclasses import dataclass
        >>> import torch
        >>> import reftheads as rh
        >>> from reftheads.graph import Edit
        >>> @dataclass(frozen=True)
        ... class Amplify(Edit):
        ...     def parameters(self, shape):
        ...         return {"g": torch.nn.Parameter(torch.zeros(shape.width))}
        ...     def edit(self, p, h, context):
        ...         return h * (1 + p["g"])
        >>> print(rh.InterventionGraph(rh.Node(Amplify(), layer=2, positions="l1")))
        node      what       where           positions
        amplify_2 Amplify()  block_output[2] l1
        ```
    """

    @abstractmethod
    def edit(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, "batch slots width"]:
        """Return the new hidden states at the selected tokens."""


class Reader(Intervention):
    """Read the hidden states at the selected tokens and leave them as they are.

    Attributes:
        detach: whether no gradient reaches the model.
        outputs: how many numbers it gives per slot; `None`: that shows when it reads.
        pools: whether it gives one slot per row, made of all slots that are valid.

    Example:
        ```python
        >>> from dataclasses import dataclass
        >>> import reftheads as rh
        >>> from reftheads.graph import Reader
        >>> @dataclass(frozen=True)
        ... class Norm(Reader):
        ...     def parameters(self, shape):
        ...         return {}
        ...     def read(self, p, h, context):
        ...         return h.norm(dim=-1, keepdim=True)
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(rh.Node(Norm(), layer=2, name="norm")))
        >>> tuple(model(**tokenizer("Hi!", return_tensors="pt")).collected["norm"].shape)  # rows, tokens, outputs
        (1, 2, 1)
        ```
    """

    detach: bool = True
    outputs: int | None = None
    pools: bool = False

    @abstractmethod
    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, " batch #slots outputs"]:
        """Return what the hidden states at the selected tokens give."""

    def shown(self, value: Float[Tensor, "*items outputs"]) -> Float[Tensor, "*items outputs"]:
        """Return what was read as users see it."""
        return value


class Head(Reader):
    """Predict a target column of the batch: a reader with a loss.

    Most heads are a `reftheads.interventions.MappingHead` with one of `rh.losses`.

    Attributes:
        target: the column; `None` for a head that predicts and is not trained.
        weight: of its loss in the total.
        kind: what its targets are, see `Loss`; heads with one target need one kind.
        target_width: how many numbers a target is; `None`: one, without a dimension of its own.
        shift: whether a token's target is that of the next column.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Head
        >>> head = rh.LinearHead(outputs=3, target="mood")
        >>> isinstance(head, Head), head.kind
        (True, 'classes')
        ```
    """

    target: str | None
    weight: float | str = 1.0
    kind: str | None = None
    target_width: int | None = None
    shift: bool = False

    @abstractmethod
    def loss_of(
        self,
        prediction: Float[Tensor, "batch slots outputs"],
        target: Shaped[Tensor, "batch slots *target_width"],
        valid: Bool[Tensor, "batch slots"],
    ) -> Float[Tensor, ""]:
        """Return the mean loss over slots that are valid and have a target."""

    def weighted(self, loss: Float[Tensor, ""], count: Int[Tensor, ""], p: Params) -> Float[Tensor, ""]:
        """Return what its loss, a mean over so many targets, adds to the total."""
        assert not isinstance(self.weight, str)
        return self.weight * loss

    def check(
        self,
        target: Shaped[Tensor, "*batch slots *target_width"],
        where: str = "row {row}",
        valid: Bool[Tensor, "*batch slots"] | None = None,
    ) -> None:
        """Raise `ValueError` for a target that cannot be.

        Args:
            where: names the place of a target in the error, with the number of its row put in.
            valid: the slots that count; `None`: all of them.
        """

    def given(self, target: Shaped[Tensor, "*items"]) -> Bool[Tensor, "*items"]:
        """Return which of these numbers are targets rather than what stands for none."""
        return torch.ones_like(target, dtype=torch.bool)


class Constant:
    """Keep a tensor that the user gives as part of an intervention's definition.

    Its numbers are saved with the weights; the definition itself says the shape only, and so does equality.

    Example:
        ```python
        >>> from reftheads.graph import Constant
        >>> Constant([0.5, 1.0]), Constant([0.5, 1.0]) == Constant([3.0, 4.0])
        (Constant(2), True)
        ```
    """

    def __init__(self, value: Any):
        self.value = torch.as_tensor(value).detach().clone()

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Constant:
        """Make one of this shape whose numbers are still to be loaded; it takes no memory until then."""
        constant = cls(())
        constant.value = _ZERO.expand(tuple(shape))
        return constant

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.value.shape == other.value.shape

    def __hash__(self) -> int:
        return hash(tuple(self.value.shape))

    def __repr__(self) -> str:
        return f"Constant({'×'.join(map(str, self.value.shape)) or 'scalar'})"


_ZERO = torch.zeros(())


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point type of torch, given itself or its name.

    Raises:
        ValueError: anything else.
    """
    read = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(read, torch.dtype) or not read.is_floating_point:
        raise ValueError(
            "dtype must be the name of a torch float type such as 'float32' or 'bfloat16', or the type itself, "
            f"got {dtype!r}"
        )
    return read


def keep_name_of_dtype(intervention: Any) -> None:
    """Put the name of its type in the place of an intervention's `dtype`, so that JSON can hold it.

    Raises:
        ValueError: a `dtype` that is no floating-point type of torch.
    """
    name = str(read_dtype(intervention.dtype)).removeprefix("torch.")
    object.__setattr__(intervention, "dtype", name)

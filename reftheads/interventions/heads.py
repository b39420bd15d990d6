"""Reading nodes with a loss: probes, classifiers, regressors, reward and value models, language-model heads."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from reftheads.graph.intervention import IGNORE, Context, Head, Params, Shape, keep_name_of_dtype, read_dtype
from reftheads.interventions.losses import Loss, losses, masked_mean, quantile_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_MOST_LAYERS = 1000


@dataclass(frozen=True)
class MappingHead(Head):
    """Predict a column of the batch by a map of the hidden states: what such heads have in common.

    A head never changes the logits. A type of one's own says which linear maps it has (`layers_of`) and how they make
    a prediction (`map`).

    Args:
        outputs: classes of a classifier, labels of `multi_label`, quantiles; 1 for a number, 2 for a mean with its
            log-variance.
        target: column of the batch that holds the targets: [batch] where the positions select one token
            per row or `pool` makes one prediction of them, else [batch sequence], a target per token; with
            `multi_label` [… outputs]. `None`: a head that predicts and is not trained here.
        loss: name of a loss: one of `rh.losses`.
        detach: makes it a probe: no gradient reaches the model.
        weight: factor of its loss l in the total. Or "uncertainty": the factor is learnt, by a log-variance s that is
            a parameter. The total gets l e⁻ˢ + s/2, with l/2 for l where the targets are numbers (Kendall, Gal and
            Cipolla 2018, https://arxiv.org/abs/1705.07115, equation 10), and nothing from a batch without targets.
        bias: whether there is a b.
        dtype: of the parameters and of the computation, such as `torch.bfloat16` or its name; the name is kept.
        activation: "sigmoid", "softmax", "tanh" or another activation of transformers: of the prediction that users
            see. `mse`, `mse_of_each`, `mae`, `huber`, `quantile` and losses of one's own compare what it gives; the
            others, and a node with this one as `source`, get what comes before it.
        pool: makes one prediction per row, from the "mean" of the hidden states of the selected tokens, or
            from Σᵢ aᵢhᵢ with a = softmax(q·hᵢ/√width), q learnt from 0, the mean ("attention").
        ignore_index: an integer target that stands for none. For floats NaN does.
        class_weights: of cross_entropy, one per class: the loss is Σ wᵢlᵢ / Σ wᵢ.
        quantiles: of the loss quantile, one per output, each between 0 and 1.
        shift: compares the prediction at a token with the target of the next column, as a language model does.
        trainable: `False`: the parameters are saved and not trained.
        lr: learning rate of its parameters in an `InterventionTrainer`; `None`: that of the others. The scheduler
            scales both alike.

    Raises:
        ValueError: options that cannot be or do not go together; in a forward pass, a target of a shape that
            does not fit, or of a value that the loss has no meaning for.

    Example:
        ```python
        >>> from dataclasses import dataclass
        >>> import reftheads as rh
        >>> from reftheads.interventions import MappingHead
        >>> @dataclass(frozen=True)
        ... class Bottleneck(MappingHead):
        ...     def layers_of(self, width):
        ...         return [self.linear(width, 2, bias=False), self.linear(2, self.outputs)]
        ...     def map(self, p, h):
        ...         return h @ p["W0"].T @ p["W1"].T + p["b1"]
        >>> graph = rh.InterventionGraph(rh.Node(Bottleneck(3, "mood"), layer=2, positions="l1", name="mood"))
        >>> [*rh.InterventionModel(rh.load_base("tiny-chat")[0], graph).node("mood").stored()]
        ['W0', 'W1', 'b1']
        ```
    """

    outputs: int
    target: str | None = None
    loss: str = "cross_entropy"
    detach: bool = False
    weight: float | Literal["uncertainty"] = 1.0
    bias: bool = True
    dtype: str | torch.dtype = "float32"
    activation: str | None = None
    pool: Literal["mean", "attention"] | None = None
    ignore_index: int = IGNORE
    class_weights: tuple[float, ...] | None = None
    quantiles: tuple[float, ...] | None = None
    shift: bool = False
    trainable: bool = True
    lr: float | None = None

    def __post_init__(self) -> None:
        _check_count("outputs", self.outputs, self)
        if self.loss not in losses:
            raise ValueError(f"unknown loss {self.loss!r}: use one of {', '.join(losses)}")
        if self.criterion.outputs not in (None, self.outputs):
            raise ValueError(f"loss {self.loss!r} is for outputs={self.criterion.outputs}, got outputs={self.outputs}")
        if self.outputs == 1 and self.loss == "cross_entropy" and self.target is not None:
            raise ValueError("cross_entropy over one class is always 0: use loss='mse', loss='bce' or more outputs")
        if self.activation is not None:
            _activation(self.activation)
        if self.weight != "uncertainty" and not (type(self.weight) in (int, float) and 0 <= self.weight < math.inf):  # type: ignore[operator]
            raise ValueError(f"weight must be a number of 0 or more, or 'uncertainty', got {self.weight!r}")
        if self.weight == "uncertainty" and self.loss == "gaussian_nll":
            raise ValueError(
                "gaussian_nll learns a variance of its own, and has no lower bound: give it a fixed weight"
            )
        if self.pool not in (None, "mean", "attention"):
            raise ValueError(f"pool must be 'mean', 'attention' or None, got {self.pool!r}")
        if self.pool is not None and self.shift:
            raise ValueError("shift=True is about the next token, and pool makes one prediction a row: leave one out")
        if self.class_weights is not None:
            self._check_each("class_weights", self.class_weights, "cross_entropy", 0, math.inf)
        if self.loss == "quantile" and self.quantiles is None:
            raise ValueError("loss 'quantile' needs quantiles=(…), one an output, such as (0.1, 0.5, 0.9)")
        if self.quantiles is not None:
            self._check_each("quantiles", self.quantiles, "quantile", 0, 1)
        if self.lr is not None and not (isinstance(self.lr, int | float) and self.lr >= 0):
            raise ValueError(f"lr must be a learning rate of 0 or more, or None for the trainer's own, got {self.lr!r}")
        keep_name_of_dtype(self)

    def _check_each(self, option: str, values: tuple[float, ...], loss: str, low: float, high: float) -> None:
        """Raise `ValueError` for an option of another loss, or whose values are not one number per output."""
        if self.loss != loss:
            raise ValueError(f"{option} belong to loss={loss!r}, got loss={self.loss!r}: leave them out")
        if not isinstance(values, tuple) or len(values) != self.outputs or not all(low <= v <= high for v in values):
            raise ValueError(
                f"{option} must be a tuple of outputs={self.outputs} numbers from {low} to {high}, got {values!r}"
            )

    @property
    def criterion(self) -> Loss:
        """Return its loss, with what that says of targets."""
        loss = Loss.of(losses[self.loss])
        return loss if self.quantiles is None else replace(loss, items=partial(quantile_loss, self.quantiles))

    @property
    def pools(self) -> bool:
        """Return whether it makes one prediction per row."""
        return self.pool is not None

    @property
    def kind(self) -> str | None:
        """Return what its targets are, see `Loss`."""
        return self.criterion.kind

    @property
    def target_width(self) -> int | None:
        """Return how many numbers a target is; `None`: one, without a dimension of its own."""
        return self.outputs if self.criterion.each else None

    @abstractmethod
    def layers_of(self, width: int) -> list[nn.Linear]:
        """Make new linear maps, from hidden states of this width to the outputs."""

    @abstractmethod
    def map(self, p: Params, h: Float[Tensor, "batch slots width"]) -> Float[Tensor, "batch slots outputs"]:
        """Return the prediction before its activation."""

    def linear(self, width: int, outputs: int, bias: bool = True) -> nn.Linear:
        """Make a new linear map as the options have it."""
        return nn.Linear(width, outputs, bias=self.bias and bias, dtype=read_dtype(self.dtype))

    def named(self, layers: list[nn.Linear]) -> dict[str, Tensor]:
        """Return the parameters of linear maps by name: W0, b0, W1 …"""
        parameters: dict[str, Tensor] = {}
        for i, linear in enumerate(layers):
            parameters[f"W{i}"] = linear.weight
            if linear.bias is not None:
                parameters[f"b{i}"] = linear.bias
        return parameters

    def parameters(self, shape: Shape) -> dict[str, Tensor]:
        parameters = self.named(self.layers_of(shape.width))
        if self.pool == "attention":
            parameters["q"] = nn.Parameter(torch.zeros(shape.width, dtype=read_dtype(self.dtype)))
        if self.weight == "uncertainty":
            parameters["s"] = nn.Parameter(torch.zeros((), dtype=read_dtype(self.dtype)))
        return parameters if self.trainable else {name: tensor.detach() for name, tensor in parameters.items()}

    def read(
        self, p: Params, h: Float[Tensor, "batch slots width"], context: Context
    ) -> Float[Tensor, " batch #slots outputs"]:
        return self.map(p, h if self.pool is None else self._pooled(p, h, context.valid))

    def _pooled(
        self, p: Params, h: Float[Tensor, "batch slots width"], valid: Bool[Tensor, "batch slots"] | None
    ) -> Float[Tensor, "batch 1 width"]:
        """Return the mean of a row's valid slots, or their mean by learnt weights."""
        valid = h.new_ones(h.shape[:2], dtype=torch.bool) if valid is None else valid
        h = h.masked_fill(~valid[..., None], 0)  # padding may be NaN
        if self.pool == "mean":
            return h.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp(min=1)
        scores = h @ p["q"] / math.sqrt(h.shape[-1])
        # not -inf: a row without a token would be NaN
        weights = scores.masked_fill(~valid, torch.finfo(h.dtype).min).softmax(1)
        return (weights[..., None] * h).sum(1, keepdim=True)

    def shown(self, value: Float[Tensor, "*items outputs"]) -> Float[Tensor, "*items outputs"]:
        return value if self.activation is None else _activation(self.activation)(value)

    def check(self, target: Tensor, where: str = "row {row}", valid: Tensor | None = None) -> None:
        loss = self.criterion
        wrong, allowed = loss.wrong(target, self.outputs)
        wrong = wrong & loss.given(target, self.ignore_index)
        if valid is not None:
            wrong = wrong & (valid[..., None] if loss.each else valid)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"target {self.target!r} in {where.format(row=at[0])} is {target[at].item()}, but the loss "
                f"{self.loss!r} of outputs={self.outputs} takes {allowed}; {self.ignore_index} or NaN stands for none"
            )

    def loss_of(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if self.criterion.activated:
            prediction = self.shown(prediction)
        return masked_mean(self.criterion, prediction, target, valid, self.ignore_index, self.class_weights)

    def weighted(self, loss: Tensor, count: Tensor, p: Params) -> Tensor:
        if self.weight != "uncertainty":
            return self.weight * loss
        s, factor = p["s"], 0.5 if self.kind == "numbers" else 1
        return torch.where(count > 0, factor * loss * (-s).exp() + s / 2, 0)

    def given(self, target: Tensor) -> Tensor:
        return self.criterion.given(target, self.ignore_index)


@dataclass(frozen=True)
class LinearHead(MappingHead):
    """Predict by a linear map of the hidden states: W h + b.

    `outputs` is how many numbers it predicts, `target` the column of the batch to learn. `MappingHead` explains the
    other options and the errors.

    Example:
        ```python
        >>> import torch
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> head = rh.Node(rh.LinearHead(outputs=2, target="mood"), layer=-1, positions="l1", name="mood")
        >>> model = rh.InterventionModel(base, rh.InterventionGraph(head))
        >>> out = model(**tokenizer("Hi!", return_tensors="pt"), mood=torch.tensor([1]))
        >>> out.predictions["mood"].shape, torch.equal(out.loss, out.losses["mood"])
        (torch.Size([1, 2]), True)
        ```
    """

    def layers_of(self, width: int) -> list[nn.Linear]:
        return [self.linear(width, self.outputs)]

    def named(self, layers: list[nn.Linear]) -> dict[str, Tensor]:
        return {name.removesuffix("0"): tensor for name, tensor in super().named(layers).items()}

    def map(self, p: Params, h: Float[Tensor, "batch slots width"]) -> Float[Tensor, "batch slots outputs"]:
        return F.linear(h, p["W"], p.get("b"))


@dataclass(frozen=True)
class MLPHead(MappingHead):
    """Predict by linear maps with an activation between them: Wₙ φ(… φ(W₀ h + b₀) …) + bₙ, n = layers.

    Args:
        hidden: width of each hidden layer.
        layers: how many hidden layers there are.
        act_fn: φ: name of an activation of transformers.
        output_bias: whether there is a bₙ, if there are biases at all.

    The other arguments, and what else is raised, are those of `MappingHead`.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.graph import Shape
        >>> head = rh.MLPHead(outputs=3, target="mood", hidden=16, pool="mean", activation="softmax")
        >>> {name: tuple(p.shape) for name, p in head.parameters(Shape(width=32)).items()}
        {'W0': (16, 32), 'b0': (16,), 'W1': (3, 16), 'b1': (3,)}
        ```
    """

    hidden: int = field(kw_only=True)
    layers: int = field(default=1, kw_only=True)
    act_fn: str = field(default="gelu", kw_only=True)
    output_bias: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("hidden", self.hidden, self)
        _check_count("layers", self.layers, self)
        if self.layers > _MOST_LAYERS:
            raise ValueError(f"layers of MLPHead must be at most {_MOST_LAYERS}, got {self.layers:,}")
        if self.act_fn not in ACT2FN:
            raise ValueError(f"unknown act_fn {self.act_fn!r}: use one of {', '.join(sorted(ACT2FN))}")

    def layers_of(self, width: int) -> list[nn.Linear]:
        widths = [width, *[self.hidden] * self.layers]
        inner = [self.linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        return [*inner, self.linear(self.hidden, self.outputs, self.output_bias)]

    def map(self, p: Params, h: Float[Tensor, "batch slots width"]) -> Float[Tensor, "batch slots outputs"]:
        for i in range(self.layers):
            h = ACT2FN[self.act_fn](F.linear(h, p[f"W{i}"], p.get(f"b{i}")))
        return F.linear(h, p[f"W{self.layers}"], p.get(f"b{self.layers}"))


def _softmax(value: Tensor) -> Tensor:
    return value.softmax(-1)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of this name. Raise `ValueError` if there is none."""
    if name == "softmax":
        return _softmax
    if name not in ACT2FN:
        raise ValueError(f"unknown activation {name!r}: use one of softmax, {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


def _check_count(option: str, value: int, head: MappingHead) -> None:
    """Raise `ValueError` for an option that is no positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} of {type(head).__name__} must be a positive integer, got {value!r}")

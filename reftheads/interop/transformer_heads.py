"""Head configurations of transformer-heads as a graph: `HeadConfig` is read as that library reads it.

    from reftheads.interop.transformer_heads import HeadConfig, graph_of
    model = rh.InterventionModel(base, graph_of([HeadConfig(name="sentiment", in_size=768, num_outputs=2)], base))

docs/transformer-heads.md says of each field and function what it has become. An adapter of these heads
is loaded after this module has been imported, if it has an MLP without `output_bias` or a regression of
several numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import nn

from reftheads._utils.showing import shown
from reftheads.architectures.addresses import locate
from reftheads.architectures.structure import StackInfo, stacks
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Node
from reftheads.graph.serialisation import fits, in_words, types_of
from reftheads.graph.site import Site
from reftheads.interventions.heads import LinearHead, MappingHead, MLPHead


@dataclass(frozen=True)
class HeadConfig:
    """Describe one head by the fields of transformer-heads, with its defaults.

    Args:
        name: of the head in outputs, and of its node.
        in_size: width of the hidden states; checked against the model.
        num_outputs: numbers that it predicts; `None` is 1.
        layer_hook: index into the L + 1 hidden states of a model of L blocks: 0 is what enters the first block, i
            what leaves block i - 1, and L what leaves the final norm. Negative ones count from the end: -1 is
            after the final norm, -2 the output of the last block but one.
        hidden_size: width of the hidden layers of an MLP.
        num_layers: linear maps with ReLU between them; 1 is a linear head.
        output_activation: of the prediction; "linear" is none.
        target: column of the batch with its targets; `name` if left out.
        is_causal_lm: whether a token's prediction is compared with the target of the next column.
        pred_for_sequence: whether it predicts at the last token of a row, instead of at every token.
        is_regression: whether targets are numbers rather than classes.
        output_bias: whether the last linear map has a bias; those before it always have.
        loss_fct: "cross_entropy", "mse", "bce", or another name in `reftheads.losses`. `None`: no loss.
        trainable: whether its parameters are trained.
        loss_weight: factor of its loss in the total.
        ignore_pads: `True`, which is all there is here: padding does not count. `None`: not `is_causal_lm`.
        block_gradients: whether no gradient reaches the model.

    Raises:
        ValueError: a field that transformer-heads does not have, or a head that is to be of two kinds.

    Example:
        ```python
        >>> from reftheads.interop import HeadConfig
        >>> HeadConfig(name="mood", in_size=192, num_outputs=2, pred_for_sequence=True).target
        'mood'
        ```
    """

    name: str
    in_size: int
    num_outputs: int | None
    layer_hook: int = -1
    hidden_size: int = 0
    num_layers: int = 1
    output_activation: str = "linear"
    target: str | None = None
    is_causal_lm: bool | None = False
    pred_for_sequence: bool | None = False
    is_regression: bool | None = False
    output_bias: bool | None = False
    loss_fct: str | None = "cross_entropy"
    trainable: bool | None = True
    loss_weight: float | None = 1.0
    ignore_pads: bool | None = None
    block_gradients: bool | None = False

    def __new__(cls, /, *args: Any, **given: Any):
        known = [f.name for f in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"HeadConfig has no field {unknown[0]!r}: use {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.is_causal_lm and self.pred_for_sequence:
            raise ValueError(
                f"head {self.name!r} cannot be both is_causal_lm, a prediction a token, and pred_for_sequence, one a "
                "row: set one of them to False"
            )
        if self.ignore_pads is None:
            object.__setattr__(self, "ignore_pads", not self.is_causal_lm)
        if self.target is None:
            object.__setattr__(self, "target", self.name)


def graph_of(configs: Iterable[HeadConfig | Mapping[str, Any]], base: nn.Module) -> InterventionGraph:
    """Make a graph of these heads: a node for each, under its name.

    Heads predict as they do in transformer-heads, but for two mistakes of that library: here lengths come from the
    `attention_mask` instead of the first pad token, and for a head that predicts at every token the last one of a row
    counts too.

    Args:
        configs: of the heads; or their fields as mappings, such as the values of a `head_configs.json`.
        base: the model that they are for.

    Raises:
        ValueError: a head that the model has no place for, that is computed from something else here, or that
            has options which do not go together; it names the head.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.interop import HeadConfig, graph_of
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> config = HeadConfig(name="mood", in_size=192, num_outputs=2, layer_hook=-2, pred_for_sequence=True)
        >>> print(graph_of([config], base))
        node  what                                             where            positions
        mood  LinearHead(outputs=2, target='mood', bias=False)  block_output[4]  l1
        ```
    """
    nodes = []
    for config in configs:
        config = config if isinstance(config, HeadConfig) else _read(config)
        try:
            nodes.append(_node(config, base))
        except ValueError as error:
            raise ValueError(f"head {config.name!r}: {error}") from error
    return InterventionGraph(*nodes)


def _read(values: Mapping[str, Any]) -> HeadConfig:
    """Return the configuration of a head whose fields a file holds."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a head is described by an object of its fields, got {shown(values)}")
    types = types_of(HeadConfig)
    for name, value in values.items():
        if name in types and not fits(value, types[name]):
            raise ValueError(f"{name} of HeadConfig must be {in_words(types[name])}, got {shown(value)}")
    missing = [f.name for f in fields(HeadConfig) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"HeadConfig needs {missing[0]!r}, which is not in {shown(dict(values))}")
    return HeadConfig(**values)


def _node(config: HeadConfig, base: nn.Module) -> Node:
    if config.name == "lm_head":
        raise ValueError(
            "this name means the model's own output layer, which stays where it is: leave the head out, take "
            "out.logits, and pass labels for its loss; for a copy that is trained, choose another name and set its "
            "weights by model.node(name).assign(W=base.get_output_embeddings().weight)"
        )
    site = _site(config.layer_hook, base)
    width = locate(base, site).width
    if config.in_size != width:
        raise ValueError(f"in_size is {config.in_size}, but this {type(base).__name__} has width {width}")
    if not config.ignore_pads and not config.is_causal_lm:
        warnings.warn(
            f"head {config.name!r} has ignore_pads=False, but here padding never counts: a row's prediction is at its "
            "last real token (the last column, where batches are padded at the left)",
            stacklevel=3,
        )
    return Node(
        _head(config), site.layer, site.component, "l1" if config.pred_for_sequence else "all", name=config.name
    )


def _site(hook: int, base: nn.Module) -> Site:
    """Return the site at which an entry of a model's `hidden_states` is computed."""
    stack = _only_stack(base)
    count = len(stack.blocks)
    if not -count - 1 <= hook <= count:
        raise ValueError(
            f"layer_hook is {hook}, but the hidden states of this {type(base).__name__} of {count} blocks have indices "
            f"from {-count - 1} to {count}"
        )
    index = hook % (count + 1)
    if index == 0:
        return Site(component="embedding_output")
    if index == count and stack.final_norm is not None:
        return Site(component="final_norm_output")
    return Site(index - 1)


def _only_stack(base: nn.Module) -> StackInfo:
    in_stacks = stacks(base)
    if len(in_stacks) != 1:
        raise ValueError(
            f"this {type(base).__name__} has {len(in_stacks)} stacks of blocks, and layer_hook does not say which is "
            "meant: write a Node with LinearHead or MLPHead and its place"
        )
    return in_stacks[0]


def _head(config: HeadConfig) -> MappingHead:
    outputs = config.num_outputs or 1
    options: dict[str, Any] = {
        "outputs": outputs,
        "target": None if config.loss_fct is None else config.target,
        "loss": _loss(config, outputs),
        "detach": bool(config.block_gradients),
        "weight": config.loss_weight,
        "activation": None if config.output_activation == "linear" else config.output_activation,
        "shift": bool(config.is_causal_lm),
        "trainable": bool(config.trainable),
    }
    if config.num_layers == 1:
        return LinearHead(bias=bool(config.output_bias), **options)
    if config.num_layers < 1 or config.hidden_size < 1:
        raise ValueError(
            f"an MLP needs num_layers of 2 or more and its hidden_size, got num_layers={config.num_layers} and "
            f"hidden_size={config.hidden_size}; num_layers=1 is a linear head"
        )
    biased = bool(config.output_bias)
    return MLPHead(
        hidden=config.hidden_size, layers=config.num_layers - 1, act_fn="relu", output_bias=biased, **options
    )


def _loss(config: HeadConfig, outputs: int) -> str:
    """Return our name of the loss, which here gets what its formula needs, before or after the activation."""
    name, activation = config.loss_fct, config.output_activation
    if name is None:
        return "cross_entropy"  # without a target it is never computed
    if name == "cross_entropy" and activation != "linear":
        raise ValueError(
            f"cross_entropy takes the prediction before any activation, and there it got it behind {activation!r}: "
            "set output_activation='linear'"
        )
    if name == "cross_entropy" and config.is_regression:
        raise ValueError("cross_entropy is about classes: set is_regression=False, or loss_fct='mse'")
    if name == "bce" and activation != "sigmoid":
        raise ValueError(f"bce compares probabilities, got output_activation={activation!r}: set it to 'sigmoid'")
    if name == "mse" and not config.is_regression:
        warnings.warn(
            f"head {config.name!r} has loss_fct='mse' and is_regression=False, by which there each prediction was "
            "compared with the targets of all: here it is compared with its own",
            stacklevel=5,
        )
    several = {"bce": "multi_label", "mse": "mse_of_each"}
    return several.get(name, name) if outputs > 1 else name

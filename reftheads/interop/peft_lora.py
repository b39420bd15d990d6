"""LoRA nodes to and from PEFT's LoRA, and merging through it.

A `LoRA` node and a LoRA layer of PEFT compute the same: W x + (α/r) B A x. Where a node edits some
columns of a fused projection, B gets rows of zeros for the others; several nodes on one module become
one layer whose rank is the sum of theirs, with every α/r folded into B.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reftheads._utils.atomic import filling
from reftheads._utils.deprecation import renamed
from reftheads._utils.showing import shown
from reftheads.adapter.config import InterventionConfig
from reftheads.adapter.files import CONFIG, WEIGHTS, find_file, read_object, read_weights
from reftheads.adapter.model import InterventionModel
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Node
from reftheads.graph.serialisation import fits, in_words
from reftheads.interventions.lora import LoRA
from reftheads.presets import lora_name
from reftheads.runtime.plan import PlannedNode

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
# Options of PEFT under which a layer computes something else than W x + (α/r) B A x …
_OTHER_FORMULA = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters", "kasa_config",
    "alora_invocation_tokens", "arrow_config", "monteclora_config", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
# … unless these have one of these values: other initialisations (PiSSA, OLoRA …) take something out of W.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
# What is read, with PEFT's defaults and types.
_FORMULA: dict[str, tuple[Any, Any]] = {
    "lora_alpha": (8, float), "lora_dropout": (0.0, float), "alpha_pattern": (None, dict | None),
    "use_rslora": (False, bool), "bias": ("none", str), "init_lora_weights": (True, bool | str),
    "base_model_name_or_path": (None, str | None), "task_type": (None, str | None),
}  # fmt: skip


@renamed(adapter="adapter_name")
def to_peft_lora(model: InterventionModel, directory: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Write an adapter made of LoRA nodes as a LoRA checkpoint of PEFT.

    `peft.PeftModel.from_pretrained(base, directory)` then computes what `model` does.

    Args:
        directory: gets `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: which one; the (first) active one if left out.

    Raises:
        ValueError: a node that PEFT cannot express: another type than LoRA, positions other than
            `"all"`, or nodes of different dropout. Nothing is written then.

    Example:
        ```python
        >>> import os, tempfile
        >>> import reftheads as rh
        >>> from reftheads.interop import to_peft_lora
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model, directory = rh.InterventionModel(base, rh.preset("lora4", base)), tempfile.mkdtemp()
        >>> to_peft_lora(model, directory)
        >>> sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
        ```
    """
    layers = _layers(model, adapter_name)
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1 or None in dropouts:
        raise ValueError("the LoRA nodes differ in dropout, and PEFT knows one for all: give them the same")
    config = _config(model, layers, adapter_name)
    config.lora_dropout = dropouts.pop() or 0.0
    config.inference_mode = True
    with filling(directory, first=(WEIGHTS,)) as folder:
        config.save_pretrained(str(folder))
        save_file(_state_dict(layers), folder / WEIGHTS, metadata={"format": "pt"})


def from_peft_lora(
    base: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **hub: Any,
) -> InterventionModel:
    """Load a LoRA checkpoint of PEFT as a graph with a LoRA node at every module that it adapts.

    Args:
        base: the model that it was trained on; the graph is compiled into it.
        model_id: a directory, or the id of a Hub repository.
        adapter_name: under which the parameters are kept.
        is_trainable: whether to go on training it.
        hub: such as `revision` or `subfolder`.

    Raises:
        ValueError: a checkpoint that is no LoRA, is not in safetensors, is damaged, does not fit the model,
            or uses an option that changes LoRA's formula (DoRA, `modules_to_save`, PiSSA …). The base
            model is then as it was.

    Example:
        ```python
        >>> import tempfile
        >>> import reftheads as rh
        >>> from peft import LoraConfig, get_peft_model
        >>> from reftheads.interop import from_peft_lora
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> lora, directory = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])), tempfile.mkdtemp()
        >>> lora.save_pretrained(directory)
        >>> model = from_peft_lora(lora.unload(), directory)
        >>> len(model.plan().graph), model.node("lora_model_layers_0_self_attn_q_proj").A.shape
        (6, torch.Size([4, 192]))
        ```
    """
    config = _read_config(os.fspath(model_id), **hub)
    nodes, weights = [], {}
    for module, pair in _read(os.fspath(model_id), **hub).items():
        if "." not in module:
            raise ValueError(f"{model_id} adapts {module!r}, where nodes do not act: they act within the blocks")
        rank = pair["A"].shape[0]
        patterns = config["alpha_pattern"] or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
        alpha = alpha * rank**0.5 if config["use_rslora"] else alpha
        dtype = str(pair["A"].dtype).removeprefix("torch.")
        name = lora_name(module)
        nodes.append(Node(LoRA(rank, alpha, config["lora_dropout"], dtype), component=module, name=name))
        weights[name] = pair
    graph_config = InterventionConfig(
        graph=InterventionGraph(*nodes), inference_mode=not is_trainable,
        base_model_name_or_path=config["base_model_name_or_path"], task_type=config["task_type"],
    )  # fmt: skip
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    model = InterventionModel(base, graph_config, adapter_name)
    try:
        for name, pair in weights.items():
            model.node(name).assign(**pair)
    except ValueError:
        model.tuner.unload()
        for parameter in trainable:
            parameter.requires_grad = True
        raise
    return model


@renamed(adapter="adapter_name")
def merge_lora(model: InterventionModel, adapter_name: str | None = None) -> nn.Module:
    """Return the base model with an adapter's LoRA nodes merged into its weights, through PEFT.

    The model itself is used up: all its adapters and hooks are gone from the base model.

    Args:
        adapter_name: which one; the (first) active one if left out.

    Raises:
        ValueError: a node that cannot be merged, as in `to_peft_lora`, or weights that are not finite.
            The model is then as it was.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.interop import merge_lora
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.preset("lora4", base))
        >>> merged_base = merge_lora(model)  # has save_pretrained of its own
        >>> merged_base is base, hasattr(base, "interventions")
        (True, False)
        ```
    """
    layers = _layers(model, adapter_name)
    for path, layer in layers.items():
        if not (layer.a.isfinite().all() and layer.b.isfinite().all()):
            raise ValueError(f"the LoRA of {path!r} has weights that are not finite: it cannot be merged")
    config = _config(model, layers, adapter_name)
    lora = get_peft_model(model.tuner.unload(), config)  # type: ignore[arg-type]
    set_peft_model_state_dict(lora, _state_dict(layers))
    return lora.merge_and_unload()  # type: ignore[operator]


@renamed(adapter="adapter_name")
@contextmanager
def merged(model: InterventionModel, adapter_name: str | None = None) -> Iterator[InterventionModel]:
    """Make an adapter's LoRA nodes part of the base model's weights for a while, so that they take no time.

    W + α/r · B A is rounded once, from float64. Afterwards the weights are as they were, bit for bit.

    Args:
        adapter_name: which one; the (first) active one if left out.

    Raises:
        ValueError: a node that cannot be merged, as in `to_peft_lora`, several adapters that act, or a base model
            that is quantised.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.interop import merged
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> model = rh.InterventionModel(base, rh.preset("lora4", base))
        >>> with merged(model):
        ...     rh.reply(model, tokenizer, ["Tell me about owls."], max_new_tokens=6)
        ['Owls are birds that']
        ```
    """
    layers = _layers(model, adapter_name)
    if len(model.tuner.active_adapters) > 1:
        raise ValueError(
            f"several adapters act, {', '.join(model.tuner.active_adapters)}: leave one by set_adapter(name)"
        )
    weights = {path: model.tuner.model.get_submodule(path).weight for path in layers}
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise ValueError("the base model is quantised, so that nothing can be merged into its weights exactly")
    before = {path: weight.data for path, weight in weights.items()}
    try:
        for path, layer in layers.items():
            added = layer.alpha / layer.rank * layer.b.double() @ layer.a.double()
            exact = before[path].double() + (added.T if layer.transposed else added)
            weights[path].data = exact.to(before[path].dtype)
        with model.disable_adapter():
            yield model
    finally:
        for path, data in before.items():
            weights[path].data = data


@dataclass(frozen=True)
class _Layer:
    """Hold what one LoRA layer of PEFT is."""

    a: Tensor  # [rank inputs]
    b: Tensor  # [outputs rank]
    alpha: float
    dropout: float | None  # None: its nodes differ
    transposed: bool  # whether the module is a Conv1D

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def _layers(model: InterventionModel, adapter_name: str | None) -> dict[str, _Layer]:
    """Return the layers by the paths of their modules.

    Raises:
        ValueError: a node that PEFT's LoRA cannot express.
    """
    grouped: dict[str, list[PlannedNode]] = {}
    for planned in model.plan(adapter_name).nodes:
        name, intervention, positions = planned.node.name, planned.node.intervention, planned.node.positions
        if not isinstance(intervention, LoRA):
            raise ValueError(
                f"node {name!r} is a {type(intervention).__name__}, which PEFT's LoRA cannot express: keep it in an "
                "adapter of its own"
            )
        if str(positions) != "all":
            raise ValueError(
                f"node {name!r} acts on positions {str(positions)!r}, and PEFT's LoRA on every token: only nodes with "
                "positions='all' can be converted or merged"
            )
        grouped.setdefault(planned.address.module, []).append(planned)
    return {path: _layer(model, adapter_name, path, nodes) for path, nodes in grouped.items()}


def _layer(model: InterventionModel, adapter_name: str | None, path: str, nodes: list[PlannedNode]) -> _Layer:
    module = model.tuner.model.get_submodule(path)
    outputs = getattr(module, "nf" if isinstance(module, Conv1D) else "out_features")
    a, b, interventions = [], [], []
    for planned in nodes:
        intervention, stored = planned.node.intervention, model.node(str(planned.node.name), adapter_name).stored()
        assert isinstance(intervention, LoRA)
        rows = stored["B"].new_zeros(outputs, intervention.rank)
        rows[planned.address.index] = stored["B"].detach()
        a.append(stored["A"].detach())
        b.append(rows if len(nodes) == 1 else intervention.scaling * rows)
        interventions.append(intervention)
    first, rank = interventions[0], sum(i.rank for i in interventions)
    alpha = rank if first.alpha is None or len(nodes) > 1 else first.alpha
    dropout = first.dropout if all(i.dropout == first.dropout for i in interventions) else None
    return _Layer(torch.cat(a), torch.cat(b, dim=1), alpha, dropout, isinstance(module, Conv1D))


def _config(model: InterventionModel, layers: dict[str, _Layer], adapter_name: str | None) -> LoraConfig:
    first = next(iter(layers.values()))
    ours = model.peft_config[adapter_name or model.tuner.active_adapters[0]]
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        target_modules=list(layers),
        rank_pattern={path: layer.rank for path, layer in layers.items() if layer.rank != first.rank},
        alpha_pattern={path: layer.alpha for path, layer in layers.items() if layer.alpha != first.alpha},
        fan_in_fan_out=all(layer.transposed for layer in layers.values()),
        base_model_name_or_path=ours.base_model_name_or_path,
        task_type=ours.task_type,
    )


def _state_dict(layers: dict[str, _Layer]) -> dict[str, Tensor]:
    named = {f"{_PREFIX}{path}.lora_A.weight": layer.a for path, layer in layers.items()}
    named |= {f"{_PREFIX}{path}.lora_B.weight": layer.b for path, layer in layers.items()}
    return {key: tensor.cpu().contiguous() for key, tensor in named.items()}


def _read_config(model_id: str, **hub: Any) -> dict[str, Any]:
    """Return what a LoRA checkpoint of PEFT says of its formula.

    Raises:
        ValueError: no LoRA, an option under which it computes something else, or a value that cannot be.
    """
    file = find_file(model_id, CONFIG, **hub)
    if file is None:
        raise ValueError(f"{model_id} holds no {CONFIG}: give the directory or Hub id of an adapter")
    fields = read_object(file)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{model_id} holds a {shown(fields.get('peft_type'))} adapter, not a LoRA: load it by peft")
    config = {name: fields.get(name, default) for name, (default, _) in _FORMULA.items()}
    for name, value in config.items():
        if not fits(value, _FORMULA[name][1]):
            raise ValueError(f"{name} in {file} must be {in_words(_FORMULA[name][1])}, got {shown(value)}")
    used = [name for name in _OTHER_FORMULA if fields.get(name)]
    used += [f"{name}={config[name]!r}" for name in ("bias", "init_lora_weights") if config[name] not in _PLAIN[name]]
    if used:
        raise ValueError(
            f"{model_id} uses {', '.join(used)}, for which a LoRA node has no counterpart: load it by peft"
        )
    for pattern, alpha in (config["alpha_pattern"] or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"alpha_pattern in {file} has {shown(pattern)}, which is no pattern: {error}") from error
        if not fits(alpha, float):
            raise ValueError(f"alpha_pattern in {file} must hold numbers, got {shown(alpha)}")
    return config


def _read(model_id: str, **hub: Any) -> dict[str, dict[str, Tensor]]:
    """Read a checkpoint as `{module: {"A": …, "B": …}}`.

    Raises:
        ValueError: anything else in it.
    """
    file = find_file(model_id, WEIGHTS, **hub)
    if file is None:
        raise ValueError(f"{model_id} holds no {WEIGHTS}: a LoRA is read from safetensors only, never from a pickle")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(file)[0].items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file} holds {shown(key)}, for which a LoRA node has no counterpart: load it by peft")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{file} holds {shown(key)}, which is no matrix of floats: it is damaged, copy it again")
        pairs.setdefault(match["module"], {})[match["letter"]] = tensor
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file} holds only one of the two factors of {module!r}: it is damaged, copy it again")
    if not pairs:
        raise ValueError(f"{file} holds no weights")
    return pairs

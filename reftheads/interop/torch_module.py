"""A head as a plain torch module, for programs that know nothing of graphs."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.activations import ACT2FN

from reftheads._utils.atomic import replacing
from reftheads._utils.deprecation import renamed
from reftheads.adapter.model import InterventionModel
from reftheads.interventions.heads import MappingHead, MLPHead
from reftheads.runtime.plan import PlannedNode

WEIGHTS = "head.safetensors"
DESCRIPTION = "head.json"

# torch's own modules for names under which transformers has modules of its own
_TANH_GELU = partial(nn.GELU, "tanh")
_TORCH = {
    "gelu": nn.GELU, "gelu_python": nn.GELU, "gelu_new": _TANH_GELU, "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU, "gelu_pytorch_tanh": _TANH_GELU, "gelu_python_tanh": _TANH_GELU,
    "silu": nn.SiLU, "linear": nn.Identity, "softmax": partial(nn.Softmax, -1),
}  # fmt: skip


@renamed(folder="directory")
def export_head(model: InterventionModel, name: str, directory: str | os.PathLike | None = None) -> nn.Module:
    """Copy a head as a module that needs torch alone: hidden states [… width] ↦ predictions [… outputs].

    It is an `nn.Linear`, or an `nn.Sequential` of linear maps and activations, the head's own `activation` last. It
    takes what the site gives at the selected tokens, in the head's dtype, and with `pool="mean"` their mean.

    Args:
        name: of the head, in the (first) active adapter.
        directory: gets `head.safetensors`, the state of the module, and `head.json`: its widths and activations, where
            in the model and on which tokens it reads, its target and loss.

    Raises:
        KeyError: no node of that name.
        ValueError: a node that is no linear or MLP head, `pool="attention"`, or an activation that torch has no
            module for; with `directory`, positions given by a function, which no file can hold.

    Example:
        ```python
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> head = rh.Node(rh.MLPHead(3, hidden=16, act_fn="gelu"), layer=2, positions="l1", name="mood")
        >>> rh.export_head(rh.InterventionModel(base, rh.InterventionGraph(head)), "mood")
        Sequential(
          (0): Linear(in_features=192, out_features=16, bias=True)
          (1): GELU(approximate='none')
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
        ```
    """
    planned, maps = head_maps(model, name)
    head = planned.node.intervention
    assert isinstance(head, MappingHead)
    if head.pool == "attention":
        raise ValueError(f"head {name!r} has pool='attention', which is no plain module: pool='mean' can be exported")
    modules: list[nn.Module] = [maps[0]]
    for linear in maps[1:]:
        assert isinstance(head, MLPHead)
        modules += [_activation(head.act_fn), linear]
    if head.activation is not None:
        modules.append(_activation(head.activation))
    module = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    if directory is not None:
        description = json.dumps(_describe(model, planned, maps), indent=2) + "\n"
        with replacing(Path(directory, DESCRIPTION)) as said, replacing(Path(directory, WEIGHTS)) as weights:
            save_file({name: tensor.cpu() for name, tensor in module.state_dict().items()}, weights)
            said.write_text(description, encoding="utf-8")
    return module


def head_maps(model: InterventionModel, name: str) -> tuple[PlannedNode, list[nn.Linear]]:
    """Return a head's place in the model, and copies of its linear maps in the order in which they act.

    Raises:
        KeyError: no node of that name.
        ValueError: a node that is no linear or MLP head.
    """
    module, planned = model.node(name), model.plan()[name]
    head = planned.node.intervention
    if not isinstance(head, MappingHead):
        raise ValueError(f"node {name!r} is a {type(head).__name__}: only a LinearHead or an MLPHead can be exported")
    with torch.device("meta"):  # weights that are replaced at once need no random numbers
        maps = head.layers_of(planned.shape.width)
    weights = [module.stored()[key].detach().clone() for key in head.named(maps)]
    all_maps = nn.ModuleList(maps)
    all_maps.load_state_dict(dict(zip(all_maps.state_dict(), weights, strict=True)), assign=True)
    return planned, maps


def _activation(name: str) -> nn.Module:
    module = _TORCH[name]() if name in _TORCH else ACT2FN[name]
    if not type(module).__module__.startswith("torch.") or list(module.parameters()):
        raise ValueError(f"torch has no module for the activation {name!r}: a head with it cannot be exported")
    return module


def _describe(model: InterventionModel, planned: PlannedNode, maps: list[nn.Linear]) -> dict[str, Any]:
    head, address = planned.node.intervention, planned.address
    assert isinstance(head, MappingHead)
    return {
        "name": planned.node.name,
        "widths": [maps[0].in_features, *(linear.out_features for linear in maps)],
        "biases": [linear.bias is not None for linear in maps],
        "act_fn": head.act_fn if isinstance(head, MLPHead) else None,
        "activation": head.activation,
        "dtype": head.dtype,
        "base_model": model.active_peft_config.base_model_name_or_path,
        "site": asdict(address.site),
        "module": f"{address.module}:{address.side}",
        "positions": planned.node.positions.to_json(),
        "pool": head.pool,
        "target": head.target,
        "loss": head.loss,
    }

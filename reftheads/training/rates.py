"""Learning rates of single nodes."""

import torch
from torch import nn

from reftheads.runtime.node_module import NodeModule


def own_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the parameters of nodes with a learning rate of their own a parameter group with that rate."""
    nodes = [module for module in model.modules() if isinstance(module, NodeModule)]
    rated = [(node, node.intervention.lr) for node in nodes if node.intervention.lr is not None]
    rates = {id(parameter): rate for node, rate in rated for parameter in node.parameters()}
    for group in list(optimizer.param_groups):
        for rate in dict.fromkeys(rates[id(p)] for p in group["params"] if id(p) in rates):
            options = {name: value for name, value in group.items() if name != "params"}
            moved = [p for p in group["params"] if rates.get(id(p)) == rate]
            group["params"] = [p for p in group["params"] if rates.get(id(p)) != rate]
            optimizer.add_param_group({**options, "params": moved, "lr": rate})

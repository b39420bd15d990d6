"""A model for each visitor, and one set of base weights for all of them."""

import copy
from itertools import chain

from reftheads.adapter.model import InterventionModel


def own_copy(model: InterventionModel) -> InterventionModel:
    """Return a copy whose base weights are the same tensors, and whose adapters are its own.

    Modules, hooks, modes and adapters are copied: adding, training and switching adapters there changes nothing here.
    """
    layer = model.tuner.layer
    of_nodes = {id(tensor) for tensor in chain(layer.parameters(), layer.buffers())}
    shared = [tensor for tensor in chain(model.parameters(), model.buffers()) if id(tensor) not in of_nodes]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})

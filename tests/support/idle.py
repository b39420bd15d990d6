"""Whether a model knows nothing of any call."""

from reftheads.runtime.interventions import Interventions
from reftheads.runtime.scope import Scope, call_of, scope_of


def idle(layer: Interventions) -> bool:
    """Return whether no call of the model is in progress here, and nothing holds for the next one."""
    return call_of(layer) is None and scope_of(layer) == Scope(layer)

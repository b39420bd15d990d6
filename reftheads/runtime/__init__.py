"""One forward pass of a base model with a graph: which nodes act, where, on which tokens, with which parameters."""

from reftheads.runtime.plan import Plan, compile_graph

__all__ = ["Plan", "compile_graph"]

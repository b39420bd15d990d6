"""What a user writes: nodes, each what at where on which tokens, and the graph of them. It knows no model."""

from reftheads.graph.graph import InterventionGraph
from reftheads.graph.node import Context, Edit, Head, Node, Reader, Shape
from reftheads.graph.positions import Positions, Tokens
from reftheads.graph.site import Site

__all__ = ["Context", "Edit", "Head", "InterventionGraph", "Node", "Positions", "Reader", "Shape", "Site", "Tokens"]

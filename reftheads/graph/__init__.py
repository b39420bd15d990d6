"""What a user writes: nodes, each what at where on which tokens, and the graph of them. It knows no model."""

from reftheads.graph.graph import InterventionGraph
from reftheads.graph.intervention import Constant, Context, Edit, Head, Intervention, Reader, Shape
from reftheads.graph.node import Node
from reftheads.graph.positions import Positions
from reftheads.graph.site import Site
from reftheads.graph.tokens import Tokens

__all__ = [
    "Constant", "Context", "Edit", "Head", "Intervention", "InterventionGraph", "Node", "Positions", "Reader", "Shape",
    "Site", "Tokens",
]  # fmt: skip

"""Reading the structure of any base model: its stacks, its blocks, and where in them a component is."""

from reftheads.architectures.address import Address
from reftheads.architectures.addresses import locate
from reftheads.architectures.structure import StackInfo, Structure, stacks

__all__ = ["Address", "StackInfo", "Structure", "locate", "stacks"]

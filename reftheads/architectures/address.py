"""What an address is, and what a pass through the model has shown of the tensor there."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from reftheads.architectures.paths import ancestors_of, parent
from reftheads.architectures.probe import Observation
from reftheads.architectures.small_pass import ROWS, TOKENS
from reftheads.architectures.structure import StackInfo, Structure
from reftheads.architectures.widths import Columns
from reftheads.graph.site import Side, Site

Form = Literal["rows", "columns", "filled"]
"""How a tensor holds tokens: "rows", [rows columns width], or [rows·columns width] as where OPT and mixtures of experts
flatten them; "columns", [columns rows width], as in FSMT; "filled", [rows columns+more width], as in Longformer, which
fills up its rows to a multiple of its window."""


@dataclass(frozen=True)
class Address:
    """Say where in one model a site is.

    Args:
        site: the site with layer and head counted from 0, and `stack` named only if the model has two.
        module: dotted path in the base model, for `model.get_submodule`.
        side: whether the tensor enters or leaves that module.
        width: features of the site, that is, of `h[..., address.index]`.
        columns: the features of the module's last dimension that belong to the site, in the order of
            the heads; `None` means all of them.
        stack: path of the stack's module, see `StackInfo.path`; "" if it is the model itself.
        form: of the tensor, see `Form`.
        order: (layer, rank within the block), which sorts the addresses of a stack in the order of
            execution: the embeddings have layer -1, the final norm comes after the last block. `None`
            for a module path whose place cannot be told.

    Example:
        ```python
        >>> import reftheads as rh
        >>> from reftheads.architectures import locate
        >>> address = locate(rh.load_base("tiny-chat")[0], rh.Site(layer=-1, component="query_output", head=1))
        >>> address.module, address.index, address.width
        ('model.layers.5.self_attn.q_proj', slice(32, 64, None), 32)
        ```
    """

    site: Site
    module: str
    side: Side
    width: int
    columns: Columns
    stack: str
    order: tuple[int, int] | None
    form: Form = "rows"

    @property
    def index(self) -> slice | list[int]:
        """Return what selects the site's features, `h[..., address.index]`: a slice, hence a view, if it can be."""
        if self.columns is None:
            return slice(None)
        if isinstance(self.columns, range):
            return slice(self.columns.start, self.columns.stop)
        return list(self.columns)


def as_seen(structure: Structure, info: StackInfo | None, address: Address) -> Address:
    """Return an address with the form and width of the tensor that was seen there.

    Raises:
        ValueError: the pass that was to reach the module did not, or showed a tensor of which no column belongs to a
            token.
    """
    observation, path = structure.observation, address.module
    of_blocks = None if info is None else structure.seen(info)
    reached = of_blocks is not None or (info is not None and not info.blocks and bool(observation.modules))
    if not reached:
        return address
    where = f"{address.side} of {path or 'the model'!r} in {name_of(structure.model)}"
    if path not in observation.modules:
        if _is_chosen(observation, path):
            return address
        raise ValueError(
            f"{path!r} does not run when {name_of(structure.model)} does, or under another name: nothing would happen "
            "there. Use the path of a module around it"
        )
    seen = observation.modules[path]
    shape = seen.entered if address.side == "input" else seen.left
    if shape is None:
        raise ValueError(
            f"the {where} is no tensor of one shape: nodes need [rows, columns, width]. Use another module's path"
        )
    of_text = of_blocks.of_text if of_blocks is not None else observation.of_text
    around = [of_blocks] if of_blocks is not None else [observation.lists.get(a) for a in ancestors_of(path)]
    form = _form(shape, of_text, {members.columns for members in around if members is not None})
    if form is None:
        raise ValueError(
            f"the {where} has the shape {list(shape)} for {ROWS} rows of {TOKENS} tokens, whose columns are not these "
            "tokens: use another module's path"
        )
    if seen.calls > 1 and of_blocks is not None and not address.site.is_path:
        raise ValueError(
            f"{path!r} runs {seen.calls} times in one pass of {name_of(structure.model)}, so that it has several "
            f"{address.site.component}s: its dotted path edits all of them"
        )
    width = shape[-1] if address.columns is None else address.width
    return replace(address, width=width, form=form)


def _form(shape: tuple[int, ...], of_text: bool, columns: set[int | None]) -> Form | None:
    """Return how a tensor that was seen holds the tokens of the pass; `None` if it does not.

    Args:
        columns: how many columns enter the blocks around it, where tokens stand first among them.
    """
    if not of_text:
        return "rows" if len(shape) == 3 and shape[0] == ROWS else None
    if shape[:-1] in ((ROWS, TOKENS), (ROWS * TOKENS,)):
        return "rows"
    if shape[:-1] == (TOKENS, ROWS):
        return "columns"
    # filled up to a multiple of a window before the blocks, not within one, and not one stream beside the other
    padded = len(shape) == 3 and shape[0] == ROWS and shape[1] > TOKENS and shape[1] % TOKENS
    return "filled" if padded and shape[1] in columns else None


def _is_chosen(observation: Observation, path: str) -> bool:
    """Return whether a module lies in a member of a list that did not run while others did: an expert not chosen."""
    above = [path, *ancestors_of(path)]
    return any(parent(member) in observation.lists and member not in observation.modules for member in above)


def model_type(model: nn.Module) -> str:
    """Return the type that a model's configuration names, or else its class."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def name_of(model: nn.Module) -> str:
    """Return how errors call the model."""
    return f"this {model_type(model)}"

"""The configuration of an adapter, and the member of `PeftType` by which PEFT knows the method.

PEFT takes a method from outside by `register_peft_method` (see `tuner`), but its `PeftType` is a closed enumeration;
`_add_peft_type` opens it for one member. That is the only step that PEFT does not offer.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from reftheads._utils.showing import shown
from reftheads.adapter.files import (
    CONFIG,
    WEIGHTS,
    check_seal,
    find_file,
    read_object,
    read_weights,
    refuse_pickle,
    seal,
)
from reftheads.adapter.fit import split
from reftheads.graph.graph import InterventionGraph
from reftheads.graph.serialisation import fits, in_words, types_of


def _add_peft_type(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


REFTHEADS = _add_peft_type("REFTHEADS")


@dataclass
class InterventionConfig(PeftConfig):
    """Configure an adapter: its graph, and what every configuration of PEFT has.

    Args:
        graph: what is done where; or what its `to_dict` gives.
        embeddings: names of those embeddings of the base model that are saved beside the nodes' parameters; saving
            writes them here. Nothing else of the base is ever loaded from an adapter.

    Raises:
        ValueError: no graph, or one that cannot be read; `modules_to_save`, for which nodes stand in.

    Example:
        ```python
        >>> import peft
        >>> import reftheads as rh
        >>> base, tokenizer = rh.load_base("tiny-chat")
        >>> config = rh.InterventionConfig(graph=rh.InterventionGraph.over(rh.LoReFT(rank=4), [2, 3]))
        >>> isinstance(peft.get_peft_model(base, config), peft.PeftModel)
        True
        ```
    """

    graph: Any = None
    embeddings: list[str] | None = None

    def __new__(cls, *args: Any, **options: Any):
        if options.get("modules_to_save"):
            raise ValueError(
                f"an intervention graph has no modules_to_save, got {shown(options['modules_to_save'])}: use a head, "
                "such as LinearHead, in place of a new classifier; to train a module of the base model, set "
                "requires_grad of its weights, and InterventionTrainer saves them"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFTHEADS
        if isinstance(self.graph, dict):
            self.graph = InterventionGraph.from_dict(self.graph)
        if not isinstance(self.graph, InterventionGraph):
            raise ValueError(f"InterventionConfig needs graph=InterventionGraph(…), got {shown(self.graph)}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values.

        Raises:
            ValueError: positions given by a function, which no file can hold.
        """
        fields = {name: value for name, value in self.__dict__.items() if name != "graph"}
        return {**fields, "graph": self.graph.to_dict()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the metadata of weights beside it that they belong together."""
        weights = Path(save_directory, WEIGHTS)
        if weights.exists():
            self.embeddings = sorted(split(read_weights(weights)[0])[1]) or None
        super().save_pretrained(save_directory, **kwargs)
        if weights.exists():
            seal(weights, self.graph.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "InterventionConfig":
        """Read the `adapter_config.json` of a directory or of a repository on the Hub.

        Weights beside it are checked too: that they are whole, and that they were saved with this graph.

        Args:
            pretrained_model_name_or_path: the directory, or the id of the repository.
            subfolder: of either.
            kwargs: such as `revision` or `token`.

        Raises:
            ValueError: no such file, a damaged one, one of another method; weights beside it that would need
                unpickling, have changed since they were saved, or were saved with another graph.
        """
        path = os.fspath(pretrained_model_name_or_path)
        config: Any = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        refuse_pickle(path, subfolder=subfolder, **kwargs)
        weights = find_file(path, WEIGHTS, subfolder=subfolder, **kwargs)
        file = find_file(path, CONFIG, subfolder=subfolder, **kwargs)
        if weights is not None and file is not None:
            check_seal(weights, read_object(file)["graph"])
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Return the fields of a configuration in a JSON file.

        Raises:
            ValueError: a file that is damaged or holds no such configuration.
        """
        fields, types = read_object(path_json_file), types_of(cls)
        kind = fields.get("peft_type")
        if kind != REFTHEADS.value:
            if kind in list(PeftType):
                raise ValueError(f"{path_json_file} is of a {kind} adapter, not an intervention graph: load it by peft")
            raise ValueError(f"{path_json_file} has the peft_type {shown(kind)}: no adapter of peft")
        for name in fields.keys() & types.keys() - {"peft_type"}:
            if not fits(fields[name], types[name]):
                raise ValueError(
                    f"{name} in {path_json_file} must be {in_words(types[name])}, got {shown(fields[name])}"
                )
        unknown = sorted(fields.keys() - types.keys() - {"modules_to_save"})
        if unknown:
            warnings.warn(f"{path_json_file} has {shown(unknown)}, which this version does not know", stacklevel=2)
        return {name: value for name, value in fields.items() if name not in unknown}

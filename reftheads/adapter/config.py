"""The configuration of an adapter, and the member of `PeftType` by which PEFT knows the method.

PEFT takes a method from outside by `register_peft_method` (see `tuner`), but its `PeftType` is a closed enumeration;
`_add_peft_type` opens it for one member. That is the only step that PEFT does not offer.
"""

import json
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from reftheads.adapter.files import CONFIG, refuse_pickle
from reftheads.graph.graph import InterventionGraph


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

    Raises:
        ValueError: no graph, or one that cannot be read.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFTHEADS
        if isinstance(self.graph, dict):
            self.graph = InterventionGraph.from_dict(self.graph)
        if not isinstance(self.graph, InterventionGraph):
            raise ValueError(f"InterventionConfig needs graph=InterventionGraph(…), got {self.graph!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values.

        Raises:
            ValueError: positions given by a function, which no file can hold.
        """
        fields = {name: value for name, value in self.__dict__.items() if name != "graph"}
        return {**fields, "graph": self.graph.to_dict()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "InterventionConfig":
        """Read the `adapter_config.json` of a directory or of a repository on the Hub.

        Args:
            pretrained_model_name_or_path: the directory, or the id of the repository.
            subfolder: of either.
            kwargs: such as `revision` or `token`.

        Raises:
            ValueError: no such file, a damaged one, one of another method, or weights beside it that would need
                unpickling.
        """
        path = pretrained_model_name_or_path
        try:
            config = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"the {CONFIG} of {path} is damaged ({error}): save or copy it again") from error
        refuse_pickle(path, subfolder=subfolder, **kwargs)
        if not isinstance(config, InterventionConfig):
            kind = PeftType(config.peft_type).value
            raise ValueError(f"{path} holds a {kind} adapter, not an intervention graph: load it by peft")
        return config

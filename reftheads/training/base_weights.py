"""The weights of a base model that is trained as well: checkpoints hold them beside the adapter."""

import os
import warnings
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from reftheads.architectures.structure import own_modules

_FOLDER = "base"


class SavesBase(Trainer):
    """Write the base model's weights into the folder `base` of every checkpoint, if any of them is trained."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the base model has weights that were trained")  # they are saved here
            super()._save(output_dir, state_dict)
        base: Any = self.model.get_base_model()  # type: ignore[union-attr,operator]
        parameters = [p for _, module in own_modules(base) for p in module.parameters(recurse=False)]
        if any(parameter.requires_grad for parameter in parameters):
            base.save_pretrained(os.path.join(output_dir or str(self.args.output_dir), _FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_base(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_base(str(self.state.best_model_checkpoint))

    def _load_base(self, checkpoint: str) -> None:
        folder = os.path.join(checkpoint, _FOLDER)
        if os.path.isdir(folder):
            base: Any = self.model.get_base_model()  # type: ignore[union-attr,operator]
            widest = reduce(torch.promote_types, {p.dtype for p in base.parameters() if p.is_floating_point()})
            saved = type(base).from_pretrained(folder, dtype=widest)
            base.load_state_dict(saved.state_dict(), strict=False)  # which lacks the graph

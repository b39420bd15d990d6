"""Checkpoints that are there as a whole or not at all, whenever the processes that write them are killed."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

_ASIDE = "_saving"  # uploads of the output folder leave out what begins with an underscore
_STATE = "trainer_state.json"

logger = logging.get_logger(__name__)


class WholeCheckpoints(Trainer):
    """Write every checkpoint into a folder aside, and move it to its place once all processes have written.

    A checkpoint that is no longer kept goes aside before it is removed. So whatever is named `checkpoint-…` is whole,
    and the folder aside, which a process that was killed leaves, may go at any time.
    """

    _saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; begin anew where the first checkpoint of all was broken off."""
        folder = str(self.args.output_dir)
        if resume_from_checkpoint is True and os.path.isdir(os.path.join(folder, _ASIDE)):
            if get_last_checkpoint(folder) is None:
                logger.warning(f"the first checkpoint in {folder} was broken off: training begins anew")
                resume_from_checkpoint = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _ASIDE) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        aside, name = folder / _ASIDE, f"checkpoint-{self.state.global_step}"
        self._once_a_node(lambda: shutil.rmtree(aside, ignore_errors=True))
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.name == name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / _STATE))
        self._once_a_node(lambda: _move(aside / name, folder))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder / name))
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            self._keep(limit, folder, folder / name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            self._keep(1, Path(self._get_output_dir(trial)))
        return super()._finalize_training(trial, *args, **kwargs)

    def _keep(self, limit: int, folder: Path, *kept: Path) -> None:
        """Remove checkpoints, the oldest first, until `limit` are left; the best and those of `kept` stay."""
        if not self.args.should_save:
            return
        checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
        checkpoints.sort(key=lambda path: (path.stat().st_mtime, int(path.name.split("-")[1])))
        staying = {*kept, *(path for path in checkpoints if str(path) == str(self.state.best_model_checkpoint))}
        surplus = len(checkpoints) - max(limit, len(staying))
        for path in [path for path in checkpoints if path not in staying][: max(surplus, 0)]:
            _remove(path)

    def _once_a_node(self, act: Callable[[], None]) -> None:
        """Let one process of each node act, when all have come as far, and go on when it is done."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            act()
        self.accelerator.wait_for_everyone()


def _move(checkpoint: Path, folder: Path) -> None:
    """Move a checkpoint into a folder, over one of the same name, once all of it is on the disk."""
    if not checkpoint.is_dir():  # another node has moved it, in a folder that they share
        return
    for file in (file for file in checkpoint.rglob("*") if file.is_file()):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    place = folder / checkpoint.name
    if place.is_dir():
        os.replace(place, checkpoint.parent / f"replaced-{checkpoint.name}")
    os.replace(checkpoint, place)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    aside = checkpoint.parent / _ASIDE
    aside.mkdir(exist_ok=True)
    os.replace(checkpoint, aside / f"removed-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)

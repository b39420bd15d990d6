"""Where the activations of a frozen base model are kept while it is trained on, and why there."""

from __future__ import annotations

import os
from typing import Literal

import torch

from reftheads._utils.memory import free_bytes
from reftheads.reuse.store import ActivationStore


def choose_store(
    wanted: Literal["auto", "memory", "disk"] | ActivationStore,
    size: int | None,
    *,
    folder: str,
    seen_once: bool,
    device: torch.device,
) -> tuple[ActivationStore | None, str]:
    """Return a store, or none, and a sentence that says why.

    Args:
        wanted: as in `InterventionTrainer`.
        size: bytes that are to be kept of all rows; `None` where only running through them would show it.
        folder: where files are written, if they are.
        seen_once: whether no row is seen for the second time.
        device: where the model is.
    """
    if isinstance(wanted, ActivationStore):
        return wanted, "as given"
    if wanted == "disk":
        return ActivationStore(directory=folder), f"disk: {_about(size)}in {folder}"
    if wanted == "auto" and size is None:
        return None, "none: how many rows there are is not known"
    if wanted == "auto" and seen_once:
        return None, "none: every row is seen once"
    store = _in_memory(size or 0, device)
    free = f"{_megabytes(store.budget)} may be taken"
    if wanted == "auto" and size is not None and size > store.budget:
        return None, f"none: {_about(size)}is to be kept, {free}; reuse='disk' keeps it in files"
    return store, f"memory: {_about(size)}is to be kept, {free}" if size is not None else f"memory: {free}"


def _in_memory(size: int, device: torch.device) -> ActivationStore:
    """Return a store where the model is, if half of what is free there suffices; else in main memory."""
    if device.type == "cuda":
        budget = free_bytes(device) // 2
        if size <= budget:
            return ActivationStore(budget)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has a store of its own
    return ActivationStore(free_bytes() // 2 // processes, device="cpu")


def _about(size: int | None) -> str:
    return "" if size is None else f"about {_megabytes(size)} "


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"

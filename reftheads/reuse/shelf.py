"""What of one base model is kept in a store: entries are found under its weights and settings as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reftheads.reuse.facts import Facts
from reftheads.reuse.fingerprint import digest
from reftheads.reuse.store import ActivationStore

Entry = dict[str, Tensor]


class Shelf:
    """The part of a store that belongs to a base model in one state, for as long as that lasts: a batch.

    Args:
        facts: of the model.
        store: where entries are kept; `None` keeps none.
    """

    def __init__(self, facts: Facts, store: ActivationStore | None):
        self.device = facts.device
        self.store = store
        state = "" if store is None else str(facts.fingerprint)  # which reads all weights once
        self._settings = digest(state, str(facts.autocast))

    def key(self, *parts: str | int | bytes) -> str:
        """Return the key of what is computed from these parts."""
        return digest(self._settings, *parts)

    def get(self, key: str) -> Entry | None:
        """Return an entry, on the model's device; `None` if it is not there."""
        entry = None if self.store is None else self.store.get(key)
        if entry is None:
            return None
        # numbers are for the host; a store may keep the rest elsewhere
        return {name: t.to(self.device, non_blocking=True) if t.ndim else t for name, t in entry.items()}

    def put(self, entries: Mapping[str, Any]) -> None:
        """Keep entries by their keys."""
        if self.store is not None and entries:
            self.store.put(entries)

    def __contains__(self, key: str) -> bool:
        return self.store is not None and key in self.store

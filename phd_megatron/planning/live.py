"""Bytes that tensors hold: now, and at their most, by the part of a step that made them."""

from __future__ import annotations

import weakref
from collections import Counter

import torch


class LiveBytes:
    """Counts every storage once, from the operation that returned it until nothing holds it.

    A storage is of the ``kind`` that was set when it was first seen. Real tensors and those of torch's FakeTensorMode
    are counted alike, since both have a storage with a size.

    Attributes:
        kind: of what is seen from now on.
        now: bytes by kind.
        total: of all kinds.
        most: the largest total since :meth:`restart`.
        at_most: ``now`` as it was at that moment.
    """

    def __init__(self) -> None:
        self.kind = "other"
        self.now: Counter[str] = Counter()
        self.total = self.most = 0
        self.at_most: Counter[str] = Counter()
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}

    def see(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count what holds the values of a tensor, if it is not counted yet.

        Args:
            kind: of this one; default the attribute.
        """
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # a tensor without memory of its own
        key, size = storage._cdata, storage.nbytes()
        known = self._held.get(key)
        if known is not None and known[0]() is storage:
            kind = known[2]
            if size != known[1]:  # Megatron-Core empties and fills storages in place
                self._held[key] = (known[0], size, kind)
                self._add(size - known[1], kind)
            return

        def gone(reference: weakref.ref[torch.UntypedStorage]) -> None:
            entry = self._held.get(key)
            if entry is not None and entry[0] is reference:
                del self._held[key]
                self._add(-entry[1], entry[2])

        kind = kind or self.kind
        self._held[key] = (weakref.ref(storage, gone), size, kind)
        self._add(size, kind)

    def name(self, tensor: torch.Tensor, kind: str) -> None:
        """Let what holds the values of a tensor be of another kind."""
        self.see(tensor)
        key = tensor.untyped_storage()._cdata
        reference, size, old = self._held[key]
        self._held[key] = (reference, size, kind)
        self.now[old] -= size
        self.now[kind] += size

    def rename(self, old: str, new: str) -> None:
        """Let everything of one kind that is still held be of another."""
        self._held = {k: (r, size, new if kind == old else kind) for k, (r, size, kind) in self._held.items()}
        self.now[new] += self.now.pop(old, 0)

    def restart(self) -> None:
        """Look for the most from now on."""
        self.most, self.at_most = self.total, +self.now

    def _add(self, size: int, kind: str) -> None:
        self.now[kind] += size
        self.total += size
        if self.total > self.most:
            self.most, self.at_most = self.total, +self.now

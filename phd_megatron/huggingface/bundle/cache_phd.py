"""KV cache of a PHD-Transformer: the originals, as vanilla's, plus the few hidden entries the window still needs.

Shapes: ``b`` sequences, ``g`` KV heads, ``d`` head dimension, ``n`` new token slots of this step, ``p`` slots already
cached, ``r`` retained hidden slots, ``K`` copies. A *slot* is an index on the time axis of the batch and may hold
padding; a *position* is a token's index in its own sequence, -1 for padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .kv_policy import KVPolicy


@dataclass(kw_only=True)
class Shared:
    """What the layers of one forward pass have in common, made once."""

    made: dict[tuple, Any] = field(default_factory=dict)

    def once(self, name: tuple, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept under ``name`` for the layers after."""
        if any(isinstance(part, torch.SymInt) for part in name):  # a graph of any length: no key for a dictionary
            return make()
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


@dataclass
class CacheStep(Shared):
    """Where the tokens of one forward pass go, shared by all layers."""

    positions: Tensor  # [b, p + n] of all originals, new ones last
    hidden_positions: Tensor  # [b, r + n] of all hidden slots, new ones last
    lengths: Tensor  # [b] tokens of each sequence once this step is in
    keep: Tensor  # [b, r'] indices into hidden_positions that later queries can see, -1 for none
    new: int  # n

    def keep_of(self, retained: int, fresh: int, device: torch.device) -> Tensor:
        """``keep`` for a layer that holds ``retained`` hidden slots and only the last ``fresh`` of the new ones."""

        def shifted() -> Tensor:
            keep = self.keep.to(device)
            return torch.where(keep < retained, keep, keep - (self.new - fresh)).clamp(min=0)

        return self.once((retained, fresh, device), shifted)


class PHDCacheLayer(DynamicLayer):
    """One layer's KV: originals ``keys``/``values`` [b, g, p, d], hidden ``hidden_keys/values`` [b, g, K-1, r, d]."""

    def __init__(self, policy: KVPolicy):
        super().__init__()
        self.policy = policy
        self.hidden_keys: Tensor | None = None
        self.hidden_values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, step: CacheStep, *args, **kwargs):
        """Append one step's rows and return what its queries attend to.

        Args:
            key_states, value_states: [b, g, n + (K-1) * h, d]: the new originals, then each hidden copy's last ``h``
                of the ``n`` new slots.
            step: from :meth:`PHDCache.begin`.

        Returns:
            Keys and values [b, g, p + n + (K-1) * (r + h), d]: originals first, then copy by copy the retained and
            the new hidden entries.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (key_states.size(0), key_states.size(1), self.policy.repeat - 1, 0, key_states.size(3))
            self.hidden_keys = self.hidden_values = key_states.new_empty(shape)
            self.keys = self.values = key_states.new_empty((*shape[:2], 0, shape[4]))
        assert self.hidden_keys is not None and self.hidden_values is not None
        keys, self.keys, self.hidden_keys = self._append(self.keys, self.hidden_keys, key_states, step)
        values, self.values, self.hidden_values = self._append(self.values, self.hidden_values, value_states, step)
        held = self.hidden_keys.size(2) * self.hidden_keys.size(3)
        if held > self.policy.max_hidden_entries:
            raise AssertionError(f"{held} hidden entries are cached, more than {self.policy.max_hidden_entries}")
        return keys, values

    def _append(self, old: Tensor, hidden: Tensor, rows: Tensor, step: CacheStep) -> tuple[Tensor, Tensor, Tensor]:
        copies = self.policy.repeat - 1
        if copies == 0:
            everything = torch.cat([old, rows], dim=2)
            return everything, everything, hidden
        new_hidden = rows[:, :, step.new :].unflatten(2, (copies, -1))
        retained, fresh = hidden.size(3), new_hidden.size(3)
        hidden = torch.cat([hidden, new_hidden], dim=3)
        everything = torch.cat([old, rows[:, :, : step.new], hidden.flatten(2, 3)], dim=2)
        originals = everything[:, :, : old.size(2) + step.new]
        if hidden.size(2) * hidden.size(3) > self.policy.max_hidden_entries:
            originals = originals.clone()  # a view would keep the hidden entries of the whole prompt alive
        keep = step.keep_of(retained, fresh, hidden.device)
        index = keep[:, None, None, :, None].expand(-1, hidden.size(1), copies, -1, hidden.size(4))
        return everything, originals, hidden.gather(3, index)

    def _map(self, function) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "hidden_keys", "hidden_values"):
                setattr(self, name, function(getattr(self, name)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # in some versions of transformers this only writes zeros
        self.hidden_keys = self.hidden_values = None
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized: bool = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the surviving beams."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._map(lambda tensor: tensor[indices, ...])

    def hidden_entries(self) -> int:
        """Hidden KV entries held per sequence, at most ``(K - 1) * min(W, C)``."""
        return 0 if self.hidden_keys is None else self.hidden_keys.size(2) * self.hidden_keys.size(3)

    def nbytes(self) -> int:
        """Bytes of the cached originals and hidden entries."""
        if not self.is_initialized:
            return 0
        held = [self.keys, self.values, self.hidden_keys, self.hidden_values]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


class PHDCache(Cache):
    """Cache of a whole model. ``get_seq_length()`` counts originals, so ``generate`` and masks work as for vanilla.

    Args:
        config: a :class:`PHDConfig`.
    """

    def __init__(self, config):
        self.policy = config.kv_policy()
        super().__init__(layers=[PHDCacheLayer(self.policy) for _ in range(config.num_hidden_layers)])
        self._forget()

    def _forget(self) -> None:
        self.positions: Tensor | None = None
        self.hidden_positions: Tensor | None = None
        self.lengths: Tensor | None = None

    def check_batch(self, batch: int) -> None:
        """Refuse to continue with another number of sequences than the cache holds."""
        if self.positions is not None and self.positions.size(0) != batch:
            raise ValueError(
                f"a batch of {batch} continues a cache of {self.positions.size(0)} sequences; "
                "use batch_repeat_interleave or batch_select_indices on the cache first"
            )

    def begin(self, positions: Tensor) -> CacheStep:
        """Plan the step that adds tokens at ``positions`` [b, n] (-1 is padding). Nothing changes until :meth:`end`."""
        batch, new = positions.shape
        empty = positions.new_empty((batch, 0))
        past = empty if self.positions is None else self.positions
        retained = empty if self.hidden_positions is None else self.hidden_positions
        lengths = positions.amax(1) + 1
        if self.lengths is not None:
            lengths = torch.maximum(lengths, self.lengths)
        hidden = torch.cat([retained, positions], dim=1)
        return CacheStep(torch.cat([past, positions], dim=1), hidden, lengths, self._keep(hidden, lengths), new)

    def _keep(self, hidden_positions: Tensor, lengths: Tensor) -> Tensor:
        """Indices [b, r'] of the hidden slots that a query at position ``lengths`` sees; no later one sees more."""
        size = min(hidden_positions.size(1), self.policy.span - 1) if self.policy.repeat > 1 else 0
        hidden_copy = torch.full_like(lengths, 2)[:, None]
        seen = self.policy.hidden_visible(lengths[:, None], hidden_copy, hidden_positions, hidden_copy)
        seen = seen & (hidden_positions >= 0)
        index = torch.arange(hidden_positions.size(1), device=hidden_positions.device)
        index = torch.where(seen, index, -1).sort(dim=1).values
        return index[:, index.size(1) - size :]

    def end(self, step: CacheStep) -> None:
        """The step's rows are in every layer."""
        self.positions = step.positions
        self.lengths = step.lengths
        kept = step.hidden_positions.gather(1, step.keep.clamp(min=0))
        self.hidden_positions = torch.where(step.keep >= 0, kept, -1)

    def _map(self, function) -> None:
        if self.positions is not None:
            self.positions = function(self.positions)
            self.hidden_positions = function(self.hidden_positions)
            self.lengths = function(self.lengths)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the surviving beams."""
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices, ...])

    @property
    def is_croppable(self) -> bool:
        """Whether any crop can be exact: only without a hidden window."""
        return self.policy.max_hidden_entries <= self.policy.repeat - 1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` slots.

        Raises:
            ValueError: for a positive number, or when the shorter sequence needs hidden entries that are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        if tokens_to_remove == 0 or self.positions is None:
            return
        assert self.lengths is not None and self.hidden_positions is not None
        positions = self.positions[:, :tokens_to_remove]
        lengths = positions.amax(1) + 1 if positions.size(1) else torch.zeros_like(self.lengths)
        for length, old in zip(lengths.tolist(), self.lengths.tolist(), strict=True):
            needed, held = self.policy.retained_from(length), self.policy.retained_from(old)
            if self.policy.repeat > 1 and needed < min(length, held):
                raise ValueError(
                    f"crop({tokens_to_remove}) leaves {length} tokens, whose next query sees hidden entries from "
                    f"position {needed} on, but the cache of {old} tokens keeps them from {held} on; "
                    "crop to a chunk start or run the shorter prompt again"
                )
        hidden = self.hidden_positions
        self.hidden_positions = torch.where(hidden < lengths[:, None], hidden, -1)
        self.positions, self.lengths = positions, lengths
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (t[:, :, :tokens_to_remove] for t in (layer.keys, layer.values))

    def hidden_entries(self) -> int:
        """Hidden KV entries held per layer and sequence, at most ``(K - 1) * min(W, C)``."""
        return max(layer.hidden_entries() for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes of all cached keys and values."""
        return sum(layer.nbytes() for layer in self.layers)

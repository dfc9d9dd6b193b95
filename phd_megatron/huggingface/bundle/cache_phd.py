"""KV cache of a PHD-Transformer: the originals, as vanilla's, plus the few hidden entries the window still needs.

Shapes: ``b`` sequences, ``g`` KV heads, ``d`` head dimension, ``n`` new token slots of this step, ``p`` slots already
cached, ``r`` hidden slots, at most ``span = min(W, C)``, ``K`` copies. A *slot* is an index on the time axis of the
batch and may hold padding; a *position* is a token's index in its own sequence, -1 for padding.
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


#: slots by which a layer's tensors grow: so many steps of one token pass between two copies of what is cached
ROOM = 64


@dataclass
class CacheStep(Shared):
    """Where the tokens of one forward pass go, shared by all layers."""

    positions: Tensor  # [b, p + n] of all originals, new ones last
    hidden_positions: Tensor  # [b, r] of the hidden slots once this step is in
    lengths: Tensor  # [b] tokens of each sequence once this step is in
    new: int  # n
    retained: int  # hidden slots before this step, 0 of an empty cache
    in_place: bool  # one token, for which there is a slot
    places: Tensor  # in place: [b, 1], the slot of the new token; else [b, r], indices into the old slots and the new

    @property
    def slots(self) -> int:
        """Hidden slots after this step, r."""
        return self.hidden_positions.size(1)

    def index_of(self, like: Tensor, fresh: int) -> Tensor:
        """``places`` for a layer's ``[b, g, K-1, slots, d]``, which has only the last ``fresh`` of the new tokens."""

        def index() -> Tensor:
            places = self.places.to(like.device)
            if not self.in_place:
                places = torch.where(places < self.retained, places, places - (self.new - fresh)).clamp(min=0)
            return places

        return _wide(self.once((fresh, like.device), index), like)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """Slots ``[b, n]`` as an index ``[b, g, K-1, n, d]`` into the slots of ``like``."""
    index = index.to(like.device)[:, None, None, :, None]
    return index.expand(-1, like.size(1), like.size(2), -1, like.size(4))


class _Store:
    """The keys, or the values, of one layer in one tensor ``[b, g, (K-1) * r + p + room, d]``, hidden ones first."""

    def __init__(self, originals: Tensor, hidden: Tensor) -> None:
        self.whole: Tensor | None = None
        self.views = originals, hidden  # [b, g, p, d] and [b, g, K-1, r, d]

    def append(self, originals: Tensor, hidden: Tensor, rows: Tensor, step: CacheStep) -> Tensor:
        """Put ``rows`` of a step behind what there is; what its queries attend to, see :meth:`PHDCacheLayer.update`."""
        dtype = torch.promote_types(originals.dtype, rows.dtype)  # under autocast they may differ
        originals, hidden, rows = originals.to(dtype), hidden.to(dtype), rows.to(dtype)
        copies, attended = hidden.size(2), None
        new = rows[:, :, : step.new]
        new_hidden = rows[:, :, step.new :].unflatten(2, (copies, -1)) if copies else hidden
        if copies and not step.in_place:
            fresh, candidates = new_hidden.size(3), new_hidden
            if step.retained:
                candidates = torch.cat([hidden, new_hidden], dim=3)
            if step.new > 1:
                attended = rows
                if step.retained:
                    attended = torch.cat([originals, new, candidates.flatten(2, 3)], dim=2)
            new_hidden = candidates.gather(3, step.index_of(candidates, fresh))
        # What a gradient needs must not be written over, and queries may need one where keys do not.
        put = self._joined if torch.is_grad_enabled() else self._written
        whole = put(originals, hidden, new, new_hidden, step)
        slots = whole[:, :, : copies * step.slots].unflatten(2, (copies, -1)) if copies else hidden
        self.views = whole[:, :, copies * step.slots :], slots
        return whole if attended is None else attended

    def _joined(self, originals: Tensor, hidden: Tensor, new: Tensor, new_hidden: Tensor, step: CacheStep) -> Tensor:
        """A new tensor, through which gradients go."""
        if step.in_place and hidden.size(2):
            new_hidden = hidden.scatter(3, step.index_of(hidden, 1), new_hidden)
        self.whole = torch.cat([new_hidden.flatten(2, 3), originals, new], dim=2)
        return self.whole

    def _written(self, originals: Tensor, hidden: Tensor, new: Tensor, new_hidden: Tensor, step: CacheStep) -> Tensor:
        """The tensor that there is, or another one where it is full, has too few slots, or somebody has set others."""
        entries, past = hidden.size(2) * step.slots, originals.size(2)
        end = entries + past + step.new
        whole = self.whole
        # Tensors of inference mode can be written in it alone.
        frozen = whole is not None and whole.is_inference() and not torch.is_inference_mode_enabled()
        is_same = self.views[0] is originals and self.views[1] is hidden and hidden.size(3) == step.slots
        if whole is None or frozen or not is_same or whole.size(2) < end:
            whole = originals.new_empty((*originals.shape[:2], end + ROOM, originals.size(3)))
            if step.in_place:
                whole[:, :, :entries] = hidden.flatten(2, 3)
            whole[:, :, entries : entries + past] = originals
            self.whole = whole
        whole[:, :, entries + past : end] = new
        if entries and step.in_place:
            slots = whole[:, :, :entries].unflatten(2, hidden.shape[2:4])
            slots.scatter_(3, step.index_of(slots, 1), new_hidden)
        elif entries:
            whole[:, :, :entries] = new_hidden.flatten(2, 3)
        return whole[:, :, :end]


class PHDCacheLayer(DynamicLayer):
    """One layer's KV: originals ``keys``/``values`` [b, g, p, d], hidden ``hidden_keys/values`` [b, g, K-1, r, d].

    There are ``r`` hidden slots, ``span`` at most. The hidden entry of a position lies in slot ``position % r``, where
    it replaces one that no later query sees. Both kinds are views of one tensor with room behind it, so that a step
    writes its own entries alone and attends to all of them without a copy: a cache is continued twice by
    ``copy.deepcopy``. Whoever needs other rows or slots sets the four tensors; they are put together again at the next
    step.
    """

    def __init__(self, policy: KVPolicy):
        super().__init__()
        self.policy = policy
        self.hidden_keys: Tensor | None = None
        self.hidden_values: Tensor | None = None
        self.stores: list[_Store] = []

    def update(self, key_states: Tensor, value_states: Tensor, step: CacheStep, *args, **kwargs):
        """Append one step's rows and return what its queries attend to.

        Args:
            key_states, value_states: [b, g, n + (K-1) * h, d]: the new originals, then each hidden copy's last ``h``
                of the ``n`` new slots.
            step: from :meth:`PHDCache.begin`.

        Returns:
            Keys and values. Of one token (n = 1): [b, g, (K-1) * r + p + 1, d], copy by copy the hidden slots, then
            the originals. Of more: [b, g, p + n + (K-1) * (r + h), d], originals first, then copy by copy the slots
            that were there before and the new ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.policy.repeat - 1, step.slots, key_states.size(3))
            self.hidden_keys, self.hidden_values = key_states.new_zeros(shape), value_states.new_zeros(shape)
            self.keys = self.values = key_states.new_empty((*shape[:2], 0, shape[4]))
        assert self.hidden_keys is not None and self.hidden_values is not None
        held = ((self.keys, self.hidden_keys, key_states), (self.values, self.hidden_values, value_states))
        if not self.stores:
            self.stores = [_Store(*tensors[:2]) for tensors in held]
        keys, values = (store.append(*tensors, step) for store, tensors in zip(self.stores, held, strict=True))
        (self.keys, self.hidden_keys), (self.values, self.hidden_values) = (store.views for store in self.stores)
        entries = self.hidden_keys.size(2) * self.hidden_keys.size(3)
        if entries > self.policy.max_hidden_entries:
            raise AssertionError(f"{entries} hidden entries are cached, more than {self.policy.max_hidden_entries}")
        return keys, values

    def _map(self, function) -> None:
        self.stores = []
        if self.is_initialized:
            for name in ("keys", "values", "hidden_keys", "hidden_values"):
                setattr(self, name, function(getattr(self, name)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # in some versions of transformers this only writes zeros
        self.hidden_keys = self.hidden_values = None
        self.keys = self.values = None  # type: ignore[assignment]
        self.stores = []
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
        """Bytes of the cached originals and hidden entries, without the room for the next ones."""
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
        past = positions.new_empty((batch, 0)) if self.positions is None else self.positions
        held, lengths = self.hidden_positions, positions.amax(1) + 1
        if self.lengths is not None:
            lengths = torch.maximum(lengths, self.lengths)
        slots, retained = self._slots(past.size(1) + new), 0 if held is None else held.size(1)
        in_place = new == 1 and retained in (0, slots)
        if in_place:
            held = positions.new_full((batch, slots), -1) if held is None else held
            # The slot of a token; of padding, the one that the next token will have.
            places = torch.where(positions >= 0, positions, lengths[:, None]) % max(slots, 1)
            hidden = held.scatter(1, places, positions) if slots else held
        else:
            places, hidden = self._placed(
                positions if held is None else torch.cat([held, positions], dim=1), lengths, slots
            )
        return CacheStep(torch.cat([past, positions], dim=1), hidden, lengths, new, retained, in_place, places)

    def _slots(self, tokens: int) -> int:
        """Hidden slots for sequences of so many tokens: what a query can see, its own token included."""
        if self.policy.repeat == 1:
            return 0
        held = 0 if self.hidden_positions is None else self.hidden_positions.size(1)
        return max(held, min(self.policy.span, -(-tokens // ROOM) * ROOM))

    @staticmethod
    def _placed(positions: Tensor, lengths: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """For each of ``slots`` [b, r] the index into ``positions`` that belongs there, -1 for none, and the position.

        The oldest of them may be one that a prefill did not compute: the next query does not see it.
        """
        belongs = (positions >= 0) & (positions >= lengths[:, None] - slots)
        slot = torch.where(belongs, positions % max(slots, 1), slots)  # the last one is for all the others
        index = torch.arange(positions.size(1), device=positions.device).expand_as(positions)
        places = positions.new_full((positions.size(0), slots + 1), -1).scatter(1, slot, index)[:, :slots]
        return places, torch.where(places >= 0, positions.gather(1, places.clamp(min=0)), -1)

    def widen(self, slots: int) -> None:
        """Have so many hidden slots, where there are fewer; for caches that are put together."""
        if self.hidden_positions is None or self.hidden_positions.size(1) >= slots:
            return
        assert self.lengths is not None
        places, positions = self._placed(self.hidden_positions, self.lengths, slots)
        index, names = places.clamp(min=0), ("hidden_keys", "hidden_values")
        layers = [layer for layer in self.layers if layer.is_initialized]
        # All of them first: where memory ends, the cache is as it was.
        made = [[held.gather(3, _wide(index, held)) for held in (getattr(each, n) for n in names)] for each in layers]
        for layer, tensors in zip(layers, made, strict=True):
            layer.hidden_keys, layer.hidden_values = tensors
            layer.stores = []
        self.hidden_positions = positions

    def end(self, step: CacheStep) -> None:
        """The step's rows are in every layer."""
        self.positions, self.lengths, self.hidden_positions = step.positions, step.lengths, step.hidden_positions

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
                layer.stores = []

    def hidden_entries(self) -> int:
        """Hidden KV entries held per layer and sequence, at most ``(K - 1) * min(W, C)``."""
        return max(layer.hidden_entries() for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes of all cached keys and values."""
        return sum(layer.nbytes() for layer in self.layers)

"""Which copies of which tokens a forward pass computes, and what they attend to.

Rows inside the decoder are ``[originals of all n new slots | copy 2 | ... | copy K]``; hidden copies cover only the
slots from ``start`` on. For a forward that wants all logits ``start`` is 0. For generation it is the prefill cone:
layer by layer the hidden copies start later, because only what the wanted logits see is computed. The last layer
computes the last copy of the wanted slots alone. All of it is exact, and follows from ``kv_policy.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .by_document import attend_documents
from .cache_phd import CacheStep, PHDCache, Shared
from .copy_positions import rotary_positions
from .documents import document_lengths, positions_in_documents, starts_of_borders, starts_of_first
from .kv_policy import KVPolicy
from .reference import reference_attention
from .sdpa import sdpa_attention

_NOT_COUNTED = (
    "position_ids neither count up by one in each sequence nor begin again at 0 with each of its documents; "
    "leave them out, or count each document from 0"
)
_NOT_COUNTED_IN_A_GRAPH = (
    "position_ids do not count up by one in each sequence; a compiled graph is made for one document a row: "
    "leave them out, give each document its own row, or do not compile"
)
_NO_CACHE = "several documents in one row cannot be continued; pass use_cache=False, or each document in its own row"


def kept_slots(hidden: Tensor, logits_to_keep: int | Tensor, new: int) -> Tensor:
    """Rows of ``hidden`` [b, m, h], the last ``m`` of ``new`` slots, that ``logits_to_keep`` asks for."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    missing = new - hidden.size(1)
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep[:, missing:]]
    index = logits_to_keep % new - missing
    return hidden[:, index] if index.dim() == 1 else hidden.take_along_dim(index[..., None], dim=1)


def first_wanted(logits_to_keep: int | Tensor, new: int) -> int:
    """First slot whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        return max(new - logits_to_keep, 0) if logits_to_keep else 0
    if logits_to_keep.dtype == torch.bool:
        wanted = logits_to_keep.any(0).nonzero()
        return int(wanted[0]) if len(wanted) else new - 1
    return int((logits_to_keep % new).min()) if logits_to_keep.numel() else new - 1


def packed_documents(
    attention_mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    """``[b, n]``: where the document of each token begins, of rows with several documents; None of others.

    Args:
        position_ids: ``[b or 1, n]``, which begin again at 0 with each document.
        cu_seq_lens: borders of the documents of one row, from 0 to n, as FlashAttention's functions take them.

    Raises:
        ValueError: the two do not agree, or padding lies before a token.
    """
    batch, new = shape
    if torch.compiler.is_compiling() or new == 1:
        return None  # graphs are made for one document, and a step over a cache is one token
    present = torch.ones(batch, new, dtype=torch.bool)
    if attention_mask is not None and attention_mask.shape == present.shape:  # another one is refused later
        present = attention_mask.bool().cpu()
    starts = None
    if cu_seq_lens is not None:
        borders = cu_seq_lens.tolist()
        if batch != 1 or borders[0] != 0 or borders[-1] != new or sorted(borders) != borders:
            raise ValueError(f"cu_seq_lens {borders} of {batch} x {new} tokens: they are borders of a row, from 0 to n")
        starts = starts_of_borders(borders)[None]
    elif position_ids is not None:
        positions = position_ids.cpu().expand(batch, new)
        first = positions == 0
        first[:, 1:] &= present[:, 1:] & present[:, :-1]  # a token after padding is the first of its row
        starts = starts_of_first(first)
        if bool(((positions != positions_in_documents(starts)) & present)[starts > 0].any()):
            raise ValueError(_NOT_COUNTED)
    if starts is None or not bool((starts > 0).any()):
        return None
    if bool((present[:, 1:] & ~present[:, :-1]).any()):
        raise ValueError("padding lies before tokens of packed documents; put it at the end of the row")
    return starts


def token_positions(
    new: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None, cache: PHDCache | None
) -> Tensor:
    """Positions ``[b or 1, new]`` of the new slots, -1 for padding.

    Raises:
        ValueError: for a mask of another shape, or position ids that do not count up by one in each sequence.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.size(1) != past + new):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, {past + new}], 1 for tokens "
            f"and 0 for padding, over {past} cached and {new} new slots (what a copy sees is the model's own business)"
        )
    if attention_mask is None:
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
        if cache is not None and cache.lengths is not None:
            start = cache.lengths[:, None]
        valid, counted = None, start + torch.arange(new, device=device)
    else:
        present = attention_mask.to(device=device, dtype=torch.bool)
        valid, counted = present[:, past:], (present.long().cumsum(1) - 1)[:, past:]
    if position_ids is not None:
        # One sync per prefill; a decoding step has nothing to check it against but the cache.
        if new > 1:
            ahead = position_ids.to(device) - counted  # the same number for all tokens of a row
            if valid is not None:
                ahead = torch.where(valid, ahead, ahead.masked_fill(~valid, -(1 << 30)).amax(1, keepdim=True))
            if torch.compiler.is_compiling():
                torch._assert_async((ahead == ahead[:, :1]).all(), _NOT_COUNTED_IN_A_GRAPH)
            elif bool((ahead != ahead[:, :1]).any()):
                raise ValueError(_NOT_COUNTED)
        counted = position_ids.to(device)
    return counted if valid is None else torch.where(valid, counted, -1)


@dataclass
class StepRows(Shared):
    """One forward pass over ``new`` slots. Shapes: ``p`` cached slots, ``r`` hidden slots in the cache."""

    policy: KVPolicy
    num_layers: int
    new: int
    wanted: int  # first slot whose logits are wanted
    starts: list[int]  # per layer, first slot of its hidden copies; one more for the rows after the last layer
    positions: Tensor  # [b or 1, new], -1 for padding
    past_positions: Tensor  # [b or 1, p]
    hidden_positions: Tensor  # [b or 1, r], r = 0 of an empty cache
    aligned: bool  # nothing cached, and padding on the right at most: slots are positions
    cache_step: CacheStep | None
    documents: list[list[int]] | None = None  # lengths of several in a row, each a sequence of its own

    # Whoever has a faster attention for steps of one token over a cache puts it here, see LayerRows.attend.
    decode: ClassVar[Callable[..., Tensor] | None] = None

    @classmethod
    def plan(
        cls,
        policy: KVPolicy,
        num_layers: int,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PHDCache | None,
        logits_to_keep: int | Tensor,
        document_starts: Tensor | None = None,
    ) -> StepRows:
        """Plan the pass for embeddings ``hidden`` [b, n, h]; ``document_starts`` as :func:`packed_documents`'."""
        batch, new = hidden.shape[:2]
        if new == 0:
            raise ValueError("the input has no tokens; pass at least one (a beginning-of-text token, for instance)")
        if document_starts is not None:
            if cache is not None:
                raise ValueError(_NO_CACHE)
            positions = positions_in_documents(document_starts).to(hidden.device)
            lengths = [document_lengths(row) for row in document_starts]
            nothing = positions[:, :0]
            return cls(
                policy, num_layers, new, 0, [0] * (num_layers + 1), positions, nothing, nothing, True, None, lengths
            )
        if cache is not None:
            cache.check_batch(batch)
        positions = token_positions(new, hidden.device, attention_mask, position_ids, cache)
        if cache is not None and (new == 1 or cache.positions is not None):
            positions = positions.expand(batch, new)
        past_positions = hidden_positions = positions[:, :0]
        cache_step = None
        if cache is not None:
            cache_step = cache.begin(positions.expand(batch, new))
            if cache.positions is not None and cache.hidden_positions is not None:
                past_positions, hidden_positions = cache.positions, cache.hidden_positions
        wanted = first_wanted(logits_to_keep, new)
        fresh = past_positions.size(1) == 0
        counted = fresh and attention_mask is None and position_ids is None  # positions are slots, known without a sync
        traced = torch.compiler.is_compiling()  # no way of a graph may depend on numbers in tensors
        aligned = counted and new > 1
        if new > 1 and fresh and not counted and not traced:
            slots = torch.arange(new, device=positions.device)
            aligned = bool(((positions == slots) | (positions < 0)).all())
        if policy.repeat == 1 or wanted == 0 or isinstance(wanted, torch.SymInt) or (traced and not counted):
            starts = [0] * num_layers + [wanted]  # all of them
        elif counted:
            starts = [policy.cone_start(wanted, n, num_layers) for n in range(1, num_layers + 1)] + [wanted]
        else:
            starts = _cone(policy, num_layers, positions, wanted)
        return cls(
            policy, num_layers, new, wanted, starts, positions, past_positions, hidden_positions, aligned, cache_step
        )

    @property
    def is_step(self) -> bool:
        """Whether it is one token over a cache, whose hidden slots lie before the originals then."""
        return self.new == 1 and self.cache_step is not None

    def first_rows(self, embeddings: Tensor, vectors: Tensor | None = None) -> Tensor:
        """``[b, n, h]`` to the rows the first layer reads: the originals and the copies of the slots it needs.

        ``vectors`` [K-1, h] are added to copies 2 to K.
        """
        copies = embeddings[:, self.starts[0] :]
        if vectors is None:
            return torch.cat([embeddings, *[copies] * (self.policy.repeat - 1)], dim=1)
        return torch.cat([embeddings, (copies[:, None] + vectors[:, None]).flatten(1, 2)], dim=1)

    def layer(self, index: int) -> LayerRows:
        """Rows of the layer with this 0-based index."""
        last = index == self.num_layers - 1
        return LayerRows(self, self.starts[index], self.starts[index + 1], last)

    def mask(self, start: int, copies: range, hidden_start: int | None) -> Tensor:
        """Bool mask ``[b or 1, 1, queries, keys]``.

        Queries are the slots from ``start`` on, for each copy in ``copies``. Keys are the originals and, unless
        ``hidden_start`` is None, the hidden entries: of the cache and the new ones from that slot on, in the order of
        :meth:`PHDCacheLayer.update`.
        """
        name = (start, copies, hidden_start)
        return self.once(("mask", *name), lambda: self._mask(*name))

    def _mask(self, start: int, copies: range, hidden_start: int | None) -> Tensor:
        queries = self.positions[:, start:]
        keys = torch.cat([self.past_positions, self.positions], dim=1)
        # A padded query sees padding, its own slot at least, so that its (unused) softmax is finite.
        seen_at_all = (keys >= 0)[:, None] | (queries < 0)[:, :, None]
        originals = self.policy.original_visible(queries[:, :, None], keys[:, None]) & seen_at_all
        seen = originals.repeat(1, len(copies), 1)  # what a slot sees of the originals is the same for all its copies
        if hidden_start is None:
            return seen[:, None]
        if self.is_step:
            assert self.cache_step is not None
            hidden = self.cache_step.hidden_positions
            return torch.cat([self._hidden_seen(queries, copies, hidden), seen], dim=2)[:, None]
        hidden = torch.cat([self.hidden_positions, self.positions[:, hidden_start:]], dim=1)
        return torch.cat([seen, self._hidden_seen(queries, copies, hidden)], dim=2)[:, None]

    def _hidden_seen(self, queries: Tensor, copies: range, hidden: Tensor) -> Tensor:
        """Bool ``[b or 1, copies * queries, (K-1) * hidden]`` for positions of queries and of hidden slots."""
        # Made on the device: a copy from the host would wait, and could not be part of a CUDA graph.
        copy = torch.arange(copies.start, copies.stop, device=queries.device)[:, None]
        hidden_copy = torch.arange(2, self.policy.repeat + 1, device=queries.device)[:, None]
        copy, key_copy = (x.expand(-1, y.size(1)).flatten() for x, y in ((copy, queries), (hidden_copy, hidden)))
        keys = hidden.repeat(1, self.policy.repeat - 1)
        visible = self.policy.hidden_visible(
            queries.repeat(1, len(copies))[:, :, None], copy[None, :, None], keys[:, None], key_copy[None, None]
        )
        return visible & (keys >= 0)[:, None]


@dataclass
class LayerRows:
    """One layer's part of a :class:`StepRows`: hidden copies come in from slot ``start`` and leave from ``end``."""

    step: StepRows
    start: int
    end: int
    last: bool

    @property
    def is_full(self) -> bool:
        """Whether all copies of all slots are computed and slots are positions, as in training.

        Graphs for other programs are made of masks instead: they hold any length, and plain operators alone.
        """
        return self.step.aligned and self.step.wanted == 0 and not torch.compiler.is_exporting()

    def rotary_positions(self, kind: str) -> Tensor:
        """Positions ``[b or 1, rows in]``, float32, by which RoPE turns the rows; those of padding mean nothing."""
        positions, repeat = self.step.positions.clamp(min=0)[:, None], self.step.policy.repeat
        copies = torch.arange(1, repeat + 1, device=positions.device)[:, None]
        originals = rotary_positions(positions, copies[:1], repeat, kind).squeeze(1)
        if repeat == 1:
            return originals
        hidden = rotary_positions(positions[:, :, self.start :], copies[1:], repeat, kind)  # [b or 1, K-1, n - start]
        return torch.cat([originals, hidden.flatten(1, 2)], dim=1)

    def last_copy(self, rows: Tensor) -> Tensor:
        """The last copy of every slot, of rows that hold them all."""
        return rows[:, -self.step.new :]

    def select(self, rows: Tensor) -> Tensor:
        """Rows that leave this layer, of ``rows`` [b, rows in, ...] that come in."""
        new, copies = self.step.new, self.step.policy.repeat - 1
        if self.last:
            return rows[:, rows.size(1) - (new - self.step.wanted) :] if copies else rows[:, self.step.wanted :]
        if copies == 0 or self.start == self.end:
            return rows
        hidden = rows[:, new:].unflatten(1, (copies, new - self.start))[:, :, self.end - self.start :]
        return torch.cat([rows[:, :new], hidden.flatten(1, 2)], dim=1)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of ``query`` [b, heads, rows out, d] over the originals and hidden entries in ``keys``.

        Keys are laid out as :meth:`PHDCacheLayer.update` returns them. Returns [b, rows out, heads, d].
        """
        step = self.step
        repeat, new = step.policy.repeat, step.new
        if step.is_step and step.decode is not None:
            return step.decode(self, query, keys, values)
        originals = step.past_positions.size(1) + new
        parts = []
        if new == 1 and (step.is_step or not self.last):
            copies = range(repeat if self.last else 1, repeat + 1)
            parts.append(_attend(query, keys, values, step.mask(0, copies, self.start if repeat > 1 else None)))
        elif repeat == 1:
            parts.append(self._originals(query, keys, values, step.wanted if self.last else 0))
        elif self.last:
            mask = step.mask(step.wanted, range(repeat, repeat + 1), self.start)
            parts.append(_attend(query, keys, values, mask))
        else:
            parts.append(self._originals(query[:, :, :new], keys[:, :, :originals], values[:, :, :originals], 0))
            mask = step.mask(self.end, range(2, repeat + 1), self.start)
            parts.append(_attend(query[:, :, new:], keys, values, mask))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2)

    def _originals(self, query: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        if self.step.aligned and first == 0:  # padding on the right is later than every token, so causal hides it
            return _attend(query, keys, values, None, causal=True)
        return _attend(query, keys, values, self.step.mask(first, range(1, 2), None))

    def attend_full(self, query: Tensor, key: Tensor, value: Tensor, reference: bool) -> Tensor:
        """Attention of a layer that :attr:`is_full`, as in training.

        ``query`` [b, rows out, heads, d], ``key`` and ``value`` [b, K * n, heads, d]; returns [b, rows out, heads, d].
        ``reference`` takes the dense-mask formula instead of the decomposition into flash attention and a window.
        """
        parts = [part.unflatten(1, (-1, self.step.new)).permute(1, 2, 0, 3, 4) for part in (query, key, value)]
        attention = reference_attention if reference else sdpa_attention
        if self.step.documents is not None:
            context = attend_documents(attention, *parts, self.step.policy, self.step.documents)
        else:
            context = attention(*parts, self.step.policy)
        return context.permute(2, 0, 1, 3, 4).flatten(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    mask = None if mask is None else mask.to(query.device)  # the layers may lie on several devices
    grouped = query.size(1) != keys.size(1)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _cone(policy: KVPolicy, num_layers: int, positions: Tensor, wanted: int) -> list[int]:
    """First slot of the hidden copies each layer computes, and ``wanted`` for the rows after the last layer.

    A row of the batch that ends before ``wanted`` (right padding) still needs its own last token's hidden entries, for
    the cache.
    """
    slots = torch.arange(positions.size(1), device=positions.device)
    last = positions.amax(1)
    asked = (positions >= 0) & (slots >= wanted)
    first = torch.where(asked, positions, last[:, None]).amin(1)
    layers = range(1, num_layers + 1)
    cone = torch.tensor([[policy.cone_start(max(p, 0), n, num_layers) for n in layers] for p in first.tolist()])
    reached = positions[:, None, :] >= cone.to(positions.device)[:, :, None]  # [b, layers, new]
    start = torch.where(reached.any(2), reached.long().argmax(2), wanted).amin(0)
    return [min(s, wanted) for s in start.tolist()] + [wanted]

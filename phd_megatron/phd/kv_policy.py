"""Which keys a query sees, and everything that follows from it.

PHD-Transformer (arXiv 2504.14992) repeats every token ``K`` times inside the decoder. Copy 1 is the *original*
token: its keys and values are persistent and visible to every later token. Copies ``2..K`` are *hidden decoding
tokens*: their keys and values live only inside a local window. :class:`KVPolicy` is the one definition of that
rule. The attention mask, the KV cache, the prefill cone, context-parallel exchange and FLOP counts are all read
from it; nothing else derives them again.

Positions are 0-based token positions inside a sample, copies are 1-based as in the paper (Eq. 2). Where documents of a
sample are kept apart (:mod:`phd_megatron.phd.documents`), each is a sequence of its own: its tokens see nothing of the
others, and positions, windows and chunks count from its start. The module needs torch and the standard library alone,
because it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_WINDOW = 16
DEFAULT_CHUNK = 32


class Halo(NamedTuple):
    """Hidden KV that a context-parallel slice sees of the slice before it.

    Attributes:
        slice: number of the slice that sees it; the one before it holds it.
        sender: context-parallel rank of the slice before.
        receiver: context-parallel rank of the slice.
        positions: token positions, the last ones of the slice before.
    """

    slice: int
    sender: int
    receiver: int
    positions: range


class ContextParallelTraffic(NamedTuple):
    """What one context-parallel rank sends in one layer and sequence, in *entries*.

    An entry is the key and the value of one position and copy: ``2 * groups * head_dim`` numbers. The forward sends
    ``originals + halo_sent``. The backward fetches the originals again, which were not kept, and sends all gradients
    to the ranks that the keys came from: ``2 * originals + halo_returned``. Where documents are kept apart, what is
    seen of them was kept, and only gradients are sent.

    Attributes:
        originals: ``(size - 1) * length / size``, the same for every K.
        halo_sent: hidden entries that slices on other ranks see.
        halo_returned: hidden entries of other ranks that this rank sees, whose gradients go back.
        kept: whether the backward has what it needs of other ranks' originals.
    """

    originals: int
    halo_sent: int
    halo_returned: int
    kept: bool = False

    @property
    def forward(self) -> int:
        """Entries sent in a forward pass."""
        return self.originals + self.halo_sent

    @property
    def backward(self) -> int:
        """Entries sent in a backward pass."""
        return (1 if self.kept else 2) * self.originals + self.halo_returned


@dataclass(frozen=True)
class KVPolicy:
    """Visibility of keys in a PHD decoder (paper, Sec. 2 and Eq. 2).

    Args:
        repeat: ``K``, how often a token is repeated. 1 is the vanilla transformer.
        window: ``W``, how many token positions of hidden keys a hidden query sees, its own included. 1 is plain PHD.
        chunk: ``C``, the window never crosses a multiple of ``C`` positions. ``None`` means no chunks (PHD-SWA).

    Raises:
        ValueError: if a value is below 1.
    """

    repeat: int = 1
    window: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        for field, value in (("phd_repeat", self.repeat), ("phd_window", self.window), ("phd_chunk", self.chunk)):
            if field == "phd_chunk" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                cure = "use 1 or more" + (", or null for no chunks" if field == "phd_chunk" else "")
                raise ValueError(f"{field}={value!r}: it counts tokens, so it cannot be below 1; {cure}")

    @classmethod
    def from_options(
        cls, repeat: int = 1, window: int | None = None, chunk: int | None = None
    ) -> tuple[KVPolicy, str | None]:
        """Resolve what a user wrote; the second value says in words what was defaulted, if anything was."""
        if window is None and repeat > 1:
            if chunk is None:
                chunk = DEFAULT_CHUNK
            policy = cls(repeat, DEFAULT_WINDOW, chunk)
            return policy, f"phd_repeat={repeat} without phd_window: using {policy.name}"
        policy = cls(repeat, 1 if window is None else window, chunk)
        if repeat == 1 and (window is not None or chunk is not None):
            return policy, f"phd_window={window}, phd_chunk={chunk} have no effect at phd_repeat=1"
        return policy, None

    # ---------------------------------------------------------------- names and sizes

    @property
    def name(self) -> str:
        """The paper's name of the variant, such as ``PHD-CSWA-2-16-32``."""
        if self.repeat == 1:
            return "vanilla"
        if self.window == 1:
            return f"PHD-{self.repeat}"
        if self.chunk is None:
            return f"PHD-SWA-{self.repeat}-{self.window}-inf"
        return f"PHD-CSWA-{self.repeat}-{self.window}-{self.chunk}"

    @property
    def span(self) -> int:
        """Most token positions whose hidden keys one query can see, its own included: ``min(W, C)``."""
        return self.window if self.chunk is None else min(self.window, self.chunk)

    @property
    def max_hidden_entries(self) -> int:
        """Bound on the hidden KV entries a cache holds per layer and sequence: ``(K - 1) * min(W, C)``."""
        return (self.repeat - 1) * self.span

    # ---------------------------------------------------------------- visibility

    def original_visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Part (a): any copy of the query sees the original key of its own and every earlier token."""
        return key_position <= query_position

    def hidden_visible(
        self, query_position: Tensor, query_copy: Tensor, key_position: Tensor, key_copy: Tensor
    ) -> Tensor:
        """Part (b): hidden query ``(n, j)`` sees hidden key ``(m, i)`` inside the window and the chunk.

        ``0 <= n - m < W``, same chunk, and ``i <= j`` when ``m = n``. The arguments broadcast; copies are 1-based.
        """
        distance = query_position - key_position
        seen = (distance >= 0) & (distance < self.window) & ((distance > 0) | (key_copy <= query_copy))
        if self.chunk is not None:
            seen = seen & (query_position // self.chunk == key_position // self.chunk)
        return seen & (query_copy > 1) & (key_copy > 1)

    def visible(self, query_position: Tensor, query_copy: Tensor, key_position: Tensor, key_copy: Tensor) -> Tensor:
        """Eq. 2 in full: what query ``(n, j)`` sees of key ``(m, i)``. Broadcasts; returns bool."""
        original = (key_copy == 1) & self.original_visible(query_position, key_position)
        return original | self.hidden_visible(query_position, query_copy, key_position, key_copy)

    def mask(self, length: int, device: torch.device | str | None = None, starts: Tensor | None = None) -> Tensor:
        """Dense mask ``[K*length, K*length]``, True where the key is visible, copy-major rows and columns.

        Args:
            starts: ``[..., length]``, where the documents of samples begin; the mask then has the same dimensions
                before its two.
        """
        position, copy = torch.arange(length, device=device), torch.arange(1, self.repeat + 1, device=device)
        copy = copy.repeat_interleave(length)
        if starts is None:
            position = position.repeat(self.repeat)
            return self.visible(position[:, None], copy[:, None], position[None, :], copy[None, :])
        starts = starts.to(position.device)
        position = torch.cat([position - starts] * self.repeat, -1)
        document = torch.cat([starts] * self.repeat, -1)
        seen = self.visible(position[..., :, None], copy[:, None], position[..., None, :], copy[None, :])
        return seen & (document[..., :, None] == document[..., None, :])

    # ---------------------------------------------------------------- decoding

    def chunk_start(self, position: int) -> int:
        """First position of the chunk that holds ``position`` (0 without chunks)."""
        return 0 if self.chunk is None else position - position % self.chunk

    def first_hidden_key(self, position: int) -> int:
        """First position whose hidden keys a query at ``position`` sees."""
        return max(self.chunk_start(position), position - self.window + 1, 0)

    def retained_from(self, length: int) -> int:
        """First position whose hidden KV is still needed once ``length`` tokens are in the cache.

        Only queries at position ``length`` or later are still to come, and what they see starts no earlier.
        """
        return self.first_hidden_key(length)

    def cone_start(self, wanted: int, layer_number: int, num_layers: int) -> int:
        """First position whose hidden copies layer ``layer_number`` (1-based) must compute at prefill.

        ``wanted`` is the first position whose logits are asked for. A layer's hidden outputs are needed where the
        next layer looks, which is ``W - 1`` positions further back per layer and never past the chunk's start.
        """
        if not 1 <= layer_number <= num_layers:
            raise ValueError(f"layer_number={layer_number} is not in 1..{num_layers}")
        reach = (num_layers - layer_number + 1) * (self.window - 1)
        return max(self.chunk_start(wanted), wanted - reach, 0)

    # ---------------------------------------------------------------- context parallelism

    def context_parallel_slices(self, length: int, size: int, rank: int) -> tuple[range, ...]:
        """Token positions of a context-parallel rank: two zigzag slices of ``length / (2 * size)``, as mcore's.

        Raises:
            ValueError: if the length does not divide, or a window would reach past one neighbouring slice.
        """
        if not 0 <= rank < size:
            raise ValueError(f"context-parallel rank {rank} is not in 0..{size - 1}")
        if size == 1:
            return (range(length),)
        slice_length, rest = divmod(length, 2 * size)
        if rest or not slice_length:
            near = [n for n in (length - rest, length - rest + 2 * size) if n]
            raise ValueError(
                f"seq_length={length} is not a multiple of 2 * context_parallel_size = {2 * size}; "
                f"use {' or '.join(map(str, near))}"
            )
        if max(self.halo(i * slice_length) for i in range(2 * size)) > slice_length:
            raise ValueError(
                f"phd_window={self.window} reaches {self.window - 1} positions back, further than one context-parallel "
                f"slice of {slice_length} tokens; use a window of at most {slice_length + 1}, a chunk that divides "
                f"{slice_length}, or a smaller context_parallel_size"
            )
        return tuple(range(i * slice_length, (i + 1) * slice_length) for i in (rank, 2 * size - 1 - rank))

    def halo(self, slice_start: int) -> int:
        """Hidden positions before ``slice_start`` that queries of the slice see: at most ``W - 1``, in-chunk only."""
        return 0 if self.repeat == 1 else slice_start - self.first_hidden_key(slice_start)

    def document_halo(self, slice_length: int) -> int:
        """The same, wherever the slice begins in a document: chunks count from there.

        Raises:
            ValueError: if a window would reach past one neighbouring slice.
        """
        widest = 0 if self.repeat == 1 else self.span - 1
        if widest > slice_length:
            raise ValueError(
                f"hidden keys are seen {widest} positions back in a document, further than one context-parallel slice "
                f"of {slice_length} tokens; use a phd_window or phd_chunk of at most {slice_length + 1}, or a smaller "
                "context_parallel_size"
            )
        return widest

    def halos(self, length: int, size: int, *, documents: bool = False) -> tuple[Halo, ...]:
        """Every halo of a sequence, by slice. The middle one stays on its rank: both slices around it are there.

        With ``documents`` those that hold what is seen wherever documents begin, whose chunks count from there.

        Raises:
            ValueError: as :meth:`context_parallel_slices`.
        """
        owner = {part.start: rank for rank in range(size) for part in self.context_parallel_slices(length, size, rank)}
        widest = self.document_halo(length // (2 * size)) if documents and size > 1 else None
        wanted = (
            Halo(
                number,
                owner[before],
                owner[start],
                range(start - (self.halo(start) if widest is None else widest), start),
            )
            for number, (before, start) in enumerate(pairwise(sorted(owner)), start=1)
        )
        return tuple(halo for halo in wanted if halo.positions)

    @staticmethod
    def original_block(rank: int, source: int) -> tuple[int, int]:
        """What ``rank`` sees of the originals of another context-parallel rank, as ``(first, stop)``.

        Its queries from its local slice ``first`` on (0 or 1 of two) see all keys of the source's slices before
        ``stop``, and nothing else is seen: zigzag order leaves no partly masked block between two ranks. Within a
        rank its two slices in a row are plainly causal.
        """
        if rank == source:
            raise ValueError(f"context-parallel rank {rank} sees its own originals causally, not as a block")
        return (0, 1) if source < rank else (1, 2)

    def context_parallel_traffic(
        self, length: int, size: int, rank: int, *, documents: bool = False
    ) -> ContextParallelTraffic:
        """What a rank sends in one layer and sequence. K enters through the halo alone.

        Args:
            documents: they are kept apart.
        """
        halos = self.halos(length, size, documents=documents) if size > 1 else ()
        sent = [h for h in halos if h.sender != h.receiver and rank == h.sender]
        returned = [h for h in halos if h.sender != h.receiver and rank == h.receiver]
        return ContextParallelTraffic(
            originals=(size - 1) * (length // size),
            halo_sent=(self.repeat - 1) * sum(len(h.positions) for h in sent),
            halo_returned=(self.repeat - 1) * sum(len(h.positions) for h in returned),
            kept=documents,
        )

    # ---------------------------------------------------------------- counting

    def pairs(
        self, length: int, query_copies: int | None = None, slices: Iterable[range] | None = None
    ) -> tuple[int, int]:
        """Visible (query, key) pairs of one sequence as ``(part a, part b)``, exactly.

        ``query_copies`` counts only the last so many copies as queries: 1 is the pruned last layer. ``slices`` counts
        only queries at those positions: the work of a context-parallel rank.
        """
        slices = (range(length),) if slices is None else tuple(slices)
        found = [self.pairs_at(torch.arange(part.start, part.stop), query_copies) for part in slices]
        return sum(int(originals.sum()) for originals, _ in found), sum(int(hidden.sum()) for _, hidden in found)

    def pairs_at(self, positions: Tensor, query_copies: int | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`pairs` of the queries at each of ``positions`` (int64, any shape), counted from a document's start."""
        copies = self.repeat if query_copies is None else query_copies
        if not 1 <= copies <= self.repeat:
            raise ValueError(f"query_copies={query_copies} is not in 1..{self.repeat}")
        earlier = positions.clamp(max=self.window - 1)  # positions whose hidden keys are seen, the query's own left out
        if self.chunk is not None:
            earlier = torch.minimum(earlier, positions % self.chunk)
        hidden_queries = range(max(2, self.repeat - copies + 1), self.repeat + 1)
        own = sum(j - 1 for j in hidden_queries)
        return copies * (positions + 1), own + len(hidden_queries) * (self.repeat - 1) * earlier

    def document_pairs(self, lengths: Iterable[int], query_copies: int | None = None) -> tuple[int, int]:
        """:meth:`pairs` of a sample of documents that are kept apart, of these lengths."""
        found = [self.pairs(length, query_copies) for length in lengths]
        return sum(originals for originals, _ in found), sum(hidden for _, hidden in found)

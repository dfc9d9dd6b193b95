"""Documents that are kept apart, in a sequence that is spread over context-parallel ranks. Exact, for every backend.

A document that begins in a slice is computed there as a sequence of its own. What a slice has of one that began in an
earlier slice is its tail: its queries see the originals from the document's start on, which every rank fetches, and
hidden keys through a halo. So a rank keeps of other ranks' originals no more than those of a document that it goes on
with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

from .exchange import ContextParallel
from .fetch import Fetched, fetch


def attend_documents_over_ranks(
    attend: Callable[..., Tensor],
    tail: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    starts: Tensor,
    context: ContextParallel,
    scale: float | None = None,
) -> Tensor:
    """``[Kq, s_rank, b, heads, d]`` of ``query [Kq, s_rank, b, heads, d]``, ``key`` and ``value [K, s_rank, b, g, d]``.

    Args:
        attend: a backend, over whole sequences.
        tail: the same over the end of one, as :func:`.reference_context_parallel.reference_tail`.
        starts: ``[b, s_rank]`` of this rank's tokens: where in the whole sequence the document of each begins.

    Raises:
        ValueError: if a window reaches further back than one slice.
    """
    length = query.size(1) * context.size
    slices = policy.context_parallel_slices(length, context.size, context.rank)
    got = fetch(key, value, policy.halos(length, context.size, documents=True), context)
    alike = bool((starts == starts[0]).all())
    samples = [slice(None)] if alike else [slice(number, number + 1) for number in range(starts.size(0))]
    results = []
    for sample in samples:
        mine = _of_sample(got, sample)
        parts = [x.chunk(2, 1) for x in (query[:, :, sample], mine.key, mine.value)]
        outs = []
        for number, (place, own) in enumerate(zip(slices, starts[sample][0].chunk(2), strict=True)):
            first, lengths = int(own[0]), own.unique_consecutive(return_counts=True)[1].tolist()
            # Split, not sliced: the gradients of parts are then put together once, and not each into a tensor of zeros.
            pieces = [*zip(*(x[number].split(lengths, 1) for x in parts), strict=True)]
            if first < place.start:
                q, k, v = pieces.pop(0)
                whole = _whole(k, v, mine, policy, number, range(first, place.start))
                outs.append(tail(q, *whole, policy, scale=scale))
            outs += [attend(*piece, policy, scale=scale) for piece in pieces]
        results.append(torch.cat(outs, 1))
    return torch.cat(results, 2)


def _of_sample(got: Fetched, sample: slice) -> Fetched:
    near = tuple(x[:, :, :, sample] for x in got.near)
    return Fetched(got.key[:, :, sample], got.value[:, :, sample], got.originals[:, :, sample], (near[0], near[1]))


def _whole(
    key: Tensor, value: Tensor, got: Fetched, policy: KVPolicy, number: int, before: range
) -> tuple[Tensor, Tensor]:
    """What :func:`.reference_context_parallel.reference_tail` takes as originals and hidden keys.

    Args:
        key, value: ``[K, n, b, g, d]`` of the tail in slice ``number`` of this rank's two.
        before: positions of the document before the slice.
    """
    originals = torch.cat([got.originals[:, before.start : before.stop], torch.stack([key[0], value[0]])], 1)
    near = got.near[number]
    seen = near.size(1) - policy.halo(len(before))
    hidden = torch.stack([key[1:], value[1:]]).transpose(1, 2)  # [2, n, K - 1, b, g, d]
    return originals, torch.cat([near[:, seen:], hidden], 1)

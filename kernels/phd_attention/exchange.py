"""What context-parallel ranks tell each other: originals' keys and values, halos of hidden ones, and gradients back.

Tensors travel as ``[2, G, positions, ...]``, key and value together, positions in the third dimension. Transfers start
when an object here is made and are waited for where their data is used, so the caller computes in between.

Needs torch.distributed alone. Two rules make it right on gloo as well as on NCCL: messages that may be on their way
between one pair of ranks at the same time have tags of their own (gloo does not match them by order), and what is being
sent stays referenced until it is waited for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phd_megatron.phd.kv_policy import Halo

COMM_TYPES = ("all_gather", "p2p")

_KV_TAG, _GRADIENT_TAG = 1, 2
_HALO_TAG = 3  # plus twice the slice's number, plus one on the way back

# torch 2.13 renamed these two and warns at the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Event(NamedTuple):
    """One line of a trace: ``compute``, or ``start``, ``wait`` or ``arrived`` of a transfer, its step, the time in s.

    On a GPU the times are those at which the host gave the work to the device.
    """

    what: str
    step: int
    seconds: float


@dataclass
class ContextParallel:
    """How the ranks of one layer exchange keys and values.

    Attributes:
        group: the context-parallel process group.
        comm_type: ``all_gather``, or ``p2p`` for a ring.
        sent: bytes this rank has sent, by kind of transfer. An all-gather or reduce-scatter over ``size`` ranks counts
            as ``size - 1`` shards, what its ring algorithm sends.
        trace: give it a list to have every start, wait and computation of the next calls recorded there.

    Raises:
        ValueError: if ``comm_type`` is neither.
    """

    group: dist.ProcessGroup
    comm_type: str = "all_gather"
    sent: Counter[str] = field(default_factory=Counter)
    trace: list[Event] | None = None

    def __post_init__(self) -> None:
        if self.comm_type not in COMM_TYPES:
            raise ValueError(f"cp_comm_type={self.comm_type!r} is not available; use {' or '.join(COMM_TYPES)}")
        self.size: int = self.group.size()
        self.rank: int = self.group.rank()

    def note(self, what: str, step: int) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(Event(what, step, time.perf_counter()))

    def count(self, kind: str, tensor: Tensor, times: int = 1) -> None:
        """Count ``tensor`` as sent ``times`` times."""
        self.sent[kind] += times * tensor.numel() * tensor.element_size()


class _Transfers:
    """Sends and receives under way; ``wait`` returns the received tensors in the order in which they were given."""

    def __init__(
        self,
        context: ContextParallel,
        kind: str,
        sends: Sequence[tuple[Tensor, int, int]],
        receives: Sequence[tuple[Tensor, int, int]],
    ) -> None:
        """Both list (tensor, rank in the group, tag)."""
        operations = []
        for function, transfers in ((dist.isend, sends), (dist.irecv, receives)):
            for tensor, rank, tag in transfers:
                peer = dist.get_global_rank(context.group, rank)
                operations.append(dist.P2POp(function, tensor, peer, context.group, tag))
        for tensor, _, _ in sends:
            context.count(kind, tensor)
        self._received = [tensor for tensor, _, _ in receives]
        self._sent = [tensor for tensor, _, _ in sends]  # must live until the end of the transfer
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []
        return self._received


def _around(context: ContextParallel, kind: str, tensor: Tensor, tag: int) -> _Transfers:
    """One step of the ring: ``tensor`` to the next rank, as much from the one before."""
    following, before = (context.rank + 1) % context.size, (context.rank - 1) % context.size
    return _Transfers(context, kind, [(tensor, following, tag)], [(torch.empty_like(tensor), before, tag)])


class Originals:
    """Keys and values of the other ranks' originals, as they come.

    Iterating gives ``(sources, kv [sources, 2, G, positions, d])``: with ``all_gather`` the ranks before this one and
    then those after it, with ``p2p`` one rank at a time, nearest before first, while the next is on its way.

    Args:
        own: ``[2, G, positions, d]``, contiguous.
    """

    def __init__(self, own: Tensor, context: ContextParallel) -> None:
        self._context = context
        self._own = own
        if context.comm_type == "p2p":
            context.note("start", 1)
            self._ring = _around(context, "p2p", own, _KV_TAG)
            return
        context.count("all_gather", own, context.size - 1)
        self._gathered = own.new_empty(context.size, *own.shape)
        self._work = _all_gather(self._gathered.flatten(0, 1), own, group=context.group, async_op=True)

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        return self._from_ring() if self._context.comm_type == "p2p" else self._from_gather()

    def everything(self) -> Tensor:
        """All ranks' ``[size, 2, G, positions, d]``, this one's included, once the last has arrived."""
        result = self._own.new_empty(self._context.size, *self._own.shape)
        result[self._context.rank] = self._own
        for sources, kv in self:
            result[sources.start : sources.stop] = kv
        return result

    def _from_gather(self) -> Iterator[tuple[range, Tensor]]:
        self._work.wait()
        rank, size = self._context.rank, self._context.size
        for sources in (range(rank), range(rank + 1, size)):
            if sources:
                yield sources, self._gathered[sources.start : sources.stop]

    def _from_ring(self) -> Iterator[tuple[range, Tensor]]:
        context = self._context
        for step in range(1, context.size):
            context.note("wait", step)
            (arrived,) = self._ring.wait()
            context.note("arrived", step)
            if step + 1 < context.size:
                context.note("start", step + 1)
                self._ring = _around(context, "p2p", arrived, _KV_TAG)
            source = (context.rank - step) % context.size
            yield range(source, source + 1), arrived.unsqueeze(0)


class OriginalGradients:
    """Gradients of other ranks' originals on their way home, where they are added up.

    The ranks must be given in the order in which :class:`Originals` gave them: in a ring each gradient follows its
    keys one step behind, and every rank on the way adds its own part.
    """

    def __init__(self, context: ContextParallel) -> None:
        self._context = context
        self._ring: _Transfers | None = None
        self._parts: list[tuple[range, Tensor]] = []

    def add(self, sources: range, gradient: Tensor) -> None:
        """``gradient [sources, 2, G, positions, d]`` of what :class:`Originals` gave for ``sources``."""
        if self._context.comm_type == "all_gather":
            self._parts.append((sources, gradient))
            return
        total = gradient[0].contiguous() if self._ring is None else gradient[0] + self._ring.wait()[0]
        self._ring = _around(self._context, "p2p_gradient", total, _GRADIENT_TAG)

    def total(self, own: Tensor) -> Tensor:
        """``own``, the local part for this rank's originals ``[2, G, positions, d]``, plus all other ranks'."""
        context = self._context
        if context.comm_type == "p2p":
            assert self._ring is not None
            return own + self._ring.wait()[0]
        everything = own.new_empty(context.size, *own.shape)
        everything[context.rank] = own
        for sources, gradient in self._parts:
            everything[sources.start : sources.stop] = gradient
        result = torch.empty_like(own, memory_format=torch.contiguous_format)
        context.count("reduce_scatter", result, context.size - 1)
        _reduce_scatter(result, everything.flatten(0, 1), group=context.group)
        return result


def _local(number: int, rank: int) -> int:
    """Which of a rank's two slices is number ``number`` of the sequence: 0 for the early one, 1 for the late one."""
    return 0 if number == rank else 1


class HaloKeys:
    """Hidden keys and values just before this rank's two slices.

    Args:
        hidden: ``[2, G, positions, ...]`` of this rank.
        halos: all halos of the sequence (:meth:`KVPolicy.halos`).
    """

    def __init__(self, hidden: Tensor, halos: Sequence[Halo], context: ContextParallel) -> None:
        rank, half = context.rank, hidden.size(2) // 2
        self._near = [hidden[:, :, :0], hidden[:, :, :0]]
        sends, receives, self._arriving = [], [], []
        for halo in halos:
            width, tag = len(halo.positions), _HALO_TAG + 2 * halo.slice
            edge = (_local(halo.slice - 1, rank) + 1) * half
            if halo.sender == rank == halo.receiver:
                self._near[_local(halo.slice, rank)] = hidden[:, :, edge - width : edge]
            elif halo.sender == rank:
                sends.append((hidden[:, :, edge - width : edge].contiguous(), halo.receiver, tag))
            elif halo.receiver == rank:
                receives.append((hidden.new_empty(*hidden.shape[:2], width, *hidden.shape[3:]), halo.sender, tag))
                self._arriving.append(_local(halo.slice, rank))
        self._transfers = _Transfers(context, "halo", sends, receives)

    def wait(self) -> list[Tensor]:
        """``[2, G, width, ...]`` for the first and the second slice; a width of 0 where nothing is seen."""
        for index, tensor in zip(self._arriving, self._transfers.wait(), strict=True):
            self._near[index] = tensor
        return self._near


class HaloGradients:
    """Gradients of halos on their way back to the rank that holds the positions.

    Args:
        near: gradients of what :class:`HaloKeys` gave, for both slices.
    """

    def __init__(self, near: Sequence[Tensor], halos: Sequence[Halo], context: ContextParallel) -> None:
        rank = context.rank
        sends, receives = [], []
        self._arriving: list[Halo] = []
        self._staying: list[tuple[Halo, Tensor]] = []
        self._rank = rank
        for halo in halos:
            tag = _HALO_TAG + 2 * halo.slice + 1
            gradient = near[_local(halo.slice, rank)]
            if halo.sender == rank == halo.receiver:
                self._staying.append((halo, gradient))
            elif halo.receiver == rank:
                sends.append((gradient.contiguous(), halo.sender, tag))
            elif halo.sender == rank:
                shape = (*gradient.shape[:2], len(halo.positions), *gradient.shape[3:])
                receives.append((gradient.new_empty(shape), halo.receiver, tag))
                self._arriving.append(halo)
        self._transfers = _Transfers(context, "halo_gradient", sends, receives)

    def add_to(self, gradient: Tensor) -> None:
        """Add what other slices found to ``gradient [2, G, positions, ...]`` of this rank's hidden keys, in place."""
        half = gradient.size(2) // 2
        arrived = zip(self._arriving, self._transfers.wait(), strict=True)
        for halo, part in (*self._staying, *arrived):
            edge = (_local(halo.slice - 1, self._rank) + 1) * half
            gradient[:, :, edge - len(halo.positions) : edge] += part

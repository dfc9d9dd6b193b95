"""What a dry run has found out about one rank, and how many micro-batches it had to run for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from phd_megatron.config.plain import Json
from phd_megatron.planning.groups import Group, link
from phd_megatron.planning.trace import Counts, Product, Transfer
from phd_megatron.runtime.parallel_dims import ParallelDims

Key = TypeVar("Key", bound=Transfer | Product)


class Collective(NamedTuple):
    """One kind of transfer of a step, over one group. Messages of two ranks are a row for each link.

    ``bytes``: see :mod:`~phd_megatron.planning.trace`. ``link``: NVLink where all that take part are of one node.
    """

    kind: str
    group: str
    size: int
    stride: int
    link: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class RankPlan:
    """One rank's step, in the steady state.

    Attributes:
        layout: in words.
        path: what was traced: part to implementation.
        microbatches: of a step; ``run`` those that were run, from which the others were extended.
        held: bytes between steps by kind: weights, gradients, optimizer, other.
        peak: the most bytes within a step; ``at_peak`` these by kind.
        products: calls of each shape.
        flops: operations of a step.
        order: transfers and products, where asked for, of the smallest step that was run.
    """

    rank: int
    world_size: int
    layout: str
    path: Mapping[str, str]
    microbatches: int
    run: tuple[int, ...]
    held: Mapping[str, int]
    peak: int
    at_peak: Mapping[str, int]
    collectives: tuple[Collective, ...]
    products: Mapping[Product, int]
    flops: int
    order: tuple[tuple[str, ...], ...] | None = None

    def as_dict(self) -> Json:
        """Plain data for a file."""
        plain = {name: value for name, value in vars(self).items() if name not in ("collectives", "products")}
        plain["collectives"] = [row._asdict() for row in self.collectives]
        plain["products"] = [
            {**product._asdict(), "calls": calls, "flops": calls * product.flops}
            for product, calls in sorted(self.products.items(), key=lambda item: -item[0].flops * item[1])
        ]
        return plain


@dataclass(frozen=True)
class Step:
    """One step that was run.

    Attributes:
        microbatches: of it.
        peak, at_peak: as :class:`RankPlan`'s.
    """

    microbatches: int
    counts: Counts
    peak: int
    at_peak: Mapping[str, int]


def fewest(dims: ParallelDims) -> int:
    """The smallest step that a layout can take."""
    return dims.chunk_microbatches if dims.vpp else 1


def steps_to_run(dims: ParallelDims, count: int) -> tuple[int, ...]:
    """Micro-batches of the steps that say what a step of ``count`` does: it alone, or two from which it is extended.

    Each micro-batch (of virtual stages, each group) sends and multiplies as much as any other, so the smallest step and
    a larger one say how much. The larger one fills the pipeline, where the most memory is reached.
    """
    by = fewest(dims)
    full = 2 * by if dims.vpp else max(2, dims.pp)
    full += (count - full) % by
    return (count,) if count <= full else (by, full)


def extended(steps: tuple[Step, ...], count: int, report: int = 0) -> Step:
    """A step of ``count`` micro-batches, by a straight line through what was run.

    Args:
        report: bytes that this rank keeps of each micro-batch to the end of the step.

    Raises:
        ValueError: it is none of those that were run, and they are not two.
    """
    for step in steps:
        if step.microbatches == count:
            return step
    first, second = steps
    further, by = count - first.microbatches, second.microbatches - first.microbatches

    def line(before: Counter[Key], after: Counter[Key]) -> Counter[Key]:
        return Counter({key: _at(before[key], after[key], further, by) for key in {*before, *after}})

    one, two = first.counts, second.counts
    counts = Counts(line(one.calls, two.calls), line(one.bytes, two.bytes), line(one.products, two.products), one.order)
    kept = report * (count - second.microbatches)
    at_peak = {**second.at_peak, "activations": second.at_peak["activations"] + kept}
    return Step(count, counts, second.peak + kept, at_peak)


def _at(before: int, after: int, further: int, by: int) -> int:
    more, rest = divmod((after - before) * further, by)
    if rest:
        raise ValueError(f"{before} and {after} calls or bytes do not grow with each of {by} micro-batches alike")
    return before + more


def collectives(counts: Counts, groups: Mapping[str, Group], rank: int, per_node: int) -> tuple[Collective, ...]:
    """Rows of what was counted, most bytes first. Transfers of a group with one rank move nothing and are left out."""
    calls: Counter[tuple[str, str, int, int, str]] = Counter()
    sizes: Counter[tuple[str, str, int, int, str]] = Counter()
    for transfer in counts.calls:
        group = groups[transfer.group]
        if len(group.ranks) < 2:
            continue
        pair = group.ranks if transfer.peer is None else (rank, group.ranks[transfer.peer])
        row = (transfer.kind, group.label, len(group.ranks), group.stride, link(pair, per_node))
        calls[row] += counts.calls[transfer]
        sizes[row] += counts.bytes[transfer]
    found = (Collective(*row, calls[row], sizes[row]) for row in calls)
    return tuple(sorted(found, key=lambda row: (-row.bytes, row)))


def in_order(counts: Counts, groups: Mapping[str, Group]) -> Iterator[tuple[str, ...]]:
    """What a part did, one after the other, in words."""
    for event in counts.order or ():
        if isinstance(event, Product):
            yield (event.what, *map(str, event[1:5]))
        else:
            transfer, size = event
            yield (transfer.kind, groups[transfer.group].label, str(size))

"""Context-parallel attention on real process groups, against the same attention on one rank.

Runs under torchrun with the names of what to do: ``cases`` compares outputs, all gradients and bytes sent, ``halves``
does so in bfloat16, ``fused`` with the Triton kernels, ``broken`` takes parts away, ``overlap`` prints a trace of
the ring, ``flight`` has every kind of message on its way at once.
"""

from __future__ import annotations

import itertools
import sys
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from phd_megatron.kernels.phd_attention import COMM_TYPES, ContextParallel, phd_attention
from phd_megatron.kernels.phd_attention.exchange import HaloGradients, HaloKeys, OriginalGradients, Originals
from phd_megatron.phd.documents import starts_of_borders
from phd_megatron.phd.kv_policy import KVPolicy

BATCH, GROUPS, RATIO, WIDTH = 2, 2, 2, 8
SLICE = 12  # tokens of one of the 2 * size slices
# vanilla, plain PHD, chunks that divide a slice, chunks that do not, a window as long as it may be, no chunks
POLICIES = (
    KVPolicy(1),
    KVPolicy(2, 1),
    KVPolicy(3, 5, 4),
    KVPolicy(2, 16, 12),
    KVPolicy(2, 4, 8),
    KVPolicy(3, 6, 7),
    KVPolicy(3, 40, 5),
    KVPolicy(2, SLICE + 1, 24),
    KVPolicy(3, SLICE + 1),
    KVPolicy(2, 6),
    KVPolicy(5, 3, 18),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(policy: KVPolicy, length: int, query_copies: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and incoming gradient of the whole sequence, equal on all ranks."""
    generator = torch.Generator().manual_seed(7)

    def one(copies: int, heads: int) -> Tensor:
        return torch.randn(copies, length, BATCH, heads, WIDTH, generator=generator, dtype=torch.float64)

    heads = GROUPS * RATIO
    return one(query_copies, heads), one(policy.repeat, GROUPS), one(policy.repeat, GROUPS), one(query_copies, heads)


def attend(inputs: tuple[Tensor, ...], grad: Tensor, policy: KVPolicy, **options: object) -> list[Tensor]:
    """Output, then the gradients of query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = phd_attention(*leaves, policy, **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def case(
    policy: KVPolicy,
    backend: str,
    comm_type: str,
    dtype: torch.dtype,
    query_copies: int,
    starts: Tensor | None = None,
) -> float:
    """Worst relative error on this rank; bytes are checked against the formula. ``starts`` keep documents apart."""
    group = dist.group.WORLD
    size, rank = dist.get_world_size(), dist.get_rank()
    length = 2 * size * SLICE
    *inputs, grad = draw(policy, length, query_copies)
    expected = attend(tuple(inputs), grad, policy, backend="reference", starts=starts)
    mine = torch.tensor([n for part in policy.context_parallel_slices(length, size, rank) for n in part])
    local = [x[:, mine].to(dtype) for x in (*inputs, grad)]
    context = ContextParallel(group, comm_type)
    own = None if starts is None else starts[:, mine]
    found = attend(tuple(local[:3]), local[3], policy, backend=backend, context=context, starts=own)
    worst = 0.0
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert a.dtype is dtype
        floor = 1e-3 * float(grad.norm())
        error = float((a.double() - b[:, mine]).norm()) / max(float(b[:, mine].norm()), floor)
        assert error <= TOLERANCE[dtype], f"{policy.name} {backend} {comm_type} {dtype}: {name} off by {error:.1e}"
        worst = max(worst, error)
    traffic = policy.context_parallel_traffic(length, size, rank, documents=starts is not None)
    if backend == "reference":
        traffic = traffic._replace(kept=True)  # the plain path keeps the whole sequence
    entry = 2 * BATCH * GROUPS * WIDTH * dtype.itemsize
    formula = (traffic.forward + traffic.backward) * entry
    sent = sum(context.sent.values())
    assert sent == formula, f"{policy.name} {comm_type}: sent {sent} bytes, the formula says {formula}"
    assert context.sent["halo"] == traffic.halo_sent * entry
    assert context.sent["halo_gradient"] == traffic.halo_returned * entry
    return worst


def cases() -> None:
    """Every policy, backend and way of exchange."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for policy in POLICIES:
        errors = []
        for backend, comm_type, dtype in itertools.product(
            ("sdpa", "reference"), COMM_TYPES, (torch.float64, torch.float32)
        ):
            for query_copies in {policy.repeat, 1}:
                errors.append(case(policy, backend, comm_type, dtype, query_copies))
        traffic = policy.context_parallel_traffic(2 * size * SLICE, size, rank)
        vanilla = KVPolicy(1).context_parallel_traffic(2 * size * SLICE, size, rank)
        assert traffic.originals == vanilla.originals
        print(f"OK rank {rank} {policy.name}: worst {max(errors):.1e}, {traffic}\n", end="", flush=True)


def borders_of(length: int) -> dict[str, list[list[int]]]:
    """Where documents of the two samples begin: around the borders of slices, in the middle, nowhere, everywhere."""
    edges = [n for border in range(SLICE, length, SLICE) for n in (border - 1, border, border + 1)]
    scattered = [0, 3, 4, SLICE + 5, 2 * SLICE + 1, length - SLICE - 2, length - 2]
    return {
        "one and two": [[0], [0, SLICE + 2]],
        "around borders": [[0, *edges], [0, *range(SLICE, length, SLICE)]],
        "scattered": [sorted({*scattered}), [0, length // 2 + 1]],
        "alike": [[0, 5, SLICE + 7], [0, 5, SLICE + 7]],
        "tokens": [[*range(length)], [0, length - 1]],
    }


def documents() -> None:
    """Documents that are kept apart, wherever they begin: every policy, backend and way of exchange."""
    size = dist.get_world_size()
    length, errors = 2 * size * SLICE, []
    for (name, borders), policy in itertools.product(borders_of(length).items(), POLICIES):
        starts = torch.stack([starts_of_borders([*row, length]) for row in borders])
        if policy.repeat > 1 and policy.span - 1 > SLICE:
            continue
        for backend, comm_type in (("sdpa", "all_gather"), ("reference", "p2p"), ("sdpa", "p2p")):
            for query_copies in {policy.repeat, 1}:
                errors.append(case(policy, backend, comm_type, torch.float64, query_copies, starts))
        print(f"OK {name}, {policy.name}\n", end="", flush=True)
    case(KVPolicy(3, 6, 7), "sdpa", "p2p", torch.bfloat16, 3, starts)
    print(f"OK documents: worst {max(errors):.1e}\n", end="", flush=True)


def fused_documents() -> None:
    """The same by the Triton kernels, in the interpreter."""
    length = 2 * dist.get_world_size() * SLICE
    borders = borders_of(length)["scattered"]
    starts = torch.stack([starts_of_borders([*row, length]) for row in borders])
    for policy, query_copies in ((KVPolicy(1), 1), (KVPolicy(3, 6, 7), 3), (KVPolicy(2, SLICE + 1), 1)):
        for backend in ("triton", "sdpa_triton"):
            case(policy, backend, "all_gather", torch.float32, query_copies, starts)
            print(f"OK {backend} documents, {policy.name}\n", end="", flush=True)


def halves() -> None:
    """bfloat16: the merges run in float32."""
    for policy, comm_type in itertools.product((KVPolicy(1), KVPolicy(3, 6, 7)), COMM_TYPES):
        case(policy, "sdpa", comm_type, torch.bfloat16, policy.repeat)
        equal_values(policy, "sdpa", comm_type)
    print("OK bfloat16", flush=True)


def equal_values(policy: KVPolicy, backend: str, comm_type: str) -> None:
    """Attention over equal values is that value, whatever the weights, and its rounding is no excuse.

    1.25 and its like are bfloat16 numbers, and so is every rank's part. Parts that are added up in float32 give them
    back exactly; in bfloat16 the products with the weights of the parts lose their last bits on the way.
    """
    size = dist.get_world_size()
    length = 2 * size * SLICE
    query, key, value, _ = draw(policy, length, policy.repeat)
    numbers = 1 + torch.arange(WIDTH, dtype=torch.float64) / WIDTH
    value = numbers.expand(value.shape)
    mine = [n for part in policy.context_parallel_slices(length, size, dist.get_rank()) for n in part]
    local = [x[:, mine].to(torch.bfloat16) for x in (query, key, value)]
    found = phd_attention(*local, policy, backend=backend, context=ContextParallel(dist.group.WORLD, comm_type))
    wrong = int((found != numbers.to(torch.bfloat16)).sum())
    assert wrong == 0, f"{policy.name} {comm_type}: {wrong} of {found.numel()} numbers are rounded more than once"


def flight() -> None:
    """Halos, their gradients and both rings are on their way at once, begun in another order on every rank.

    What comes must be what was sent for that purpose: gloo gives a receive the next message of its tag.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    policy = KVPolicy(2, 6)
    length = 2 * size * SLICE
    halos = policy.halos(length, size)
    context = ContextParallel(dist.group.WORLD, "p2p")
    positions = torch.tensor([n for part in policy.context_parallel_slices(length, size, rank) for n in part]).float()
    widths = {halo.slice: len(halo.positions) for halo in halos}
    assert widths == {number: 5 for number in range(1, 2 * size)}
    hidden = positions.expand(2, 1, -1).contiguous()  # each place holds its position in the sequence
    slices = (rank, 2 * size - 1 - rank)
    back = [torch.full((2, 1, widths.get(number, 0)), 1000.0 + number) for number in slices]
    own = torch.full((2, 1, 5), 2000.0 + rank)
    gradient = torch.full((1, 2, 1, 5), 3000.0 + rank)
    for turn in range(size):
        started: dict[str, object] = {}
        begin = [
            ("originals", lambda: Originals(own, context)),
            ("halo", lambda: HaloKeys(hidden, halos, context)),
            ("gradients", lambda: HaloGradients(back, halos, context)),
            ("ring", lambda: OriginalGradients(context)),
        ]
        for name, start in (begin[(rank + turn) % 4 :] + begin[: (rank + turn) % 4])[:: 1 if rank % 2 else -1]:
            started[name] = made = start()
            if isinstance(made, OriginalGradients):
                made.add(range((rank - 1) % size, (rank - 1) % size + 1), gradient)
        dist.barrier()
        near = started["halo"].wait()  # type: ignore[attr-defined]
        for number, found in zip(slices, near, strict=True):
            expected = [float(n) for n in range(number * SLICE - 5, number * SLICE)] if number else []
            assert found.tolist() == [[expected]] * 2, f"slice {number} got {found.tolist()}"
        total = torch.zeros_like(hidden)
        started["gradients"].add_to(total)  # type: ignore[attr-defined]
        for index, number in enumerate(slices):  # the end of a slice is the halo of the next one
            ends = total[:, :, (index + 1) * SLICE - 5 : (index + 1) * SLICE]
            following = 1000.0 + number + 1 if number + 1 < 2 * size else 0.0
            assert torch.equal(ends, torch.full_like(ends, following)), f"slice {number} got {ends.tolist()}"
        sources = [next(iter(source)) for source, kv in started["originals"] if check_value(kv, 2000.0 + source[0])]  # type: ignore[attr-defined]
        assert sources == [(rank - step) % size for step in range(1, size)]
        before = (rank - 1) % size
        assert check_value(started["ring"].total(torch.zeros_like(own)), 3000.0 + before)  # type: ignore[attr-defined]
    print("OK flight", flush=True)


def check_value(tensor: Tensor, value: float) -> bool:
    assert torch.equal(tensor, torch.full_like(tensor, value)), f"{tensor.tolist()} is not {value}"
    return True


def fused() -> None:
    """The Triton kernels, in the interpreter: zigzag positions, halos on either slice, pruned queries."""
    for policy, comm_type, query_copies in (
        (KVPolicy(1), "all_gather", 1),
        (KVPolicy(3, 6, 7), "all_gather", 3),
        (KVPolicy(2, SLICE + 1), "p2p", 2),
        (KVPolicy(3, 5, 4), "all_gather", 1),
    ):
        for backend in ("triton", "sdpa_triton"):
            error = case(policy, backend, comm_type, torch.float32, query_copies)
            print(f"OK {backend} {policy.name}: {error:.1e}\n", end="", flush=True)


def no_halo(policy: KVPolicy, slice_start: int) -> int:
    return 0


def every_source_is_earlier(rank: int, source: int) -> tuple[int, int]:
    """What contiguous slices would allow: all of the ranks before, for all queries."""
    return (0, 2) if source < rank else (1, 1)


def broken() -> None:
    """Without the halo, or with blocks that do not follow zigzag order, the numbers are wrong."""
    for name, change in (
        ("halo", mock.patch.object(KVPolicy, "halo", no_halo)),
        ("zigzag", mock.patch.object(KVPolicy, "original_block", staticmethod(every_source_is_earlier))),
    ):
        wrong = torch.zeros(1)
        with change:
            try:
                case(KVPolicy(2, 6), "sdpa", "all_gather", torch.float64, 2)
            except AssertionError as error:
                assert "off by" in str(error), error
                wrong += 1
        dist.all_reduce(wrong)
        if dist.get_rank() == 0:
            print(f"without {name}: wrong on {int(wrong)} ranks", flush=True)


def overlap() -> None:
    """Trace of a longer pass around the ring, forward and backward."""
    size = dist.get_world_size()
    policy, length = KVPolicy(2, 16, 32), 2 * size * 256
    rows = torch.tensor([n for part in policy.context_parallel_slices(length, size, dist.get_rank()) for n in part])
    *inputs, grad = (x[:, rows].float() for x in draw(policy, length, policy.repeat))
    context = ContextParallel(dist.group.WORLD, "p2p", trace=[])
    out = phd_attention(*[x.requires_grad_() for x in inputs], policy, backend="sdpa", context=context)
    forward, context.trace = context.trace or [], []
    out.backward(grad)
    if dist.get_rank() == 0:
        for name, events in (("forward", forward), ("backward", context.trace)):
            for event in events:
                milliseconds = 1e3 * (event.seconds - events[0].seconds)
                print(f"TRACE {name} {event.what} {event.step} {milliseconds:.2f} ms", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    torch.set_num_threads(1)
    parts = (cases, documents, halves, fused, fused_documents, broken, overlap, flight)
    for part in sys.argv[1:]:
        {function.__name__: function for function in parts}[part]()
    dist.barrier()
    dist.destroy_process_group()

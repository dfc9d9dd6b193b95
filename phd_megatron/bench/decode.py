"""``phd-megatron bench decode``: attention of one decoding step over a KV cache, ``K`` copies against one.

The floor is the quickest decoding of a vanilla model at hand, which reads the same originals. Steps run as CUDA graphs,
as a step of generation should. Results are compared with the definition in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phd_megatron.bench.arguments import policies_of
from phd_megatron.bench.place import Place, choose_place, not_interpreted
from phd_megatron.bench.results import Report, Result, Row
from phd_megatron.bench.timing import FORWARD, Contender, Step, measure_beside_a_copy, relative_error
from phd_megatron.console.tables import milliseconds, print_table
from phd_megatron.console.terminal import show

if TYPE_CHECKING:
    import torch

    from phd_megatron.phd.kv_policy import KVPolicy

    #: arguments of ``decode_attention`` without the policy: query, its position, originals' keys, values and places,
    #: hidden keys, values and places (None for K = 1)
    #: of decode_attention, without the policy
    Inputs = tuple[
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ]
    Cases = Sequence[tuple[KVPolicy, Inputs]]

VANILLA = "vanilla"


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if a check fails."""
    from phd_megatron.kernels.decode_attention import decode_problem
    from phd_megatron.phd.kv_policy import KVPolicy

    policies, place = policies_of(args), choose_place(args)
    problem = not_interpreted(decode_problem(place.device, place.dtype, args.head_dim))
    report = Report(args, place, "kv_length", "ratio_to_vanilla")
    for length, batch in itertools.product(args.kv_length, args.batch):
        cases = [(policy, _inputs(args, policy, length, batch, place)) for policy in [KVPolicy(1), *policies]]
        if problem is None and not _is_right(cases, place):
            return 1
        contenders = _contenders(cases, problem is None)
        bandwidth = measure_beside_a_copy(contenders, args.rounds, place.device)
        result = _result(args, cases, length, batch, contenders, bandwidth)
        report.add(result)
        _print(result, args, place, bandwidth)
        if problem is not None:
            show(f"the Triton kernel is not timed: {problem}")
    return 0


def _is_right(cases: Cases, place: Place) -> bool:
    """Whether the kernel computes what the definition says, which is said."""
    worst = max(_error(policy, given) for policy, given in cases)
    show(f"kernel against the definition: worst relative error {worst:.1e} (allowed {place.tolerance:g})")
    if worst <= place.tolerance:
        return True
    show("error: the result is wrong, so it is not timed")
    return False


def _inputs(args: argparse.Namespace, policy: KVPolicy, length: int, batch: int, place: Place) -> Inputs:
    """Of a step in the middle of generation."""
    import torch

    generator = torch.Generator().manual_seed(0)
    position = torch.full((batch,), length - 1, device=place.device)
    query = place.draw(generator, policy.repeat, batch, args.heads, args.head_dim)
    key, value = (place.draw(generator, batch, args.kv_heads, length, args.head_dim) for _ in range(2))
    places = torch.arange(length, device=place.device).expand(batch, -1).contiguous()
    if policy.repeat == 1:
        return query, position, key, value, places, None, None, None
    first = policy.first_hidden_key(length - 1)
    kept = torch.arange(first, length, device=place.device).expand(batch, -1).contiguous()
    shape = (batch, args.kv_heads, policy.repeat - 1, kept.size(1), args.head_dim)
    hidden_key, hidden_value = (place.draw(generator, *shape) for _ in range(2))
    return query, position, key, value, places, hidden_key, hidden_value, kept


def _error(policy: KVPolicy, given: Inputs) -> float:
    from phd_megatron.kernels.decode_attention import decode_attention, decode_attention_reference

    query, position, key, value, places, hidden_key, hidden_value, kept = given
    hidden = [None if x is None else x.double() for x in (hidden_key, hidden_value)]
    expected = decode_attention_reference(
        query.double(), position, key.double(), value.double(), places, hidden[0], hidden[1], kept, policy
    )
    return relative_error([decode_attention(*given, policy)], [expected])


def _contenders(cases: Cases, kernel: bool) -> list[Contender]:
    from torch.nn.functional import scaled_dot_product_attention

    from phd_megatron.kernels.decode_attention import decode_attention, decode_attention_reference

    query, _, key, value = cases[0][1][:4]
    rows = query.permute(1, 2, 0, 3)  # [b, heads, 1, d]

    def vendor() -> None:
        scaled_dot_product_attention(rows, key, value, enable_gqa=rows.size(1) > key.size(1))

    ways = {"definition": decode_attention_reference} | ({"kernel": decode_attention} if kernel else {})

    def ours(name: str, policy: KVPolicy, given: Inputs) -> Step:
        def step() -> None:
            ways[name](*given, policy)

        return step

    contenders = [Contender(f"{VANILLA}, torch SDPA", {FORWARD: vendor})]
    return contenders + [
        Contender(f"{policy.name}, {name}", {FORWARD: ours(name, policy, given)})
        for policy, given in cases
        for name in ways
    ]


def _result(
    args: argparse.Namespace,
    cases: Cases,
    length: int,
    batch: int,
    contenders: Sequence[Contender],
    bandwidth: float,
) -> Result:
    best = min(c.median(FORWARD) for c in contenders if c.name.startswith(VANILLA))
    read = {  # keys and values, once; queries and outputs are small
        policy.name: sum(x.numel() * x.element_size() for x in (*given[2:4], *given[5:7]) if x is not None)
        for policy, given in cases
    }
    rows = []
    for contender in contenders:
        time = contender.median(FORWARD)
        speed = read[contender.name.split(",")[0]] / (time * 1e6)
        numbers = {"milliseconds": time, "ratio_to_vanilla": time / best, "gigabytes_per_second": speed}
        numbers["share_of_copy"] = speed / bandwidth
        rows.append(Row(contender.name, numbers, {"samples": contender.times[FORWARD]}))
    shape = {"kv_length": length, "batch": batch, "heads": args.heads, "kv_heads": args.kv_heads}
    return Result({**shape, "head_dim": args.head_dim, "copy_gigabytes_per_second": bandwidth}, rows)


def _print(result: Result, args: argparse.Namespace, place: Place, bandwidth: float) -> None:
    shape = result.shape
    title = f"{place.dtype_name} on {place.device}, L={shape['kv_length']} b={shape['batch']} "
    title += f"heads={args.heads}/{args.kv_heads} d={args.head_dim}, medians of {args.rounds} interleaved rounds"
    columns = [f"one step, a copy runs at {bandwidth:.0f} GB/s", "us", "x vanilla", "GB/s", "of copy"]
    lines = [
        [
            row.name,
            milliseconds(1e3 * row.numbers["milliseconds"]),
            f"{row.numbers['ratio_to_vanilla']:.3f}",
            f"{row.numbers['gigabytes_per_second']:.3g}",
            f"{row.numbers['share_of_copy']:.2f}",
        ]
        for row in result.rows
    ]
    print_table(title, columns, lines)

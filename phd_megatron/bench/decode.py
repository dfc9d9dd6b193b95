"""``phd-megatron bench decode``: attention of one decoding step over a KV cache, ``K`` copies against one.

The floor is the quickest decoding of a vanilla model at hand, which reads the same originals. Steps run as CUDA graphs,
as a step of generation should. Results are compared with the definition in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from phd_megatron.bench.measure import (
    TOLERANCES,
    Contender,
    add_common_flags,
    check_counts,
    check_reports,
    copy_contender,
    device_and_dtype,
    measure,
    relative_error,
    short,
    write_results,
)
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.errors import UserError

STEP = "forward"
VANILLA = "vanilla"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench decode", description=__doc__)
    parser.add_argument("--kv-length", type=int, nargs="+", default=[4096], help="cached originals (default 4096)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences (default 1)")
    parser.add_argument("--repeat", type=int, nargs="+", default=[4], help="K, copies of a token (default 4)")
    parser.add_argument("--window", type=int, default=16, help="W, hidden positions seen (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C, 0 for no chunks (default %(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key-value heads (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="size of a head (default %(default)s)")
    add_common_flags(parser)
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if a check fails."""
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    check_counts(args, ("kv_length", "batch", "repeat", "heads", "kv_heads", "head_dim", "rounds"))
    if args.heads % args.kv_heads:
        raise UserError(f"--heads={args.heads} is not a multiple of --kv-heads={args.kv_heads}; change one of them")
    from phd_megatron.kernels.decode_attention import decode_problem
    from phd_megatron.kernels.triton_support import interpreted
    from phd_megatron.phd.kv_policy import KVPolicy

    try:
        policies = [KVPolicy(repeat, args.window, args.chunk or None) for repeat in args.repeat]
    except ValueError as error:
        raise UserError(str(error)) from error
    device, dtype_name, dtype = device_and_dtype(args)
    problem = decode_problem(device, dtype, args.head_dim)
    if problem is None and interpreted():
        problem = "it would be interpreted"
    results = []
    for length, batch in itertools.product(args.kv_length, args.batch):
        inputs = [(policy, _inputs(args, policy, length, batch, device, dtype)) for policy in [KVPolicy(1), *policies]]
        if problem is None:
            worst = max(_error(policy, given) for policy, given in inputs)
            print(
                f"kernel against the definition: worst relative error {worst:.1e} (allowed {TOLERANCES[dtype_name]:g})"
            )
            if not worst <= TOLERANCES[dtype_name]:
                print("error: the result is wrong, so it is not timed")
                return 1
        contenders = _contenders(inputs, problem is None, device)
        copy, copied = copy_contender(device)
        measure([copy, *contenders], args.rounds, device)
        bandwidth = copied / (copy.median(STEP) * 1e6)
        result = _result(args, inputs, length, batch, contenders, bandwidth)
        results.append(result)
        write_results(args, device, dtype_name, results, "kv_length", "ratio_to_vanilla")  # kept, if a later one breaks
        title = f"{dtype_name} on {device}, L={length} b={batch} heads={args.heads}/{args.kv_heads} d={args.head_dim}"
        columns = [f"one step, a copy runs at {bandwidth:.0f} GB/s", "us", "x vanilla", "GB/s", "of copy"]
        lines = [
            [
                row["name"],
                short(1e3 * row["milliseconds"]),
                f"{row['ratio_to_vanilla']:.3f}",
                f"{row['gigabytes_per_second']:.3g}",
                f"{row['share_of_copy']:.2f}",
            ]
            for row in result["rows"]
        ]
        print_table(f"{title}, medians of {args.rounds} interleaved rounds", columns, lines)
        if problem is not None:
            print(f"the Triton kernel is not timed: {problem}")
    return 0


def _inputs(args: argparse.Namespace, policy: Any, length: int, batch: int, device: Any, dtype: Any) -> list[Any]:
    """Arguments of ``decode_attention`` in the middle of generation, without the policy."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device, dtype)

    position = torch.full((batch,), length - 1, device=device)
    query = draw(policy.repeat, batch, args.heads, args.head_dim)
    key, value = (draw(batch, args.kv_heads, length, args.head_dim) for _ in range(2))
    places = torch.arange(length, device=device).expand(batch, -1).contiguous()
    if policy.repeat == 1:
        return [query, position, key, value, places, None, None, None]
    kept = torch.arange(policy.first_hidden_key(length - 1), length, device=device).expand(batch, -1).contiguous()
    hidden = [draw(batch, args.kv_heads, policy.repeat - 1, kept.size(1), args.head_dim) for _ in range(2)]
    return [query, position, key, value, places, *hidden, kept]


def _error(policy: Any, given: list[Any]) -> float:
    from phd_megatron.kernels.decode_attention import decode_attention, decode_attention_reference

    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    narrow, wide = [*given, policy], [*wide, policy]
    return relative_error([decode_attention(*narrow)], [decode_attention_reference(*wide)])


def _contenders(inputs: list[tuple[Any, list[Any]]], kernel: bool, device: Any) -> list[Contender]:
    from torch.nn.functional import scaled_dot_product_attention

    from phd_megatron.kernels.decode_attention import decode_attention, decode_attention_reference

    _, (query, _, key, value, *_) = inputs[0]
    rows = query.permute(1, 2, 0, 3)  # [b, heads, 1, d]

    def vendor() -> Any:
        return scaled_dot_product_attention(rows, key, value, enable_gqa=rows.size(1) > key.size(1))

    contenders = [Contender(f"{VANILLA}, torch SDPA", {STEP: vendor})]
    for policy, given in inputs:
        ways = [("definition", decode_attention_reference)] + ([("kernel", decode_attention)] if kernel else [])
        for name, attend in ways:

            def step(attend: Any = attend, given: Any = given, policy: Any = policy) -> Any:
                return attend(*given, policy)

            contenders.append(Contender(f"{policy.name}, {name}", {STEP: step}))
    return contenders


def _result(
    args: argparse.Namespace, inputs: Any, length: int, batch: int, contenders: list[Contender], bandwidth: float
) -> dict[str, Any]:
    best = min(c.median(STEP) for c in contenders if c.name.startswith(VANILLA))
    read = {  # keys and values, once; queries and outputs are small
        policy.name: sum(x.numel() * x.element_size() for x in (given[2], given[3], *given[5:7]) if x is not None)
        for policy, given in inputs
    }
    rows = []
    for contender in contenders:
        time = contender.median(STEP)
        speed = read[contender.name.split(",")[0]] / (time * 1e6)
        rows.append(
            {
                "name": contender.name,
                "milliseconds": time,
                "ratio_to_vanilla": time / best,
                "gigabytes_per_second": speed,
                "share_of_copy": speed / bandwidth,
                "samples": contender.times[STEP],
            }
        )
    shape = {"kv_length": length, "batch": batch, "heads": args.heads, "kv_heads": args.kv_heads}
    return {"shape": shape | {"head_dim": args.head_dim, "copy_gigabytes_per_second": bandwidth}, "rows": rows}

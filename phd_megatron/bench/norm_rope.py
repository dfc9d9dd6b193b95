"""``phd-megatron bench norm-rope``: norm and RoPE of q, k, v from the fused projection, one kernel against several.

The measure is bytes moved at the least (the projection's output read, q, k, v written; the backward likewise) over the
time, as a share of what a plain copy of a large buffer moves on the same device. Results are compared with the
definition in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
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

FORWARD, BOTH = "forward", "forward + backward"
EPS = 1e-5


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench norm-rope", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="K * s rows (default 4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key-value heads (default %(default)s)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], help="size of a head (default 128)")
    parser.add_argument("--norms", nargs="+", default=["qkv"], metavar="SET", help="subsets of qkv that are normed")
    add_common_flags(parser)
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if a check fails."""
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    check_counts(args, ("rows", "batch", "heads", "kv_heads", "head_dim", "rounds"))
    if args.heads % args.kv_heads:
        raise UserError(f"--heads={args.heads} is not a multiple of --kv-heads={args.kv_heads}; change one of them")
    for norms in args.norms:
        if not set(norms) <= set("qkv"):
            raise UserError(f"--norms={norms}: name some of q, k and v, such as qk")
    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope_problem
    from phd_megatron.kernels.triton_support import interpreted

    device, dtype_name, dtype = device_and_dtype(args)
    results = []
    for rows, width, norms in itertools.product(args.rows, args.head_dim, args.norms):
        problem = qkv_norm_rope_problem(device, dtype, width)
        if problem is None and interpreted():
            problem = "it would be interpreted"
        ways = _ways(args, norms, problem is None)
        for name, function in ways.items():
            worst = _error(function, args, min(rows, 64), width, norms, device, dtype)
            print(f"{name} against the definition: worst relative error {worst:.1e}")
            if not worst <= TOLERANCES[dtype_name]:
                print(f"error: more than the {TOLERANCES[dtype_name]:g} allowed, so it is not timed")
                return 1
        leaves, table, grads = _inputs(args, rows, width, norms, device, dtype)
        contenders = [_contender(name, function, norms, leaves, table, grads) for name, function in ways.items()]
        copy, copied = copy_contender(device)
        measure([copy, *contenders], args.rounds, device)
        bandwidth = copied / (copy.median(FORWARD) * 1e6)
        shape = {"rows": rows, "batch": args.batch, "heads": args.heads, "kv_heads": args.kv_heads}
        shape |= {"head_dim": width, "norms": norms, "copy_gigabytes_per_second": bandwidth}
        found = [_row(contender, leaves[0], grads, norms, bandwidth) for contender in contenders]
        results.append({"shape": shape, "rows": found})
        write_results(args, device, dtype_name, results, "rows", "share_of_copy")  # kept, if a later one breaks
        title = f"{dtype_name} on {device}, rows={rows} b={args.batch} heads={args.heads}/{args.kv_heads} d={width}"
        columns = [f"norms {norms or 'none'}, a copy runs at {bandwidth:.0f} GB/s", "forward ms", "of copy"]
        lines = [
            [
                row["name"],
                short(row["forward_milliseconds"]),
                f"{row['forward_share_of_copy']:.2f}",
                short(row["milliseconds"]),
                f"{row['share_of_copy']:.2f}",
            ]
            for row in found
        ]
        print_table(
            f"{title}, medians of {args.rounds} interleaved rounds", [*columns, "+ backward ms", "of copy"], lines
        )
        if problem is not None:
            print(f"the Triton kernel is not timed: {problem}")
    return 0


def _ways(args: argparse.Namespace, norms: str, kernel: bool) -> dict[str, Callable[..., Any]]:
    """Functions of (mixed, weights by name, table) to q, k, v."""
    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope
    from phd_megatron.kernels.qkv_rope import rope, split_qkv_rope
    from phd_megatron.norm.modules import rms_norm

    ratio = args.heads // args.kv_heads

    def separate(mixed: Any, weights: dict[str, Any], table: Any) -> Any:
        parts = split_qkv_rope(mixed, ratio, None if norms else table)
        if not norms:
            return parts
        q, k, v = (rms_norm(x, weights[n], EPS) if n in weights else x for n, x in zip("qkv", parts, strict=True))
        return rope(q, table), rope(k, table), v

    def fused(mixed: Any, weights: dict[str, Any], table: Any) -> Any:
        return qkv_norm_rope(mixed, ratio, table, weights, EPS)

    return {"separate operations": separate} | ({"one kernel": fused} if kernel else {})


def _inputs(args: argparse.Namespace, rows: int, width: int, norms: str, device: Any, dtype: Any) -> Any:
    """Leaves (mixed, then the weights), the table, and gradients of q, k, v."""
    import torch

    from phd_megatron.kernels.qkv_rope import rope_table

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device, dtype)

    groups, ratio = args.kv_heads, args.heads // args.kv_heads
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), 0.9 ** torch.arange(width // 2)).repeat(1, 2)
    leaves = [draw(rows, args.batch, groups, (ratio + 2) * width), *(1 + 0.1 * draw(width) for _ in norms)]
    grads = [draw(rows, args.batch, heads, width) for heads in (args.heads, groups, groups)]
    return [x.requires_grad_() for x in leaves], rope_table(angles[:, None, None], dtype).to(device), grads


def _error(
    function: Any, args: argparse.Namespace, rows: int, width: int, norms: str, device: Any, dtype: Any
) -> float:
    import torch

    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope_reference

    leaves, table, grads = _inputs(args, rows, width, norms, device, dtype)

    def definition(mixed: Any, weights: dict[str, Any], table: Any) -> Any:
        return qkv_norm_rope_reference(mixed, args.heads // args.kv_heads, table, weights, EPS)

    found = []
    for attend, wide in ((function, False), (definition, True)):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        weights = dict(zip(norms, inputs[1:], strict=True))
        out = attend(inputs[0], weights, table.double() if wide else table)
        gradients = torch.autograd.grad(out, inputs, [g.to(x.dtype) for g, x in zip(grads, out, strict=True)])
        found.append([*(x.detach() for x in out), *gradients])
    return relative_error(found[0], found[1])


def _contender(name: str, function: Any, norms: str, leaves: list[Any], table: Any, grads: list[Any]) -> Contender:
    import torch

    weights = dict(zip(norms, leaves[1:], strict=True))

    def forward() -> None:
        with torch.no_grad():
            function(leaves[0], weights, table)

    def both() -> None:
        torch.autograd.grad(function(leaves[0], weights, table), leaves, grads)

    return Contender(name, {FORWARD: forward, BOTH: both})


def _row(contender: Contender, mixed: Any, grads: list[Any], norms: str, bandwidth: float) -> dict[str, Any]:
    def size(*tensors: Any) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    q, k, v = grads
    value = [v] if "v" in norms else []  # a value that is not normed is a view
    used = size(q, k, *value) + size(q, k, *value)
    backward = (size(q, k, *value) if norms else 0) + size(q, k, v) + size(mixed)
    row: dict[str, Any] = {"name": contender.name}
    for step, prefix, moved in ((FORWARD, "forward_", used), (BOTH, "", used + backward)):
        time = contender.median(step)
        row |= {f"{prefix}milliseconds": time, f"{prefix}gigabytes_per_second": moved / (time * 1e6)}
        row[f"{prefix}share_of_copy"] = moved / (time * 1e6) / bandwidth
    return row

"""``phd-megatron bench norm-rope``: norm and RoPE of q, k, v from the fused projection, one kernel against several.

The measure is bytes moved at the least (the projection's output read, q, k, v written; the backward likewise) over the
time, as a share of what a plain copy of a large buffer moves on the same device. Results are compared with the
definition in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phd_megatron.bench.place import Place, choose_place, not_interpreted
from phd_megatron.bench.results import Report, Result, Row
from phd_megatron.bench.timing import BOTH, FORWARD, Contender, differentiable, measure_beside_a_copy, relative_error
from phd_megatron.console.tables import milliseconds, print_table
from phd_megatron.console.terminal import show

if TYPE_CHECKING:
    import torch

    Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    #: (mixed, weights by name, table) to q, k, v
    Function = Callable[[torch.Tensor, Mapping[str, torch.Tensor], torch.Tensor], Parts]

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One shape and which of q, k, v are normed."""

    args: argparse.Namespace
    place: Place
    rows: int
    width: int
    norms: str

    @property
    def ratio(self) -> int:
        """Query heads to a key-value head."""
        return int(self.args.heads // self.args.kv_heads)


@dataclass(frozen=True)
class Inputs:
    """``leaves``: mixed, then the weights; ``grads``: of q, k, v."""

    leaves: list[torch.Tensor]
    table: torch.Tensor
    grads: list[torch.Tensor]


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if a check fails."""
    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope_problem

    place = choose_place(args)
    report = Report(args, place, "rows", "share_of_copy")
    for rows, width, norms in itertools.product(args.rows, args.head_dim, args.norms):
        case = Case(args, place, rows, width, norms)
        problem = not_interpreted(qkv_norm_rope_problem(place.device, place.dtype, width))
        ways = _ways(case, problem is None)
        if not all(_is_right(name, function, case) for name, function in ways.items()):
            return 1
        given = _inputs(case, rows)
        contenders = [_contender(name, function, case, given) for name, function in ways.items()]
        bandwidth = measure_beside_a_copy(contenders, args.rounds, place.device)
        result = _result(case, given, contenders, bandwidth)
        report.add(result)
        _print(result, case, bandwidth)
        if problem is not None:
            show(f"the Triton kernel is not timed: {problem}")
    return 0


def _ways(case: Case, kernel: bool) -> dict[str, Function]:
    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope
    from phd_megatron.kernels.qkv_rope import rope, split_qkv_rope
    from phd_megatron.norm.modules import rms_norm

    norms, ratio = case.norms, case.ratio

    def separate(mixed: torch.Tensor, weights: Mapping[str, torch.Tensor], table: torch.Tensor) -> Parts:
        parts: Parts = split_qkv_rope(mixed, ratio, None if norms else table)
        if not norms:
            return parts
        q, k, v = (rms_norm(x, weights[n], EPS) if n in weights else x for n, x in zip("qkv", parts, strict=True))
        return rope(q, table), rope(k, table), v

    def fused(mixed: torch.Tensor, weights: Mapping[str, torch.Tensor], table: torch.Tensor) -> Parts:
        parts: Parts = qkv_norm_rope(mixed, ratio, table, weights, EPS)
        return parts

    ways: dict[str, Function] = {"separate operations": separate}
    return ways | ({"one kernel": fused} if kernel else {})


def _is_right(name: str, function: Function, case: Case) -> bool:
    """Whether it computes what the definition says, which is said."""
    worst = _error(function, case)
    show(f"{name} against the definition: worst relative error {worst:.1e}")
    if worst <= case.place.tolerance:
        return True
    show(f"error: more than the {case.place.tolerance:g} allowed, so it is not timed")
    return False


def _inputs(case: Case, rows: int) -> Inputs:
    import torch

    from phd_megatron.kernels.qkv_rope import rope_table

    args, place, width = case.args, case.place, case.width
    generator = torch.Generator().manual_seed(0)
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), 0.9 ** torch.arange(width // 2)).repeat(1, 2)
    leaves = [place.draw(generator, rows, args.batch, args.kv_heads, (case.ratio + 2) * width)]
    leaves += [1 + 0.1 * place.draw(generator, width) for _ in case.norms]
    heads = (args.heads, args.kv_heads, args.kv_heads)
    grads = [place.draw(generator, rows, args.batch, count, width) for count in heads]
    table = rope_table(angles[:, None, None], place.dtype).to(place.device)
    return Inputs([x.requires_grad_() for x in leaves], table, grads)


def _error(function: Function, case: Case) -> float:
    """Worst relative error of q, k, v and all gradients on few rows, against float64."""
    import torch

    from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope_reference

    given = _inputs(case, min(case.rows, 64))

    def definition(mixed: torch.Tensor, weights: Mapping[str, torch.Tensor], table: torch.Tensor) -> Parts:
        parts: Parts = qkv_norm_rope_reference(mixed, case.ratio, table, weights, EPS)
        return parts

    found = []
    for compute, wide in ((function, False), (definition, True)):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in given.leaves]
        weights = dict(zip(case.norms, inputs[1:], strict=True))
        out = compute(inputs[0], weights, given.table.double() if wide else given.table)
        gradients = torch.autograd.grad(out, inputs, [g.to(x.dtype) for g, x in zip(given.grads, out, strict=True)])
        found.append([*(x.detach() for x in out), *gradients])
    return relative_error(found[0], found[1])


def _contender(name: str, function: Function, case: Case, given: Inputs) -> Contender:
    weights = dict(zip(case.norms, given.leaves[1:], strict=True))
    return differentiable(name, lambda: function(given.leaves[0], weights, given.table), given.leaves, given.grads)


def _result(case: Case, given: Inputs, contenders: Sequence[Contender], bandwidth: float) -> Result:
    args = case.args
    shape: dict[str, str | int | float] = {"rows": case.rows, "batch": args.batch, "heads": args.heads}
    shape |= {"kv_heads": args.kv_heads, "head_dim": case.width, "norms": case.norms}
    shape["copy_gigabytes_per_second"] = bandwidth
    return Result(shape, [_row(contender, case.norms, given, bandwidth) for contender in contenders])


def _row(contender: Contender, norms: str, given: Inputs, bandwidth: float) -> Row:
    def size(*tensors: torch.Tensor) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    q, k, v = given.grads
    value = [v] if "v" in norms else []  # a value that is not normed is a view
    used = size(q, k, *value) + size(q, k, *value)
    backward = (size(q, k, *value) if norms else 0) + size(q, k, v) + size(given.leaves[0])
    numbers: dict[str, float] = {}
    for step, prefix, moved in ((FORWARD, "forward_", used), (BOTH, "", used + backward)):
        time = contender.median(step)
        speed = moved / (time * 1e6)
        numbers |= {f"{prefix}milliseconds": time, f"{prefix}gigabytes_per_second": speed}
        numbers[f"{prefix}share_of_copy"] = speed / bandwidth
    return Row(contender.name, numbers)


def _print(result: Result, case: Case, bandwidth: float) -> None:
    args, place = case.args, case.place
    title = f"{place.dtype_name} on {place.device}, rows={case.rows} b={args.batch} heads={args.heads}/{args.kv_heads} "
    title += f"d={case.width}, medians of {args.rounds} interleaved rounds"
    first = f"norms {case.norms or 'none'}, a copy runs at {bandwidth:.0f} GB/s"
    lines = [
        [
            row.name,
            milliseconds(row.numbers["forward_milliseconds"]),
            f"{row.numbers['forward_share_of_copy']:.2f}",
            milliseconds(row.numbers["milliseconds"]),
            f"{row.numbers['share_of_copy']:.2f}",
        ]
        for row in result.rows
    ]
    print_table(title, [first, "forward ms", "of copy", "+ backward ms", "of copy"], lines)

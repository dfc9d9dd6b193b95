"""``phd-megatron bench attention``: PHD attention against its floor, forward and with backward.

The floor is ``K`` times vanilla causal attention over the originals: ``K`` copies of every query over the same keys. On
CUDA vanilla runs through each of torch's fused kernels, and the quickest counts. Contenders run interleaved, round by
round, so that a busy machine slows all of them; the tables show medians. Every backend is compared with the dense-mask
definition before anything is timed. Several values of ``--seq-length``, ``--repeat`` and ``--head-dim`` make a sweep.

TFLOP/s count the multiply-adds of visible pairs alone, twice each: 4 d a pair forward, 10 d backward.
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
    device_and_dtype,
    measure,
    relative_error,
    short,
    write_results,
)
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.errors import UserError

REFERENCE_BYTES = 256 * 2**20  # the dense definition keeps several score tensors of this size; not timed above it
DENSE_MASK_BYTES = 2**30  # a dense mask over K*s rows larger than this is not built
VANILLA = "vanilla causal SDPA"
FORWARD, BOTH = "forward", "forward + backward"
FLOPS = {FORWARD: 4, BOTH: 14}  # per visible pair and column of a head


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench attention", description=__doc__)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048], help="original tokens (default 2048)")
    parser.add_argument("--repeat", type=int, nargs="+", default=[2], help="K, copies of a token (default 2)")
    parser.add_argument("--window", type=int, default=16, help="W, hidden positions seen (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C, 0 for no chunks (default %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads (default %(default)s)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64], help="size of a head (default 64)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument(
        "--backends", nargs="+", default=None, metavar="NAME", help="only these (default: all that can run here)"
    )
    parser.add_argument("--only-phd", action="store_true", help="leave out the dense mask and naive repetition")
    parser.add_argument(
        "--fail-above", type=float, default=None, metavar="RATIO", help="exit 1 if auto's backend / floor exceeds it"
    )
    add_common_flags(parser)
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if a check fails or ``--fail-above`` is exceeded."""
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    check_counts(args, ("seq_length", "repeat", "heads", "kv_heads", "head_dim", "batch", "rounds"))
    if args.heads % args.kv_heads:
        raise UserError(f"--heads={args.heads} is not a multiple of --kv-heads={args.kv_heads}; change one of them")
    import torch

    from phd_megatron.kernels.phd_attention import choose_backend
    from phd_megatron.phd.kv_policy import KVPolicy

    try:
        policies = [KVPolicy(repeat, args.window, args.chunk or None) for repeat in args.repeat]
    except ValueError as error:
        raise UserError(str(error)) from error
    device, dtype_name, dtype = device_and_dtype(args)
    if device.type == "cuda":
        import torch._dynamo

        # FlexAttention compiles each shape anew; past the limit it would quietly run eagerly.
        torch._dynamo.config.recompile_limit = 1024
    print(f"{dtype_name} on {device}, {torch.get_num_threads()} CPU threads")
    status, results = 0, []
    for width, policy in itertools.product(args.head_dim, policies):
        auto, reason = choose_backend(device, dtype, width)
        print(f"{policy.name}, head dimension {width}: auto = {auto}: {reason}")
        wrong = {}
        names, notes = _able(args, device, dtype, width)
        for name in names:
            off = _worst_error(policy, args, width, device, dtype, name)
            allowed = TOLERANCES[dtype_name]
            print(f"{name} against the dense-mask definition: worst relative error {off:.1e} (allowed {allowed:g})")
            if not off <= allowed:
                wrong[name] = off
        if wrong:
            print(f"error: {', '.join(wrong)} is wrong, so it is not timed")
            status = 1
        names = [name for name in names if name not in wrong]
        if auto not in names:
            if auto in wrong:
                return 1
            names.insert(0, auto)
        for length in args.seq_length:
            contenders, more = _contenders(policy, args, length, width, names, device, dtype)
            measure(contenders, args.rounds, device)
            result = _result(policy, args, length, width, contenders, device)
            results.append(result | {"auto": auto, "why": reason})
            write_results(
                args, device, dtype_name, results, "seq_length", "ratio_to_floor"
            )  # kept, if a later one breaks
            _print(result, args, device, [*notes, *more])
            key = "cpu_ratio_to_floor" if device.type == "cpu" else "ratio_to_floor"
            ratio = next(row[key] for row in result["rows"] if row["name"] == f"PHD {auto}")
            if args.fail_above is not None and ratio > args.fail_above:
                print(f"error: {auto} takes {ratio:.3f} x the floor, more than --fail-above={args.fail_above:g}")
                status = 1
    return status


def _able(args: argparse.Namespace, device: Any, dtype: Any, width: int) -> tuple[list[str], list[str]]:
    """Backends to time, ``sdpa`` first, and a note on each that cannot run here."""
    from phd_megatron.kernels.phd_attention import BACKENDS, choose_backend
    from phd_megatron.kernels.triton_support import interpreted

    names, notes = [], []
    for name in args.backends or sorted(BACKENDS, key=lambda name: name != "sdpa"):
        if args.backends is not None:
            choose_backend(device, dtype, width, backend=name)  # refuses what was asked for and cannot be
        elif BACKENDS[name].dense_mask and args.only_phd:
            notes.append(f"PHD {name} is not timed: --only-phd")
            continue
        problem = BACKENDS[name].problem(device, dtype, width)
        if problem is not None:
            notes.append(f"PHD {name} is not timed: {problem}")
            continue
        if BACKENDS[name].triton and interpreted() and args.backends is None:
            notes.append(
                f"PHD {name} is not timed: it would be interpreted; name it with --backends to do it all the same"
            )
            continue
        names.append(name)
    return names, notes


def _worst_error(policy: Any, args: argparse.Namespace, width: int, device: Any, dtype: Any, name: str) -> float:
    """Worst relative Frobenius error of output and gradients on a short sequence, against float64."""
    import torch

    from phd_megatron.kernels.phd_attention import phd_attention

    length = min(*args.seq_length, 2 * policy.span + 37, 200)
    generator = torch.Generator().manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    shapes = [(policy.repeat, length, 1, count, width) for count in heads]
    query, key, value, grad = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)

    def both(backend: str, *inputs: Any) -> list[Any]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = phd_attention(leaves[0], leaves[1], leaves[2], policy, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    expected = both("reference", query.double(), key.double(), value.double())
    return relative_error(both(name, query, key, value), expected, 1e-3 * float(grad.double().norm()))


def _contenders(
    policy: Any, args: argparse.Namespace, length: int, width: int, backends: list[str], device: Any, dtype: Any
) -> tuple[list[Contender], list[str]]:
    """What is timed, and a note on each thing that is not."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from phd_megatron.kernels.phd_attention import BACKENDS, phd_attention

    repeat, batch = policy.repeat, args.batch
    rows, ratio = repeat * length, args.heads // args.kv_heads
    contenders: list[Contender] = []
    notes: list[str] = []

    def add(name: str, attend: Callable[..., Any], *shapes: tuple[int, ...], unsure: bool = False) -> None:
        leaves = [torch.randn(x, device=device, dtype=dtype, requires_grad=True) for x in shapes]
        grad = torch.randn(shapes[0], device=device, dtype=dtype)

        def forward() -> None:
            with torch.no_grad():
                attend(*leaves)

        def both() -> None:
            torch.autograd.grad(attend(*leaves), leaves, grad)

        if unsure:
            try:
                both()
            except RuntimeError as error:
                notes.append(f"{name} is not timed: {str(error).splitlines()[0]}")
                return
        contenders.append(Contender(name, {FORWARD: forward, BOTH: both}))

    def flat(count: int) -> list[tuple[int, ...]]:
        return [(batch, heads, count, width) for heads in (args.heads, args.kv_heads, args.kv_heads)]

    def causal(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=ratio > 1)

    def causal_by(kernel: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(kernel):
                return causal(q, k, v)

        return attend

    def phd(name: str, **options: Any) -> None:
        def attend(q: Any, k: Any, v: Any) -> Any:
            if options:
                return BACKENDS[name](q, k, v, policy, **options)
            return phd_attention(q, k, v, policy, backend=name)

        label = ", ".join([f"PHD {name}", *(f"{key}={value}" for key, value in options.items())])
        add(label, attend, *[(repeat, length, batch, heads, width) for heads in (args.heads, *[args.kv_heads] * 2)])

    add(VANILLA, causal, *flat(length))
    if device.type == "cuda":
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            name = f"{VANILLA}, {kernel.name.split('_')[0].lower()}"
            add(name, causal_by(kernel), *flat(length), unsure=True)
    for name in backends:
        scores = batch * args.heads * rows * rows * dtype.itemsize
        if BACKENDS[name].dense_mask and scores > REFERENCE_BYTES:
            notes.append(f"PHD {name} is not timed: its scores alone take {scores / 2**20:.0f} MiB")
            continue
        phd(name)
        for options in BACKENDS[name].variants:
            phd(name, **options)
    if not args.only_phd:
        if rows * rows > DENSE_MASK_BYTES:
            notes.append(f"dense-mask SDPA is not timed: its mask takes {rows * rows / 2**30:.0f} GiB")
        else:
            mask = policy.mask(length, device=device)

            def dense(q: Any, k: Any, v: Any) -> Any:  # masked kernels know no grouped queries on CUDA: widen by hand
                k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
                return scaled_dot_product_attention(q, k, v, attn_mask=mask)

            add("dense-mask SDPA over K*s", dense, *flat(rows))
        add("naive repetition, causal over K*s", causal, *flat(rows))
    return contenders, notes


def _result(
    policy: Any, args: argparse.Namespace, length: int, width: int, contenders: list[Contender], device: Any
) -> dict[str, Any]:
    """Shape and rows; the floor comes right below what it is made of."""
    vanilla = [c for c in contenders if c.name.startswith(VANILLA)]
    repeat, heads = policy.repeat, args.batch * args.heads

    def floor(step: str, cpu: bool = False) -> float:
        return repeat * min(c.median(step, cpu) for c in vanilla)

    def row(name: str, time: Callable[..., float], pairs: int) -> dict[str, Any]:
        found: dict[str, Any] = {"name": name}
        for step, prefix in ((BOTH, ""), (FORWARD, "forward_")):
            found[f"{prefix}milliseconds"] = time(step)
            found[f"{prefix}ratio_to_floor"] = time(step) / floor(step)
            found[f"{prefix}tflops"] = FLOPS[step] * width * pairs * heads / (time(step) * 1e9)
        if device.type == "cpu":
            found |= {
                "cpu_milliseconds": time(BOTH, True),
                "cpu_ratio_to_floor": time(BOTH, True) / max(floor(BOTH, True), 1e-9),
            }
        return found

    one, whole = sum(type(policy)(1).pairs(length)), sum(policy.pairs(length))
    rows = [row(c.name, c.median, one) for c in vanilla]
    rows.append(row(f"floor: {repeat} x vanilla", floor, repeat * one))
    for contender in contenders[len(vanilla) :]:
        rows.append(row(contender.name, contender.median, whole))
        rows[-1] |= {"samples": contender.times[BOTH], "peak_bytes": contender.peak_bytes, "eager": contender.eager}
    shape = {"policy": policy.name, "repeat": repeat, "seq_length": length, "batch": args.batch}
    shape |= {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": width}
    return {"shape": shape, "rows": rows}


def _print(result: dict[str, Any], args: argparse.Namespace, device: Any, notes: list[str]) -> None:
    shape, lines = result["shape"], []
    columns = ["", "forward ms", "x floor", "+ backward ms", "x floor", "TFLOP/s"]
    columns += ["CPU ms", "x floor (CPU)"] if device.type == "cpu" else ["peak MiB"]
    for row in result["rows"]:
        line = [row["name"], short(row["forward_milliseconds"]), f"{row['forward_ratio_to_floor']:.3f}"]
        line += [short(row["milliseconds"]), f"{row['ratio_to_floor']:.3f}", f"{row['tflops']:.3g}"]
        if device.type == "cpu":
            line += [short(row["cpu_milliseconds"]), f"{row['cpu_ratio_to_floor']:.3f}"]
        else:
            line.append("" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.0f}")
        lines.append(line)
    title = f"{shape['policy']}, s={shape['seq_length']} b={shape['batch']} heads={shape['heads']}/{shape['kv_heads']}"
    print_table(f"{title} d={shape['head_dim']}, medians of {args.rounds} interleaved rounds", columns, lines)
    for note in notes:
        print(note)

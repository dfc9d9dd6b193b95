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
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from phd_megatron.bench.arguments import policies_of
from phd_megatron.bench.place import Place, choose_place
from phd_megatron.bench.results import Report, Result, Row
from phd_megatron.bench.timing import BOTH, FORWARD, Contender, differentiable, measure, relative_error
from phd_megatron.console.tables import milliseconds, print_table
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from phd_megatron.phd.kv_policy import KVPolicy

    Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

REFERENCE_BYTES = 256 * 2**20  # the dense definition keeps several score tensors of this size; not timed above it
DENSE_MASK_BYTES = 2**30  # a dense mask over K*s rows larger than this is not built
VANILLA = "vanilla causal SDPA"
FLOPS = {FORWARD: 4, BOTH: 14}  # per visible pair and column of a head


@dataclass(frozen=True)
class Case:
    """One policy and head dimension, for all lengths."""

    args: argparse.Namespace
    place: Place
    policy: KVPolicy
    width: int

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of query, key and value."""
        return self.args.heads, self.args.kv_heads, self.args.kv_heads

    @property
    def ratio(self) -> int:
        """Query heads to a key-value head."""
        return int(self.args.heads // self.args.kv_heads)


class Way(NamedTuple):
    """One way to compute PHD attention.

    Attributes:
        kernel: the vendor's operator of part (a), or None where that is left to the backend.
        options: of the backend, beside the policy.
    """

    backend: str
    kernel: str | None = None
    options: Mapping[str, bool] = {}

    @property
    def name(self) -> str:
        """For tables."""
        options = "".join(f", {option}={value}" for option, value in self.options.items())
        return f"PHD {self.backend}{options}" + (f", {self.kernel}" if self.kernel else "")

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: KVPolicy) -> torch.Tensor:
        """Shapes as :func:`~phd_megatron.kernels.phd_attention.phd_attention`'s."""
        from phd_megatron.kernels.phd_attention import BACKENDS, phd_attention

        with _part_a(self.kernel):
            if self.options:
                return BACKENDS[self.backend](query, key, value, policy, **self.options)
            out: torch.Tensor = phd_attention(query, key, value, policy, backend=self.backend)
            return out


@contextmanager
def _part_a(kernel: str | None) -> Iterator[None]:
    """The vendor's operator by name, as whoever uses the product forces one."""
    from phd_megatron.kernels.phd_attention.causal import FORCED

    before = os.environ.get(FORCED)
    if kernel is not None:
        os.environ[FORCED] = kernel
    try:
        yield
    finally:
        os.environ.pop(FORCED, None)
        if before is not None:
            os.environ[FORCED] = before


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if a check fails or ``--fail-above`` is exceeded."""
    import torch

    from phd_megatron.kernels.phd_attention import choose_backend

    policies, place = policies_of(args), choose_place(args)
    if place.on_cuda:
        import torch._dynamo

        # FlexAttention compiles each shape anew; past the limit it would quietly run eagerly.
        torch._dynamo.config.recompile_limit = 1024
    show(f"{place.dtype_name} on {place.device}, {torch.get_num_threads()} CPU threads")
    report = Report(args, place, "seq_length", "ratio_to_floor")
    status = 0
    for width, policy in itertools.product(args.head_dim, policies):
        case = Case(args, place, policy, width)
        auto, reason = choose_backend(place.device, place.dtype, width)
        show(f"{policy.name}, head dimension {width}: auto = {auto}: {reason}")
        able, notes = _able(case)
        wrong, more = _wrong(case, able)
        notes += more
        status |= bool(wrong)
        if Way(auto) in wrong:
            return 1
        ways = [way for way in able if way not in wrong]
        if Way(auto) not in ways:
            ways.insert(0, Way(auto))
        for length in args.seq_length:
            contenders, more = _contenders(case, length, ways)
            measure(contenders, args.rounds, place.device)
            result = _result(policy, args, length, width, contenders, place.on_cuda)
            result.details |= {"auto": auto, "why": reason}
            report.add(result)
            _print(result, args, place.on_cuda, [*notes, *more])
            status |= _is_slow(result, auto, args.fail_above)
    return status


def _able(case: Case) -> tuple[list[Way], list[str]]:
    """What to time, ``sdpa`` first, and a note on each backend that cannot run here.

    Raises:
        UserError: what was asked for by name cannot run here.
    """
    from phd_megatron.kernels.phd_attention import BACKENDS, choose_backend
    from phd_megatron.kernels.phd_attention.causal import operator_problem
    from phd_megatron.kernels.triton_support import interpreted

    args, where = case.args, (case.place.device, case.place.dtype, case.width)
    for kernel in args.causal_kernels:
        if problem := operator_problem(kernel, *where):
            raise UserError(f"--causal-kernels: {kernel} {problem}")
    ways, notes = [], []
    for name in args.backends or sorted(BACKENDS, key=lambda name: name != "sdpa"):
        if args.backends is not None:
            choose_backend(*where, backend=name)  # refuses what was asked for and cannot be
        row = BACKENDS[name]
        if args.backends is None and row.dense_mask and args.only_phd:
            notes.append(f"PHD {name} is not timed: --only-phd")
            continue
        problem = row.problem(*where)
        if problem is None and row.triton and interpreted() and args.backends is None:
            problem = "it would be interpreted; name it with --backends to do it all the same"
        if problem is not None:
            notes.append(f"PHD {name} is not timed: {problem}")
            continue
        ways += [Way(name), *(Way(name, None, options) for options in row.variants)]
        ways += [Way(name, kernel) for kernel in args.causal_kernels if row.vendor_kernel]
    return ways, notes


def _wrong(case: Case, ways: list[Way]) -> tuple[list[Way], list[str]]:
    """Those that do not compute what the definition says, and a note on each variant that does not run and goes."""
    wrong, notes = [], []
    for way in [*ways]:
        try:
            off, allowed = _worst_error(case, way), case.place.tolerance
        except (RuntimeError, ValueError) as error:
            if way == Way(way.backend):
                raise
            ways.remove(way)
            notes.append(f"{way.name} is not timed: {_first_line(error)}")
            continue
        show(f"{way.name} against the dense-mask definition: worst relative error {off:.1e} (allowed {allowed:g})")
        if not off <= allowed:
            wrong.append(way)
    if wrong:
        show(f"error: {', '.join(way.name for way in wrong)} is wrong, so it is not timed")
    return wrong, notes


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _worst_error(case: Case, way: Way) -> float:
    """Worst relative Frobenius error of output and gradients on a short sequence, against float64."""
    import torch

    policy = case.policy
    length = min(*case.args.seq_length, 2 * policy.span + 37, 200)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        case.place.draw(generator, policy.repeat, length, 1, count, case.width)
        for count in (*case.heads, case.heads[0])
    )

    def both(way: Way, *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = way(leaves[0], leaves[1], leaves[2], policy)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    expected = both(Way("reference"), query.double(), key.double(), value.double())
    return relative_error(both(way, query, key, value), expected, 1e-3 * float(grad.double().norm()))


@dataclass
class _Field:
    """Contenders at one length, as they are gathered."""

    case: Case
    length: int
    contenders: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """All copies, one after the other."""
        return self.case.policy.repeat * self.length

    def flat(self, count: int) -> list[tuple[int, ...]]:
        """Shapes of q, k, v for attention of one sequence of ``count`` rows: ``[b, heads, count, d]``."""
        return [(self.case.args.batch, heads, count, self.case.width) for heads in self.case.heads]

    def add(self, name: str, attend: Attend, shapes: Sequence[tuple[int, ...]], unsure: bool = False) -> None:
        """One more, on random numbers; one that is ``unsure`` may fail, and is then noted."""
        import torch

        place = self.case.place
        leaves = [torch.randn(x, device=place.device, dtype=place.dtype, requires_grad=True) for x in shapes]
        grad = torch.randn(shapes[0], device=place.device, dtype=place.dtype)
        contender = differentiable(name, lambda: attend(*leaves), leaves, grad)
        if unsure:
            try:
                contender.steps[BOTH]()
            except (RuntimeError, ValueError) as error:
                self.notes.append(f"{name} is not timed: {_first_line(error)}")
                return
        self.contenders.append(contender)


def _contenders(case: Case, length: int, ways: Sequence[Way]) -> tuple[list[Contender], list[str]]:
    """What is timed, vanilla first, and a note on each thing that is not."""
    found = _Field(case, length)
    _add_vanilla(found)
    for way in ways:
        _add_way(found, way)
    if not case.args.only_phd:
        _add_dense_mask(found)
        found.add("naive repetition, causal over K*s", _causal(case.ratio), found.flat(found.rows))
    return found.contenders, found.notes


def _causal(ratio: int) -> Attend:
    from torch.nn.functional import scaled_dot_product_attention

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=ratio > 1)

    return causal


def _add_vanilla(found: _Field) -> None:
    """As torch chooses, through operators that were asked for, and on CUDA through each that takes these tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from phd_megatron.phd.kv_policy import KVPolicy

    causal = _causal(found.case.ratio)
    found.add(VANILLA, causal, found.flat(found.length))
    one_copy = [(1, found.length, found.case.args.batch, heads, found.case.width) for heads in found.case.heads]

    def ours(name: str) -> Attend:
        way = Way("sdpa", name)
        return lambda q, k, v: way(q, k, v, KVPolicy(1))

    for name in found.case.args.causal_kernels:
        found.add(f"{VANILLA}, ours by {name}", ours(name), one_copy, unsure=True)
    if not found.case.place.on_cuda:
        return

    def causal_by(kernel: SDPBackend) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return causal(q, k, v)

        return attend

    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"{VANILLA}, {kernel.name.split('_')[0].lower()}"
        found.add(name, causal_by(kernel), found.flat(found.length), unsure=True)


def _add_way(found: _Field, way: Way) -> None:
    """One of ours."""
    from phd_megatron.kernels.phd_attention import BACKENDS

    case = found.case
    scores = case.args.batch * case.args.heads * found.rows * found.rows * case.place.dtype.itemsize
    if BACKENDS[way.backend].dense_mask and scores > REFERENCE_BYTES:
        found.notes.append(f"{way.name} is not timed: its scores alone take {scores / 2**20:.0f} MiB")
        return
    shapes = [(case.policy.repeat, found.length, case.args.batch, heads, case.width) for heads in case.heads]
    found.add(way.name, lambda q, k, v: way(q, k, v, case.policy), shapes, unsure=way != Way(way.backend))


def _add_dense_mask(found: _Field) -> None:
    from torch.nn.functional import scaled_dot_product_attention

    if found.rows**2 > DENSE_MASK_BYTES:
        found.notes.append(f"dense-mask SDPA is not timed: its mask takes {found.rows**2 / 2**30:.0f} GiB")
        return
    mask, ratio = found.case.policy.mask(found.length, device=found.case.place.device), found.case.ratio

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Masked kernels know no grouped queries on CUDA: widen by hand.
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found.add("dense-mask SDPA over K*s", dense, found.flat(found.rows))


def _result(
    policy: KVPolicy, args: argparse.Namespace, length: int, width: int, contenders: list[Contender], on_cuda: bool
) -> Result:
    """Shape and rows; the floor comes right below what it is made of."""
    vanilla = [c for c in contenders if c.name.startswith(VANILLA)]
    repeat, heads = policy.repeat, args.batch * args.heads

    def floor(step: str, cpu: bool = False) -> float:
        return repeat * min(c.median(step, cpu) for c in vanilla)

    def row(name: str, time: Callable[[str, bool], float], pairs: int) -> Row:
        numbers: dict[str, float] = {}
        for step, prefix in ((BOTH, ""), (FORWARD, "forward_")):
            elapsed = time(step, False)
            numbers[f"{prefix}milliseconds"] = elapsed
            numbers[f"{prefix}ratio_to_floor"] = elapsed / floor(step)
            numbers[f"{prefix}tflops"] = FLOPS[step] * width * pairs * heads / (elapsed * 1e9)
        if not on_cuda:
            numbers["cpu_milliseconds"] = time(BOTH, True)
            numbers["cpu_ratio_to_floor"] = time(BOTH, True) / max(floor(BOTH, True), 1e-9)
        return Row(name, numbers)

    one, whole = sum(type(policy)(1).pairs(length)), sum(policy.pairs(length))
    rows = [row(c.name, c.median, one) for c in vanilla]
    rows.append(row(f"floor: {repeat} x vanilla", floor, repeat * one))
    for contender in contenders[len(vanilla) :]:
        rows.append(row(contender.name, contender.median, whole))
        rows[-1].details |= {"samples": contender.times[BOTH], "peak_bytes": contender.peak_bytes}
        rows[-1].details["eager"] = contender.eager
    shape = {"policy": policy.name, "repeat": repeat, "seq_length": length, "batch": args.batch}
    shape |= {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": width}
    return Result(shape, rows)


def _is_slow(result: Result, auto: str, limit: float | None) -> bool:
    """Whether the backend that a model would take is beyond ``--fail-above``, which is said."""
    row = next(row for row in result.rows if row.name == f"PHD {auto}")
    ratio = row.numbers.get("cpu_ratio_to_floor", row.numbers["ratio_to_floor"])
    if limit is None or not ratio > limit:
        return False
    show(f"error: {auto} takes {ratio:.3f} x the floor, more than --fail-above={limit:g}")
    return True


def _print(result: Result, args: argparse.Namespace, on_cuda: bool, notes: Sequence[str]) -> None:
    shape, lines = result.shape, []
    columns = ["", "forward ms", "x floor", "+ backward ms", "x floor", "TFLOP/s"]
    columns += ["peak MiB"] if on_cuda else ["CPU ms", "x floor (CPU)"]
    for row in result.rows:
        found = row.numbers
        line = [row.name, milliseconds(found["forward_milliseconds"]), f"{found['forward_ratio_to_floor']:.3f}"]
        line += [milliseconds(found["milliseconds"]), f"{found['ratio_to_floor']:.3f}", f"{found['tflops']:.3g}"]
        if on_cuda:
            peak = row.details.get("peak_bytes")
            line.append(f"{peak / 2**20:.0f}" if isinstance(peak, int) else "")
        else:
            line += [milliseconds(found["cpu_milliseconds"]), f"{found['cpu_ratio_to_floor']:.3f}"]
        lines.append(line)
    title = f"{shape['policy']}, s={shape['seq_length']} b={shape['batch']} heads={shape['heads']}/{shape['kv_heads']}"
    print_table(f"{title} d={shape['head_dim']}, medians of {args.rounds} interleaved rounds", columns, lines)
    for note in notes:
        show(note)

"""``phd-megatron bench generate``: latency of prefill and of decoding, against a vanilla model of the same size.

All models share one set of random weights, so a ratio is the price of K alone. Naive repetition is the same vanilla
model reading (and caching) every token K times. Contenders run interleaved, round by round; the table shows medians
and their ratios to K = 1. Before anything is timed, cached decoding is compared with recomputation.

On a GPU both are replayed as CUDA graphs, so that no launch is timed, and a decoding step attends through the Triton
kernel where that runs: the prompt from an empty cache, and ``--steps`` times one token after the prompt, each time from
the same cache. On a CPU the cache grows.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phd_megatron.bench.measure import REPORT, TABLE, check_reports
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import save_figure, write_file

VARIANTS = ("cswa", "swa", "phd", "naive")
#: of cached against recomputed logits, in float32
TOLERANCE = 1e-4
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one measurement: elapsed, and CPU time of this process, which a busy machine changes less."""

    wall: float
    cpu: float


@dataclass
class Contender:
    """One model and how it is used. ``repeat`` is K; ``naive`` repeats the input instead of the hidden states."""

    variant: str
    repeat: int
    model: Any
    naive: bool = False
    cache: Any = None
    prefill: list[Sample] = field(default_factory=list)
    decode: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For the table."""
        return "vanilla" if self.variant == "vanilla" else f"{self.variant} K={self.repeat}"

    def tokens(self, ids: Any) -> Any:
        """``[b, n]`` token ids as this contender reads them, ``[b, K * n]`` where the input is repeated."""
        return ids.repeat_interleave(self.repeat, dim=1) if self.naive else ids


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench generate", description=__doc__)
    parser.add_argument("--repeats", type=int, nargs="+", default=[2, 3, 4, 8], metavar="K", help="beside K = 1")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:2] + VARIANTS[3:]))
    parser.add_argument("--window", type=int, default=16, help="W of cswa and swa (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C of cswa (default %(default)s)")
    parser.add_argument("--norm-scheme", default="hybrid_star", help="default %(default)s")
    parser.add_argument("--num-layers", type=int, default=16, help="default %(default)s")
    parser.add_argument("--hidden-size", type=int, default=768, help="default %(default)s")
    parser.add_argument("--ffn-hidden-size", type=int, default=2304, help="default %(default)s")
    parser.add_argument("--num-attention-heads", type=int, default=16, help="default %(default)s")
    parser.add_argument("--num-query-groups", type=int, default=4, help="key-value heads (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=50304, help="tied embedding (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="decoded tokens of a round (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds after one to warm up")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default=None, help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (PNG, SVG, PDF): latency over K")
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if cached decoding is wrong."""
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    for name in (*_SIZES, "prompt", "steps", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    if min(args.repeats) < 2:
        raise UserError(f"--repeats {args.repeats}: K = 1 is always measured; name values of 2 or more")
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads}: use 1 or more")
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {args.device} is none that torch knows; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: this torch sees no CUDA device; use --device cpu")
    contenders = list(_contenders(args, device))
    parameters = sum(p.numel() for p in contenders[0].model.parameters())
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    where = f"{args.dtype} on {machine}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    print(f"{parameters / 1e6:.0f}M parameters, {args.norm_scheme}, {where}, torch {torch.__version__}")
    worst = max(_error(contender, args) for contender in contenders)
    print(f"cached decoding against recomputation, float32: worst relative error {worst:.1e} (allowed {TOLERANCE:g})")
    if not worst <= TOLERANCE:
        print("error: the result is wrong, so it is not timed")
        return 1
    for contender in contenders:
        contender.model.to(getattr(torch, args.dtype))
    _measure(contenders, args, device)
    columns, rows, records = _results(contenders, device.type == "cpu")
    title = f"batch {args.batch}, prompt of {args.prompt} tokens, medians of {args.rounds} interleaved rounds"
    print_table(title, columns, rows)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "csv", "plot")}
        report = {"settings": settings, "where": where, "torch": torch.__version__, "worst_error": worst}
        write_file(args.json, "--json", REPORT, json.dumps({**report, "rows": records}, indent=1) + "\n")
    if args.csv is not None:
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([columns, *rows])
        write_file(args.csv, "--csv", TABLE, stream.getvalue())
    if args.plot is not None:
        _plot(args.plot, records, f"{parameters / 1e6:.0f}M, {where}, {title}")
    return 0


def _contenders(args: argparse.Namespace, device: Any) -> Iterator[Contender]:
    """Vanilla first. Every model holds the same tensors; of transformers' own classes none is involved."""
    vanilla = _build(args, device, 1, 1, None)
    yield Contender("vanilla", 1, vanilla)
    shapes = {"cswa": (args.window, args.chunk), "swa": (args.window, None), "phd": (1, None)}
    for variant in args.variants:
        for repeat in args.repeats:
            if variant == "naive":
                yield Contender(variant, repeat, vanilla, naive=True)
                continue
            model = _build(args, "meta", repeat, *shapes[variant])
            model.load_state_dict(vanilla.state_dict(), assign=True)
            model.tie_weights()
            yield Contender(variant, repeat, model)


def _build(args: argparse.Namespace, device: Any, repeat: int, window: int, chunk: int | None) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from phd_megatron.huggingface.bundle_files import write_bundle
    from phd_megatron.huggingface.families.phd import bundled_config

    content = bundled_config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups,
        tie_word_embeddings=True,
        max_position_embeddings=max(args.repeats) * (args.prompt + (args.rounds + 2) * args.steps),
        norm_scheme=args.norm_scheme,
        phd_repeat=repeat,
        phd_window=window,
        phd_chunk=chunk,
    )
    with tempfile.TemporaryDirectory(prefix="phd-megatron-bench-") as parent:
        directory = Path(parent) / "model"
        directory.mkdir()
        write_bundle(directory)
        (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=True, local_files_only=True)
        except ValueError as error:
            raise UserError(str(error)) from error
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()


def _ids(args: argparse.Namespace, length: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(args.vocab_size, (args.batch, length), generator=generator)


def _error(contender: Contender, args: argparse.Namespace) -> float:
    """Relative error of logits decoded through the cache, a few tokens after a short prompt that ends in a chunk."""
    import torch

    length, steps = 37, 5
    ids = contender.tokens(_ids(args, length + steps)).to(contender.model.device)
    width = contender.repeat if contender.naive else 1
    with torch.no_grad():
        whole = contender.model(ids, use_cache=False).logits[:, -width:]
        contender.cache = None
        _advance(contender, ids[:, : length * width])
        for step in range(length, length + steps):
            found = _advance(contender, ids[:, step * width : (step + 1) * width])
    contender.cache = None
    return float((found[:, -1] - whole[:, -1]).norm() / whole[:, -1].norm())


def _advance(contender: Contender, ids: Any) -> Any:
    """Run ``ids`` through the cache; logits of the last slot ``[b, 1, vocabulary]``."""
    if contender.cache is None:
        contender.cache = contender.model.make_cache()
    return contender.model(ids, use_cache=True, logits_to_keep=1, **{_cache_word(): contender.cache}).logits


def _cache_word() -> str:
    import inspect

    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


Run = Callable[[], object]


def _measure(contenders: Sequence[Contender], args: argparse.Namespace, device: Any) -> None:
    import torch

    ids = _ids(args, args.prompt + args.steps).to(device)
    graphs: dict[str, tuple[Run, Run]] = {}
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            shift = turn % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                prefill, decode = graphs.get(contender.name) or _ways(contender, ids, args)
                if device.type == "cuda" and not turn:
                    graphs[contender.name] = prefill, decode = _replays(contender, prefill, decode, ids, args)
                contender.cache = None
                first, second = _timed(prefill, device), _timed(decode, device)
                contender.cache = None
                if turn:
                    contender.prefill.append(first)
                    contender.decode.append(Sample(second.wall / args.steps, second.cpu / args.steps))


def _ways(contender: Contender, ids: Any, args: argparse.Namespace) -> tuple[Run, Run]:
    """The prompt, and the tokens after it."""
    width = contender.repeat if contender.naive else 1
    tokens = contender.tokens(ids)
    prompt, *pieces = tokens.split([args.prompt * width] + [width] * args.steps, dim=1)

    def decode() -> None:
        for piece in pieces:
            _advance(contender, piece)

    return (lambda: _advance(contender, prompt)), decode


def _replays(contender: Contender, prefill: Run, decode: Run, ids: Any, args: argparse.Namespace) -> tuple[Run, Run]:
    """CUDA graphs of both, of ``steps`` times the same token for the second; where that fails, what was given."""
    import torch

    from phd_megatron.bench.measure import captured
    from phd_megatron.huggingface.decoding import decode_kernel, takes_decode_kernel

    model = contender.model
    fast = not contender.naive and takes_decode_kernel(model, "auto")
    width = contender.repeat if contender.naive else 1
    piece = contender.tokens(ids)[:, -width:]

    def from_nothing() -> None:
        contender.cache = None
        prefill()

    from_nothing()
    # A step replaces the cache's tensors and changes none, so what they were is enough to go back.
    held = [(holder, dict(vars(holder))) for holder in (contender.cache, *contender.cache.layers)]
    cache = contender.cache

    def same_step() -> None:
        for _ in range(args.steps):
            for holder, state in held:
                vars(holder).update(state)
            contender.cache = cache
            _advance(contender, piece)

    try:
        with decode_kernel(model) if fast else nullcontext():
            return captured(from_nothing), captured(same_step)
    except RuntimeError as error:  # out of memory, or an operation that cannot be recorded: the others go on
        why = str(error).splitlines()[0]
        print(f"{contender.name} is launched operation by operation, and Python's time counts: {why}")
        torch.cuda.synchronize(ids.device)
        return prefill, decode


def _timed(run: Run, device: Any) -> Sample:
    """One call."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Sample(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


def _results(
    contenders: Sequence[Contender], with_cpu: bool
) -> tuple[list[str], list[list[str]], list[dict[str, Any]]]:
    """Columns and rows of the table, and JSON records. Ratios are to the first contender, round by round."""
    columns = ["model"]
    for part in ("prefill", "decode"):
        columns += [f"{part} ms", "x vanilla"] + (["x (CPU time)"] if with_cpu else [])
    rows, records = [], []
    for contender in contenders:
        record: dict[str, Any] = {"variant": contender.variant, "repeat": contender.repeat, "samples": {}}
        row = [contender.name]
        for part in ("prefill", "decode"):
            samples, vanilla = getattr(contender, part), getattr(contenders[0], part)
            wall = statistics.median(s.wall for s in samples)
            ratio = statistics.median(s.wall / v.wall for s, v in zip(samples, vanilla, strict=True))
            record |= {f"{part}_ms": wall, f"{part}_ratio": ratio}
            row += [f"{wall:.1f}", f"{ratio:.3f}"]
            if with_cpu:
                ratio = statistics.median(s.cpu / v.cpu for s, v in zip(samples, vanilla, strict=True))
                record[f"{part}_cpu_ratio"] = ratio
                row.append(f"{ratio:.3f}")
            record["samples"][part] = [s.wall for s in samples]
        records.append(record)
        rows.append(row)
    return columns, rows, records


def _plot(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Latency over K, prefill and decode side by side, as Figure 9 of arXiv 2504.14992."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); pip install matplotlib, or leave it out") from error
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    vanilla = records[0]
    for axis, key, name in zip(axes, ("prefill_ms", "decode_ms"), ("prefill", "decode, per token"), strict=True):
        for variant in dict.fromkeys(record["variant"] for record in records[1:]):
            points = [(1, vanilla[key]), *((r["repeat"], r[key]) for r in records if r["variant"] == variant)]
            points.sort()
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(title=name, xlabel="K", ylabel="ms", xscale="log", yscale="log")
        axis.set_xticks([1, *sorted({r["repeat"] for r in records[1:]})])
        axis.get_yaxis().set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        for scale in (axis.get_xaxis(), axis.get_yaxis()):
            scale.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.legend()
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    try:
        save_figure(figure, path, "--plot", dpi=150)
    finally:
        pyplot.close(figure)

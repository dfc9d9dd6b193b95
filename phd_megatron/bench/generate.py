"""``phd-megatron bench generate``: latency of prefill and of decoding, against a vanilla model of the same size.

All models share one set of random weights, so a ratio is the price of K alone. Naive repetition is the same vanilla
model reading (and caching) every token K times. Contenders run interleaved, round by round; the table shows medians
and their ratios to K = 1. Before anything is timed, cached decoding is compared with recomputation.

On a GPU both are replayed as CUDA graphs, so that no launch is timed, and a decoding step attends through the Triton
kernel where that runs: the prompt from an empty cache, and ``--steps`` times one token after the prompt, each time from
the same cache. On a CPU the cache grows.

Beside the times stands their floor (:mod:`phd_megatron.planning.generation`): operations and bytes of each model, and
how many times vanilla's they are. What is above it is launches, masks, and kernels that do more than they must.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phd_megatron.bench import timing
from phd_megatron.bench.generation_floor import model_of, print_floors
from phd_megatron.bench.place import Place, choose_place
from phd_megatron.bench.plots import draw_latency
from phd_megatron.bench.results import settings_of, write_json, write_table
from phd_megatron.bench.timing import Contender, Step, measure, median_ratio
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import ModelConfig
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError
from phd_megatron.runtime.temporary import temporary_directory

if TYPE_CHECKING:
    import torch

#: of cached against recomputed logits, in float32
TOLERANCE = 1e-4
PREFILL, DECODE = "prefill", "decode"


@dataclass
class Model:
    """One model and how it is used. ``repeat`` is K; ``naive`` repeats the input instead of the hidden states."""

    variant: str
    repeat: int
    model: Any  #: of transformers, which is not typed
    naive: bool = False
    cache: Any = None
    timing: Contender = field(init=False)

    def __post_init__(self) -> None:
        self.timing = Contender(self.name, {}, reset=self.forget)

    @property
    def name(self) -> str:
        """For the table."""
        return "vanilla" if self.variant == "vanilla" else f"{self.variant} K={self.repeat}"

    @property
    def width(self) -> int:
        """Rows that it reads for one token."""
        return self.repeat if self.naive else 1

    def forget(self) -> None:
        """Begin with an empty cache."""
        self.cache = None

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """``[b, n]`` token ids as this contender reads them, ``[b, K * n]`` where the input is repeated."""
        return ids.repeat_interleave(self.repeat, dim=1) if self.naive else ids


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if cached decoding is wrong."""
    import torch

    place = choose_place(args)
    models = list(_contenders(args, place.device))
    parameters = sum(p.numel() for p in models[0].model.parameters())
    where = f"{args.dtype} on {place.machine or 'CPU'}"
    where += "" if place.on_cuda else f", {torch.get_num_threads()} threads"
    show(f"{parameters / 1e6:.0f}M parameters, {args.norm_scheme}, {where}, torch {torch.__version__}")
    worst = max(_error(model, args) for model in models)
    show(f"cached decoding against recomputation, float32: worst relative error {worst:.1e} (allowed {TOLERANCE:g})")
    if not worst <= TOLERANCE:
        show("error: the result is wrong, so it is not timed")
        return 1
    for model in models:
        model.model.to(place.dtype)
    _measure(models, args, place)
    columns, rows, records = _results(models, not place.on_cuda)
    title = f"batch {args.batch}, prompt of {args.prompt} tokens, medians of {args.rounds} interleaved rounds"
    print_table(title, columns, rows)
    contenders = [(model.name, model.variant, model.repeat) for model in models]
    for record, floor in zip(records, print_floors(contenders, args, place.dtype.itemsize), strict=True):
        record |= floor
    report: dict[str, Plain] = {"settings": settings_of(args), "where": where, "torch": torch.__version__}
    write_json(args.json, {**report, "worst_error": worst, "rows": records})
    write_table(args.csv, columns, rows)
    if args.plot is not None:
        draw_latency(args.plot, _curves(models), f"{parameters / 1e6:.0f}M, {where}, {title}")
    return 0


def _contenders(args: argparse.Namespace, device: torch.device | str) -> Iterator[Model]:
    """Vanilla first. Every model holds the same tensors; of transformers' own classes none is involved."""
    vanilla = _build(model_of("vanilla", 1, args), args.vocab_size, device)
    yield Model("vanilla", 1, vanilla)
    for variant in args.variants:
        for repeat in args.repeats:
            if variant == "naive":
                yield Model(variant, repeat, vanilla, naive=True)
                continue
            model = _build(model_of(variant, repeat, args), args.vocab_size, "meta")
            model.load_state_dict(vanilla.state_dict(), assign=True)
            model.tie_weights()
            yield Model(variant, repeat, model)


def _build(model: ModelConfig, vocab_size: int, device: torch.device | str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.bundle_files import write_bundle
    from phd_megatron.huggingface.config_json import TokenIds, write_config
    from phd_megatron.huggingface.families.phd import FAMILY

    content = write_config(Architecture.from_model(model, vocab_size), FAMILY, "float32", TokenIds())
    with temporary_directory("bench") as parent:
        directory = parent / "model"
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


def _ids(args: argparse.Namespace, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(args.vocab_size, (args.batch, length), generator=generator)


def _error(model: Model, args: argparse.Namespace) -> float:
    """Relative error of logits decoded through the cache, a few tokens after a short prompt that ends in a chunk."""
    import torch

    length, steps = 37, 5
    ids = model.tokens(_ids(args, length + steps)).to(model.model.device)
    width = model.width
    with torch.no_grad():
        whole = model.model(ids, use_cache=False).logits[:, -width:]
        model.forget()
        _advance(model, ids[:, : length * width])
        for step in range(length, length + steps):
            found = _advance(model, ids[:, step * width : (step + 1) * width])
    model.forget()
    return float((found[:, -1] - whole[:, -1]).norm() / whole[:, -1].norm())


def _advance(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Run ``ids`` through the cache; logits of the last slot ``[b, 1, vocabulary]``."""
    if model.cache is None:
        model.cache = model.model.make_cache()
    logits: torch.Tensor = model.model(ids, use_cache=True, logits_to_keep=1, **{_cache_word(): model.cache}).logits
    return logits


def _cache_word() -> str:
    import inspect

    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


def _measure(models: Sequence[Model], args: argparse.Namespace, place: Place) -> None:
    import torch

    ids = _ids(args, args.prompt + args.steps).to(place.device)
    with torch.no_grad():
        for model in models:
            prefill, decode = _ways(model, ids, args)
            if place.on_cuda:
                prefill, decode = _replays(model, prefill, decode, ids, args)
            model.timing.steps = {PREFILL: prefill, DECODE: decode}
            model.timing.repeats = {PREFILL: 1, DECODE: args.steps}
            model.forget()
        measure([model.timing for model in models], args.rounds, place.device)


def _ways(model: Model, ids: torch.Tensor, args: argparse.Namespace) -> tuple[Step, Step]:
    """The prompt, and the tokens after it."""
    width = model.width
    prompt, *pieces = model.tokens(ids).split([args.prompt * width] + [width] * args.steps, dim=1)

    def prefill() -> None:
        _advance(model, prompt)

    def decode() -> None:
        for piece in pieces:
            _advance(model, piece)

    return prefill, decode


def _replays(
    model: Model, prefill: Step, decode: Step, ids: torch.Tensor, args: argparse.Namespace
) -> tuple[Step, Step]:
    """CUDA graphs of both, of ``steps`` times the same token for the second; where that fails, what was given."""
    import torch

    from phd_megatron.huggingface.decoding import decode_kernel, takes_decode_kernel

    fast = not model.naive and takes_decode_kernel(model.model, "auto")
    piece = model.tokens(ids)[:, -model.width :]

    def from_nothing() -> None:
        model.forget()
        prefill()

    from_nothing()
    # A step writes behind what the cache's tensors show, and over hidden entries that its token does not see, so what
    # they were is enough to go back.
    cache = model.cache
    stores = [store for layer in cache.layers for store in layer.stores]
    held = [(holder, dict(vars(holder))) for holder in (cache, *cache.layers, *stores)]

    def same_step() -> None:
        for _ in range(args.steps):
            for holder, state in held:
                vars(holder).update(state)
            model.cache = cache
            _advance(model, piece)

    try:
        with decode_kernel(model.model) if fast else nullcontext():
            return timing.captured(from_nothing), timing.captured(same_step)
    except RuntimeError as error:  # out of memory, or an operation that cannot be recorded: the others go on
        model.timing.note_eager(error)
        torch.cuda.synchronize(ids.device)
        return prefill, decode


def _results(models: Sequence[Model], with_cpu: bool) -> tuple[list[str], list[list[str]], list[dict[str, Plain]]]:
    """Columns and rows of the table, and JSON records. Ratios are to the first contender, round by round."""
    columns = ["model"]
    for part in (PREFILL, DECODE):
        columns += [f"{part} ms", "x vanilla"] + (["x (CPU time)"] if with_cpu else [])
    rows, records = [], []
    vanilla = models[0].timing
    for model in models:
        record: dict[str, Plain] = {"variant": model.variant, "repeat": model.repeat}
        samples: dict[str, Sequence[float]] = {}
        record["samples"] = samples
        row = [model.name]
        for part in (PREFILL, DECODE):
            wall = statistics.median(model.timing.times[part])
            ratio = median_ratio(model.timing.times[part], vanilla.times[part])
            record |= {f"{part}_ms": wall, f"{part}_ratio": ratio}
            row += [f"{wall:.1f}", f"{ratio:.3f}"]
            if with_cpu:
                ratio = median_ratio(model.timing.cpu_times[part], vanilla.cpu_times[part])
                record[f"{part}_cpu_ratio"] = ratio
                row.append(f"{ratio:.3f}")
            samples[part] = model.timing.times[part]
        records.append(record)
        rows.append(row)
    return columns, rows, records


def _curves(models: Sequence[Model]) -> Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]:
    """Medians over K of each variant, which all begin at vanilla's K = 1."""
    return {
        name: {
            variant: [(m.repeat, m.timing.median(part)) for m in models if m.variant in ("vanilla", variant)]
            for variant in dict.fromkeys(m.variant for m in models[1:])
        }
        for part, name in ((PREFILL, "prefill"), (DECODE, "decode, per token"))
    }

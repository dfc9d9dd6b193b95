"""``docs/results/trained/README.md``: what the runs that there are say, and what they do not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from phd_megatron.sweep import figures
from phd_megatron.sweep.document import Block, Figure, Heading, Table, Text, markdown
from phd_megatron.sweep.scaling import Estimate, Fit, fit_law
from phd_megatron.sweep.statistics import CONFIDENCE, Difference, paired
from phd_megatron.sweep.store import write

from .queue import VARIANT, Queue, Section
from .results import LASTING, Results, Trained, by_folders, lasting, read_results

TITLE = "Trained models"
FINDINGS = "findings.md"
SIZE = "size"  #: the axis along which scaling laws are fitted
_UNIT = "nats per token"


def write_report(queue: Queue, output: Path) -> Path:
    """Write ``README.md`` and its figures; what a person has found is taken from ``findings.md`` as it stands."""
    results = read_results(queue)
    blocks: list[Block] = []
    findings = output / FINDINGS
    if findings.exists():
        blocks.append(Text(findings.read_text("utf-8").strip()))
    blocks += [*state(results), *anchors(results), *rates(results)]
    for section in queue.sections:
        if not section.is_grid and section.name != queue.anchor:
            blocks += comparison(results, section, output)
    blocks += [*gaps(results), *definitions(), *provenance(results)]
    text = markdown(TITLE, blocks).replace(".png)", ".svg)")
    for picture in output.glob("*.png"):
        picture.unlink()
    write(output / "README.md", text)
    return output / "README.md"


# ---------------------------------------------------------------- sections


def state(results: Results) -> Iterator[Block]:
    """What of the queue has been run."""
    queue = results.queue
    there = {r.record["name"] for r in results.trained} | {r["name"] for r in results.diverged}
    rows, missing = [], []
    for section in queue.sections:
        if section.name == queue.anchor:
            continue
        for text in section.texts:
            names = [e.name for e in queue.experiments if e.section is section and e.text == text]
            done = sum(name in there for name in names)
            tokens = "by size" if SIZE in section.axes else f"{section.tokens / 1e6:g} M"
            rows.append([f"{section.item}. {section.about}", text, tokens, f"{done} of {len(names)}"])
            if not done:
                missing.append(f"{section.about[0].lower()}{section.about[1:]} ({text})")
    yield Heading("What has been run")
    yield Table(["experiments", "text", "tokens", "runs"], rows)
    if missing:
        yield Text(f"Nothing is known yet of: {'; '.join(missing)}.")


def anchors(results: Results) -> Iterator[Block]:
    """The same run in each piece: what a machine and a day change."""
    section = next(s for s in results.queue.sections if s.name == results.queue.anchor)
    rows = []
    for text in section.texts:
        runs = results.of(section, text)
        rows += [
            [f"{text}, {r.record['piece']}", r.record["device"], f"{r.final:.4f}", _number(r.folders)] for r in runs
        ]
        if len(runs) > 1:
            spread = statistics.stdev(r.final for r in runs)
            rows.append([f"{text}, standard deviation of {len(runs)}", "", f"{spread:.4f}", ""])
    yield Heading("Anchor")
    if not rows:
        yield Text("No piece has been run.")
        return
    yield Table(["text, piece", "device", "validation", "held-out folders"], rows)
    yield Text(
        f"{section.about}: {', '.join(section.variants)}, seed {section.seeds[0]}. What differs between pieces is the "
        "machine and the order in which its kernels add; differences below that spread say nothing."
    )


def rates(results: Results) -> Iterator[Block]:
    """Grids of learning rates, a row for each variant and warm-up."""
    grids: dict[tuple[str, str, str], dict[float, str]] = {}
    finals: dict[tuple[str, str, str], dict[float, float]] = {}
    chosen_by_hand = results.queue.rates
    sections = {s.name for s in results.queue.sections if s.is_grid}
    for record in [*(r.record for r in results.trained), *results.diverged]:
        if record["section"] not in sections:
            continue
        warmup = f"{record['config'].get('lr_warmup_tokens', 0) / 1e6:g} M"
        key, rate = (record["text"], record["axes"][VARIANT], warmup), float(record["config"]["lr"])
        grids.setdefault(key, {})[rate] = record["state"]
    for run in results.trained:
        if run.record["section"] in sections:
            warmup = f"{run.record['config'].get('lr_warmup_tokens', 0) / 1e6:g} M"
            key = (run.record["text"], run.record["axes"][VARIANT], warmup)
            finals.setdefault(key, {})[float(run.record["config"]["lr"])] = run.final
    yield Heading("Learning rates")
    if not grids:
        yield Text("No grid has been run.")
        return
    columns = sorted({rate for row in grids.values() for rate in row})
    rows, edges = [], []
    for key, states in sorted(grids.items()):
        losses = finals.get(key, {})
        best = min(losses, key=lambda rate: losses[rate], default=None)
        cells = [_cell(states.get(rate), losses.get(rate), rate == best) for rate in columns]
        rows.append([", ".join(key[:2]) + f", warm-up {key[2]}", *cells])
        if best is not None and (len(states) < 3 or best in (min(states), max(states))):
            edges.append(f"{key[1]} on {key[0]}, warm-up {key[2]} ({best:g})")
    yield Table(["validation loss at a rate of", *(f"{rate:g}" for rate in columns)], rows)
    seeds = sorted({seed for s in results.queue.sections if s.name in sections for seed in s.seeds})
    yield Text(f"Seed {', '.join(map(str, seeds))}, which no comparison below uses; the best of a row is bold.")
    if edges:
        yield Text(f"At the edge of what has been run, so that another rate may be better: {'; '.join(edges)}.")
    if chosen_by_hand:
        rows = [
            [
                f"{text}, {variant}",
                *(f"{fields.get(name, ''):g}" if name in fields else "" for name in ("lr", "lr_warmup_tokens")),
            ]
            for text, variants in chosen_by_hand.items()
            for variant, fields in variants.items()
        ]
        yield Table(["chosen for", "rate", "warm-up tokens"], rows)


def comparison(results: Results, section: Section, output: Path) -> Iterator[Block]:
    """Final losses, paired differences, whether they last, curves."""
    panels = {}
    rows = []
    differences = []
    for text in section.texts:
        groups = results.groups(section, text)
        if groups:
            panels[text] = {group.name: [r.curve for r in group.results.values()] for group in groups}
        for group in groups:
            runs = [r for r in group.finished if isinstance(r, Trained)]
            folders = [r.folders for r in runs if r.folders is not None]
            spread = "one seed" if group.spread is None else f"{group.spread:.4f}"
            rows.append(
                [
                    f"{text}, {group.name}",
                    str(len(runs)),
                    f"{statistics.fmean(group.finals):.4f}",
                    spread,
                    _number(statistics.fmean(folders) if folders else None),
                    f"{runs[0].record['config']['lr']:g}",
                    f"{runs[0].curve.end('flops'):.3g}",
                ]
            )
        for group, baseline in results.pairs(section, text):
            end, elsewhere = paired(group, baseline), paired(group, baseline, by_folders)
            early, verdict = lasting(group, baseline)
            if end is not None:
                differences.append(
                    [
                        f"{text}, {group.name} - {baseline.axes[VARIANT]}",
                        str(end.pairs),
                        _difference(end),
                        _difference(elsewhere),
                        end.verdict,
                        "" if early is None else f"{early.mean:+.4f}",
                        verdict,
                    ]
                )
    if not rows:
        return
    budget = "" if SIZE in section.axes else f" ({section.tokens / 1e6:g} M tokens)"
    yield Heading(f"{section.about}{budget}")
    yield Table(
        ["text, variant", "seeds", "validation", "standard deviation", "held-out folders", "rate", "FLOPs"], rows
    )
    if differences:
        head = ["text, difference", "pairs", f"validation ({CONFIDENCE:.0%} interval)", "held-out folders"]
        yield Table([*head, "loss is", "at two thirds", "lasting"], differences)
    if SIZE in section.axes:
        yield from laws(results, section, output)
    stem = f"losses_{section.name}"
    figures.draw_losses(panels, output, stem, _UNIT)
    yield Figure(stem, f"{section.about}: training loss, moving average (lines) and validation (dots)")


def laws(results: Results, section: Section, output: Path) -> Iterator[Block]:
    """Scaling laws of each variant over the sizes of the section."""
    found, rows = [], []
    for text in section.texts:
        for variant in section.variants:
            runs = [r for r in results.of(section, text) if r.record["axes"][VARIANT] == variant]
            if not runs:
                continue
            sizes = [float(r.record["plan"]["non_embedding_parameters"]) for r in runs]
            tokens, losses = [float(r.record["plan"]["tokens"]) for r in runs], [r.final for r in runs]
            fit = fit_law(sizes, tokens, losses)
            name = f"{text}, {variant}"
            found.append((name, sizes, tokens, losses, fit if isinstance(fit, Fit) else None))
            if isinstance(fit, Fit):
                rows.append([name, fit.formula, *(_estimate(fit.estimates.get(key)) for key in ("E", "A", "alpha"))])
            else:
                rows.append([name, fit, "", "", ""])
    if found:
        yield Table(["text, variant", "law", "E", "A", "alpha"], rows)
        figures.draw_scaling(found, output, f"scaling_{section.name}", _UNIT)
        yield Figure(f"scaling_{section.name}", "Final losses over parameters without embeddings, with the fitted laws")


def gaps(results: Results) -> Iterator[Block]:
    """Training against both validation losses."""
    rows = []
    for text in dict.fromkeys(r.record["text"] for r in results.trained):
        runs = [r for r in results.trained if r.record["text"] == text and r.folders is not None]
        alike: dict[str, list[Trained]] = {}
        for run in runs:
            alike.setdefault(f"{run.record['axes'][VARIANT]} ({run.record['section']})", []).append(run)
        for name, found in alike.items():
            epochs = found[0].record["plan"]["tokens"] / found[0].record["text_made_of"]["tokens"]["train"]
            rows.append(
                [
                    f"{text}, {name}",
                    f"{epochs:.2f}",
                    f"{statistics.fmean(r.trained_to for r in found):.4f}",
                    f"{statistics.fmean(r.final for r in found):.4f}",
                    f"{statistics.fmean(r.folders or 0 for r in found):.4f}",
                ]
            )
    if rows:
        yield Heading("Training and validation")
        yield Table(
            ["text, variant (experiments)", "epochs", "training, last 5 %", "validation", "held-out folders"], rows
        )


def definitions() -> Iterator[Block]:
    """What the words of the tables mean."""
    yield Heading("How to read this")
    yield Text(
        f"Losses are in {_UNIT}, of the last copy. Validation is of documents drawn at random from the folders that "
        "training reads; held-out folders are whole subsystems or packages that it does not. A difference is the mean "
        "of differences at equal seeds, hence equal batches, with Student's t interval; 'lower' or 'higher' stands "
        "only where it exceeds the larger standard deviation over seeds of the two and the interval leaves out 0. With "
        "one seed nothing is stated. **Lasting** means that the paired validation difference at the end is at least "
        f"{LASTING:.0%} of that at two thirds of the run, and holds at 400 M tokens. Runs share a GPU, so their times "
        "are no measure; FLOPs are by formula."
    )


def provenance(results: Results) -> Iterator[Block]:
    """Which machine, commit and text."""
    found: dict[str, set[str]] = {}
    for run in results.trained:
        record = run.record
        found.setdefault("pieces", set()).add(record["piece"])
        found.setdefault("devices", set()).add(record["device"])
        found.setdefault("commits", set()).add(str(record["commit"])[:7])
        found.setdefault("texts", set()).add(
            f"{record['text']} ({record['text_made_of'].get('train_sha256', '')[:12]})"
        )
    if found:
        yield Heading("Where the numbers are from")
        yield Text("; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in found.items()) + ".")
    yield Text("Written by `PYTHONPATH=tools python -m evidence report` from [`runs/`](runs); [how](how.md).")


# ---------------------------------------------------------------- cells


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} ({estimate.interval[0]:.4g} to {estimate.interval[1]:.4g})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(state: str | None, loss: float | None, is_best: bool) -> str:
    if loss is None:
        return state or ""
    return f"**{loss:.4f}**" if is_best else f"{loss:.4f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.interval is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} ({difference.interval[0]:+.4f} to {difference.interval[1]:+.4f})"

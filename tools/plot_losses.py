"""Draw loss curves of runs side by side into a PNG: ``plot_losses.py NAME=FILE... --output losses.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

from phd_megatron.console.plots import pyplot, tidy
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import save_figure
from phd_megatron.sweep.curves import smooth
from phd_megatron.training.metrics_reader import Run, add_run_arguments, runs_of

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#c44e52")


def draw(runs: list[Run], output: Path, seq_length: int | None, unit: str, title: str) -> None:
    """Training loss (thin: as logged; thick: smoothed) and validation loss (dots) over tokens or samples."""
    plt = pyplot()
    figure, (whole, end) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    scale = seq_length / 1e6 if seq_length else 1
    lowest, highest = [], []
    for run, colour in zip(runs, COLOURS * (1 + len(runs) // len(COLOURS)), strict=False):
        x, loss = run.curve("lm_loss")
        x_valid, valid = run.curve("validation_loss")
        for axes in (whole, end):
            axes.plot([v * scale for v in x], loss, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot([v * scale for v in x], smooth(loss), color=colour, linewidth=1.8, label=run.name)
            axes.plot([v * scale for v in x_valid], valid, "o", color=colour, markersize=5, markeredgecolor="white")
        tail = [v for v, at in zip(smooth(loss), x, strict=True) if at >= 0.4 * x[-1]]
        tail += [v for v, at in zip(valid, x_valid, strict=True) if at >= 0.4 * x[-1]]
        lowest.append(min(tail))
        highest.append(max(tail))
        end.set_xlim(left=0.4 * x[-1] * scale)
    margin = 0.05 * (max(highest) - min(lowest)) or 0.1
    end.set_ylim(min(lowest) - margin, max(highest) + margin)
    for axes, part in ((whole, "whole run"), (end, "from 40 % on")):
        tidy(axes, "original tokens (millions)" if seq_length else "samples", f"loss ({unit})")
        axes.set_title(part, fontsize=10)
    whole.legend(frameon=False, title="line: training, dots: validation", title_fontsize=8, fontsize=9)
    figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, output, "--output", dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="PNG (or PDF, SVG) to write")
    parser.add_argument("--seq-length", type=int, help="tokens per sample; the x axis is then in tokens")
    parser.add_argument("--unit", default="nats per token")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    try:
        draw(runs_of(parser, options.runs), options.output, options.seq_length, options.unit, options.title)
    except UserError as error:
        parser.error(str(error))
    print(f"loss curves: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

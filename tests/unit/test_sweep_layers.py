"""The report's section on statistics by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.sweep import figures
from phd_megatron.sweep.curves import read_curve
from phd_megatron.sweep.document import Figure, Heading, Table, Text
from phd_megatron.sweep.layers import LABELS, layer_blocks, shown_steps
from phd_megatron.sweep.statistics import Result
from phd_megatron.sweep.store import Entry
from phd_megatron.training.observers.layer_statistics import STATISTICS


def member(
    tmp_path: Path,
    name: str,
    scale: float,
    layers: int,
    steps: tuple[int, ...],
    state: str = "finished",
    known: tuple[str, ...] = STATISTICS,
):
    """A member with ``scale * (step + layer)`` for every statistic; ``copy_cosine`` ends before the last layer."""
    lines = []
    for step in (1, 2, 3, 4, 5):
        line = {"iteration": step, "consumed_samples": step, "consumed_tokens": step, "consumed_flops": step}
        line |= {"lm_loss": 2.0, "iteration_seconds": 1.0}
        if step in steps:
            table = {str(layer): scale * (step + layer) for layer in range(1, layers + 1)}
            tables = dict.fromkeys(known, table)
            if "copy_cosine" in tables:
                tables["copy_cosine"] = {layer: value for layer, value in table.items() if int(layer) < layers}
            line["layer_statistics"] = tables
        lines.append(json.dumps(line) + "\n")
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(lines))
    return Result(Entry(name, {}, 5, 5, 1, {}), state, read_curve(name, path))  # type: ignore[arg-type]


def test_every_statistic_has_a_name() -> None:
    assert tuple(LABELS) == STATISTICS


def test_section_compares_at_common_steps(tmp_path: Path) -> None:
    panels = {
        "small": {
            "pre": [member(tmp_path, "a", 1.0, 2, (1, 2, 3, 4, 5)), member(tmp_path, "b", 3.0, 2, (1, 2, 3, 4))],
            "hybrid": [member(tmp_path, "c", 0.5, 2, (1, 2, 4))],
            "without": [member(tmp_path, "d", 1.0, 2, ())],
        },
        "large": {"pre": [member(tmp_path, "e", 1.0, 11, (1, 2, 4)), member(tmp_path, "f", 1.0, 11, (1,), "stopped")]},
    }
    heading, *blocks, table, _ = layer_blocks(panels, tmp_path)
    assert heading == Heading("Statistics by layer")
    assert [block.stem for block in blocks if isinstance(block, Figure)] == [f"layers_{name}" for name in STATISTICS]
    assert all("at steps 1, 2, 4" in block.caption for block in blocks if isinstance(block, Figure))
    assert all((tmp_path / f"layers_{name}.svg").stat().st_size > 5000 for name in STATISTICS)
    assert isinstance(table, Table)
    # at step 4: mean over the seeds' scales 1 and 3; 11 layers in the order of their numbers, not of their names
    assert [row[:2] for row in table.rows] == [
        ["small, pre", "10 / 12"],
        ["small, hybrid", "2.5 / 3"],
        ["large, pre", "5 / 15"],
    ]
    assert all(len(row) == 1 + len(STATISTICS) for row in table.rows)


def test_values_that_only_some_members_have(tmp_path: Path) -> None:
    """A model without copies beside one with, and a seed recorded before there were all values."""
    panels = {
        "": {
            "k1": [member(tmp_path, "a", 1.0, 3, (4,), known=STATISTICS[:5])],
            "k2": [member(tmp_path, "b", 1.0, 3, (4,)), member(tmp_path, "c", 3.0, 3, (4,))],
            "mixed": [member(tmp_path, "d", 1.0, 3, (4,)), member(tmp_path, "e", 1.0, 3, (4,), known=STATISTICS[:5])],
        }
    }
    _, *figures, table, _ = layer_blocks(panels, tmp_path)
    assert len(figures) == len(STATISTICS)
    assert isinstance(table, Table)
    columns = [table.head.index(LABELS[name]) for name in ("residual_rms", "copy_cosine", "attention_on_own")]
    assert [[row[0], *(row[column] for column in columns)] for row in table.rows] == [
        ["k1", "5 / 7", "-", "-"],
        ["k2", "10 / 14", "10 / 12", "10 / 14"],
        ["mixed", "5 / 7", "-", "-"],
    ]
    drawn = (tmp_path / "layers_copy_cosine.svg").read_text()
    assert ">k2<" in drawn and ">k1<" not in drawn, "the legend names the groups that have a line"

    _, *figures, table, _ = layer_blocks({"": {"k1": panels[""]["k1"]}}, tmp_path / "k1")
    assert [figure.stem for figure in figures] == [f"layers_{name}" for name in STATISTICS[:5]]  # type: ignore[union-attr]
    assert list(table.head) == ["members", *list(LABELS.values())[:5]]  # type: ignore[union-attr]


def test_layers_are_marked_by_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, *where: drawn.append(figure))
    figures.draw_layers({"": {"k1": [[1.0, 2.0], [3.0, 4.0]]}}, [1, 2], tmp_path, "layers", "rms", False)
    (figure,) = drawn
    ticks = [tick for axes in figure.axes for tick in axes.get_xticks()]
    assert ticks and all(tick == round(tick) for tick in ticks)


def test_shown_steps() -> None:
    assert shown_steps([range(1, 9), (1, 3, 5, 7, 8, 9)]) == [1, 5, 8]
    assert shown_steps([(2, 1)]) == [1, 2]


def test_no_section_without_records_and_a_reason_without_common_steps(tmp_path: Path) -> None:
    one, other = member(tmp_path, "a", 1.0, 2, (1,)), member(tmp_path, "b", 1.0, 2, (2,))
    nothing = member(tmp_path, "c", 1.0, 2, ())
    assert list(layer_blocks({"": {"x": [nothing]}}, tmp_path)) == []
    assert list(layer_blocks({"": {"x": [member(tmp_path, "d", 1.0, 2, (1,), "failed")]}}, tmp_path)) == []
    heading, text = layer_blocks({"": {"x": [one], "y": [other], "z": [nothing]}}, tmp_path)
    assert isinstance(heading, Heading)
    assert isinstance(text, Text)
    assert "no step in common" in text.text
    assert not list(tmp_path.glob("layers_*"))

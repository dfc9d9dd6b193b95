"""The scripts that read metrics files and the quickstart's corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phd_megatron.training.metrics_reader import read_run

ROOT = Path(__file__).resolve().parents[2]


def write_metrics(path: Path, losses: list[float], first: int = 1) -> Path:
    with path.open("a", encoding="utf-8") as stream:
        for iteration, loss in enumerate(losses, first):
            step = {"iteration": iteration, "consumed_samples": 4 * iteration, "lm_loss": loss, "validation_loss": None}
            stream.write(json.dumps(step) + "\n")
        stream.write(
            json.dumps({**step, "validation_loss": losses[-1] + 0.5, "tokens_per_second": 10.0 * len(losses)}) + "\n"
        )
    return path


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # As in launch scripts: nothing of the checkout is importable because of the working directory.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


def test_repeated_steps_count_once_and_the_later_one_wins(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", [4.0, 3.0, 2.5])
    write_metrics(path, [2.9, 2.4, 2.0], first=2)
    run = read_run("a", path)
    assert run.curve("lm_loss") == ([4, 8, 12, 16], [4.0, 2.9, 2.4, 2.0])
    assert run.last("validation_loss") == 2.5
    assert run.median("lm_loss") == 2.9, "of 2.0, 2.4, 2.9 and 4.0, the upper one of the middle"
    assert run.last("absent") is None and run.median("absent") is None


@pytest.mark.parametrize(("text", "part"), [("", "empty"), ("{}\n", ":1 is no line"), ('{"iteration"\n', ":1 is no")])
def test_unreadable_metrics_are_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=part):
        read_run("a", path)


def test_summary_table_and_json(tmp_path: Path) -> None:
    pre = write_metrics(tmp_path / "pre.jsonl", [3.0, 2.0])
    phd = write_metrics(tmp_path / "phd.jsonl", [3.0, 1.75])
    out = tmp_path / "s.json"
    done = run_tool("summarise_runs.py", f"pre={pre}", f"with K=2={phd}", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "-0.2500" in done.stdout
    assert "with K=2" in done.stdout
    assert [row["validation_loss"] for row in json.loads(out.read_text())] == [2.5, 2.25]


def test_summary_says_when_runs_do_not_compare(tmp_path: Path) -> None:
    short = write_metrics(tmp_path / "short.jsonl", [3.0, 2.0])
    long = write_metrics(tmp_path / "long.jsonl", [3.0, 2.0, 1.0])
    assert "do not compare" in run_tool("summarise_runs.py", f"a={short}", f"b={long}").stdout


def test_plot_writes_a_png(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", [4.0, 3.0, 2.0])
    out = tmp_path / "new" / "losses.png"
    done = run_tool("plot_losses.py", f"pre={path}", "--output", str(out), "--seq-length", "256")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_run_without_a_name_is_refused(tmp_path: Path) -> None:
    done = run_tool("plot_losses.py", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "x.png"))
    assert done.returncode == 2
    assert "write NAME=" in done.stderr


def test_corpus_is_the_standard_library_without_packages(tmp_path: Path) -> None:
    done = run_tool("stdlib_corpus.py", str(tmp_path / "corpus"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "corpus/json/decoder.py").read_bytes() == Path(json.decoder.__file__).read_bytes()
    assert not list((tmp_path / "corpus").rglob("site-packages"))

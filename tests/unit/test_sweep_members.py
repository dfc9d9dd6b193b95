"""Members of a sweep: what they are configured to, how they take turns, how each ended, and what a report counts.

The members' program is a few lines of Python here, so that starting, judging and queueing are looked at alone; real
ones train in tests/integration/test_sweep.py.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phd_megatron.errors import UserError
from phd_megatron.sweep import local, process
from phd_megatron.sweep.definition import read_sweep
from phd_megatron.sweep.local import LocalRun
from phd_megatron.sweep.members import plan_members
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.progress import COLUMNS, MembersDisplay
from phd_megatron.sweep.report import write_report
from phd_megatron.sweep.store import Status, Store, create, open_store

BASE = """
base:
  preset: tiny-dense
  model: {vocab_size: 257}
  data: {data_path: [DATA]}
  training: {eval_iters: 0, global_batch_size: 8, micro_batch_size: 4}
  checkpoint: {CHECKPOINT}
  tokens: 1.0e+5
"""
SWEEP = (
    BASE
    + """grid:
  norm_scheme: [pre, hybrid_star]
  seed: [1, 2, 3]
baseline: {norm_scheme: pre}
"""
)
NAMES = [f"{scheme}-seed{seed}" for scheme in ("pre", "hybrid_star") for seed in (1, 2, 3)]


def planned(tmp_path: Path, checkpoint: str = "", text: str = SWEEP, **flags: Any) -> list[Any]:
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace("CHECKPOINT", checkpoint))
    return plan_members(read_sweep(path, {}), tmp_path / "out", flags, check=False)[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    members = planned(tmp_path)
    return create(tmp_path / "out", read_sweep(tmp_path / "sweep.yaml", {}), members)


# ---------------------------------------------------------------- configuration


def test_data_that_is_not_there_is_said_with_the_member_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("CHECKPOINT", ""))
    with pytest.raises(UserError, match=r"^member pre-seed1: .*DATA"):
        plan_members(read_sweep(path, {}), tmp_path / "out", {}, check=True)


def test_checkpoints_of_members(tmp_path: Path) -> None:
    """What the file says of them stays; where it says nothing, the newest is kept and five are made."""
    # 100000 tokens of 256: 391 samples, 49 steps of 8, so 392 samples; a fifth of the steps is 9
    for member in planned(tmp_path):
        checkpoint = member.config.checkpoint
        assert (checkpoint.keep_last, checkpoint.save_interval) == (1, 9)
        assert checkpoint.save == checkpoint.load == str(tmp_path / f"out/members/{member.name}/checkpoints")
        assert member.config.logging.metrics_file == str(tmp_path / f"out/members/{member.name}/metrics.jsonl")
        assert (member.iterations, member.samples, member.config.data.data_horizon_samples) == (49, 392, 392)
        assert member.config.training.train_samples == 392 and member.config.training.train_iters is None
    (first, *_) = planned(tmp_path, "keep_last: 3, save_interval: 20")
    assert (first.config.checkpoint.keep_last, first.config.checkpoint.save_interval) == (3, 20)
    (first, *_) = planned(tmp_path, "keep_last: 3", keep_last=2)
    assert first.config.checkpoint.keep_last == 2
    short = SWEEP.replace("tokens: 1.0e+5", "tokens: 2.0e+3")  # one step
    assert {member.config.checkpoint.save_interval for member in planned(tmp_path, text=short)} == {1}


def test_what_is_stronger(tmp_path: Path) -> None:
    """A member over flags, flags over the file, the file over the preset; a length over tokens of a weaker source."""
    (first, *_) = planned(tmp_path, "", lr=0.5, train_samples=80)
    assert (first.config.optimizer.lr, first.samples, first.iterations) == (0.5, 80, 10)
    longer = SWEEP.replace("grid:", "grid:\n  budget: {short: {tokens: 4.0e+3}, long: {train_iters: 7}}")
    members = {member.axes["budget"]: member for member in planned(tmp_path, text=longer)}
    assert (members["short"].samples, members["short"].iterations) == (16, 2)
    assert (members["long"].samples, members["long"].iterations) == (56, 7)
    assert {member.config.data.data_horizon_samples for member in members.values()} == {56}


# ---------------------------------------------------------------- taking turns


@pytest.fixture
def not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that never empties is a failure and no hanging test."""
    sleeps = [0]
    real = time.sleep

    def sleep(seconds: float) -> None:
        sleeps[0] += 1
        assert sleeps[0] < 600, "the sweep waits for something that does not come"
        real(min(seconds, 0.05))

    monkeypatch.setattr(local.time, "sleep", sleep)


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make this the program of a member; ``home`` is its folder."""
    begin = "import json, pathlib, sys, time\nhome = pathlib.Path(sys.argv[1])\n"
    begin += "def log(samples):\n"
    begin += "    (home / 'metrics.jsonl').write_text(json.dumps({'consumed_samples': samples}) + chr(10))\n"
    monkeypatch.setattr(
        process,
        "member_command",
        lambda run_file, launcher: [sys.executable, "-S", "-E", "-c", begin + text, str(run_file.parent)],
    )


def test_a_place_of_a_member_that_cannot_start_is_free_again(
    store: Store, not_for_ever: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both places are lost on the way unless each comes back, and so is the lock of the member's folder."""
    program(monkeypatch, "log(392)")
    for name in NAMES[:3]:
        (store.home(name) / "log.txt").mkdir()
    statuses = LocalRun(store, Launcher(parallel=2), device="cpu").run(NAMES)
    assert [statuses[name].state for name in NAMES] == ["failed"] * 3 + ["finished"] * 3
    assert all("log.txt" in statuses[name].message for name in NAMES[:3])
    (store.home(NAMES[0]) / "log.txt").rmdir()
    again = LocalRun(store, Launcher(), device="cpu").run(NAMES[:1])
    assert (again[NAMES[0]].state, again[NAMES[0]].starts) == ("finished", 1)


def test_no_more_members_at_once_than_asked_for(
    store: Store, not_for_ever: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four members two run together: never three, and not one after the other."""
    program(
        monkeypatch,
        "beside = home.parent / 'now'\nbeside.mkdir(exist_ok=True)\nmine = beside / home.name\nmine.touch()\n"
        "found = []\nfor _ in range(12):\n    found.append(len(list(beside.iterdir())))\n    time.sleep(0.05)\n"
        "mine.unlink()\n(home / 'most').write_text(str(max(found)))\nlog(392)",
    )
    statuses = LocalRun(store, Launcher(parallel=2), device="cpu").run(NAMES[:4])
    assert {statuses[name].state for name in NAMES[:4]} == {"finished"}
    most = [int((store.home(name) / "most").read_text()) for name in NAMES[:4]]
    assert max(most) == 2
    assert {statuses[name].state for name in NAMES[4:]} == {"waiting"}, "those that were not asked for stay as they are"


@pytest.mark.parametrize(
    ("text", "state", "code", "words"),
    [
        ("log(392)", "finished", 0, ""),
        ("log(391)", "stopped", 0, "continues from its checkpoint"),
        ("sys.exit(0)", "stopped", 0, "continues from its checkpoint"),
        ("log(392)\nsys.exit(3)", "failed", 3, "ended with exit code 3"),
        ("print('error: lr=-1 is wrong')\nprint('one more line')\nsys.exit(2)", "failed", 2, "lr=-1 is wrong"),
        ("raise ValueError('seven')", "failed", 1, "ValueError: seven"),
        ("print('error: the run has diverged: nan')\nsys.exit(1)", "diverged", 1, "the run has diverged: nan"),
    ],
    ids=["finished", "short", "nothing", "late", "refused", "traceback", "diverged"],
)
def test_how_a_member_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, text: str, state: str, code: int, words: str
) -> None:
    program(monkeypatch, text)
    name = NAMES[0]
    (store.home(name) / "log.txt").write_text("error: the run has diverged in an earlier start\n")
    store.write_status(name, Status(state="failed", starts=2, seconds=100.0, message="before"))
    member = process.MemberProcess(store, name, Launcher())
    running = store.status(name)
    assert (running.state, running.starts, running.exit_code, running.message) == ("running", 3, None, "")
    assert process.present_status(store, name).state == "running", "its folder is locked"
    with pytest.raises(UserError, match="already saves into"):
        process.MemberProcess(store, name, Launcher())
    ended = member.wait()
    assert (ended.state, ended.exit_code, ended.starts) == (state, code, 3)
    assert words in ended.message and bool(words) == bool(ended.message)
    assert 100.0 < ended.seconds < 160.0
    assert store.status(name) == ended == member.wait()


def test_what_says_running_and_is_not(store: Store) -> None:
    store.write_status(NAMES[0], Status(state="running", starts=1))
    found = process.present_status(store, NAMES[0])
    assert (found.state, found.starts) == ("stopped", 1) and "its process is gone" in found.message
    assert process.present_status(store, NAMES[1]) == Status()


def test_a_member_that_is_asked_to_stop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "log(8)\nprint('begun', flush=True)\ntime.sleep(100)")
    for end in ("stop", "kill"):
        member = process.MemberProcess(store, NAMES[0], Launcher())
        log = store.home(NAMES[0]) / "log.txt"
        while "begun" not in log.read_text():
            assert member.poll() is None
            time.sleep(0.02)
        getattr(member, end)()
        assert (member.wait().state, member.wait().exit_code) == ("stopped", {"stop": -15, "kill": -9}[end])
        log.unlink()


# ---------------------------------------------------------------- report


def logged(store: Store, name: str, losses: list[float], validation: float | None) -> None:
    lines = [
        {
            "iteration": index,
            "consumed_samples": 8 * index,
            "consumed_tokens": 2048 * index,
            "consumed_flops": 1e9 * index,
            "lm_loss": loss,
            "iteration_seconds": 0.5,
            "validation_loss": validation if index == len(losses) else None,
        }
        for index, loss in enumerate(losses, 1)
    ]
    (store.home(name) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(text: str, heading: str) -> list[list[str]]:
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"][2:]


def test_a_live_table_has_words_left_and_numbers_right(store: Store) -> None:
    statuses = {entry.name: Status("waiting") for entry in store.entries}
    table = MembersDisplay(store)._table(statuses, 50)
    assert [column.justify for column in table.columns] == ["left", "left", *["right"] * (len(COLUMNS) - 2)]
    assert table.row_count == len(statuses)


def test_a_report_compares_what_has_finished(store: Store) -> None:
    """What a member that stopped, failed, diverged or still runs has lost is told, and counts in no mean."""
    finals = {"pre": (2.50, 2.60, 2.55), "hybrid_star": (2.30, 2.42, 1.00)}
    for scheme, losses in finals.items():
        for seed, loss in enumerate(losses, 1):
            logged(store, f"{scheme}-seed{seed}", [4.0, 3.0, loss + 0.1], loss)
            store.write_status(f"{scheme}-seed{seed}", Status(state="finished", exit_code=0, starts=1))
    store.write_status("hybrid_star-seed3", Status(state="running", starts=1))  # no process of it is left: stopped
    text = write_report(store.directory)[0].read_text()
    assert table(text, "Final losses") == [
        ["pre", "3", "2.5500", "0.0500", "2.5000", "2.6000"],  # 2.50, 2.60, 2.55
        ["hybrid_star", "2", "2.3600", "0.0849", "2.3000", "2.4200"],  # 0.12/sqrt(2)
    ]
    # -0.20 and -0.18: half width 12.7062 * 0.0141421 / sqrt(2) = 0.127062
    assert table(text, "Differences from the baseline") == [
        ["hybrid_star", "pre", "2", "-0.1900", "-0.3171 to -0.0629", "0.0849", "lower"]
    ]
    rows = {row[0]: row for row in table(text, "Members")}
    assert rows["hybrid_star-seed3"][1] == "stopped" and rows["hybrid_star-seed3"][-2:] == ["1.0000", "validation"]
    assert re.search(r"hybrid_star-seed3 has not finished \(stopped.*left out of every comparison", text)
    assert "pre-seed1 has not finished" not in text
    # At equal tokens the smoothed training loss counts (few values are not smoothed): 0.1 above the final ones.
    (equal,) = table(text, "At equal tokens, equal FLOPs and equal time")
    assert equal == ["hybrid_star", "pre", *(["-0.1900 (-0.3171 to -0.0629)"] * 3)]


def test_without_a_finished_member_there_is_no_final_loss(store: Store) -> None:
    with pytest.raises(UserError, match="has logged a step yet"):
        write_report(store.directory)
    logged(store, NAMES[0], [4.0, 3.0], 2.9)
    text = write_report(open_store(store.directory).directory)[0].read_text()
    assert "No member has finished." in text and "No member has finished together with its baseline" in text
    assert {row[1] for row in table(text, "Members")} == {"waiting"}


SIZES = (
    BASE
    + """grid:
  ffn_hidden_size: [64, 256, 1024]
  seed: [1, 2]
size_axis: ffn_hidden_size
"""
)


def test_a_report_fits_a_law_and_shows_what_it_leaves(tmp_path: Path) -> None:
    """Final losses about 40 N^-0.3; the law is a line in logarithms, which numpy fits by itself."""
    members = planned(tmp_path, text=SIZES)
    store = create(tmp_path / "out", read_sweep(tmp_path / "sweep.yaml", {}), members)
    sizes = [float(entry.plan["non_embedding_parameters"]) for entry in store.entries]
    assert len(set(sizes)) == 3 and len(sizes) == 6
    losses = [40 * n**-0.3 * noise for n, noise in zip(sizes, (1.01, 0.99, 1.004, 0.998, 1.0, 1.003), strict=True)]
    for entry, loss in zip(store.entries, losses, strict=True):
        logged(store, entry.name, [9.0, loss], loss)
        store.write_status(entry.name, Status(state="finished", exit_code=0, starts=1))
    text = write_report(store.directory)[0].read_text()
    slope, offset = np.polyfit(np.log(sizes), np.log(losses), 1)
    section = text.partition("## Scaling laws\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    law, left = rows[2], [row for row in rows[3:] if row[0].startswith("ffn")]
    assert law[1] == "A N^-alpha" and law[-2:] == ["6", "4"] and law[2] == law[5] == law[6] == ""
    assert float(law[3].split(" [")[0]) == pytest.approx(np.exp(offset), rel=1e-3)
    assert float(law[4].split(" [")[0]) == pytest.approx(-slope, rel=1e-3)
    fitted = np.exp(offset) * np.asarray(sizes) ** slope
    assert left == [
        [entry.name, f"{loss:.4f}", f"{fit:.4f}", f"{loss / fit - 1:+.2%}"]
        for entry, loss, fit in zip(store.entries, losses, fitted, strict=True)
    ]
    assert (store.directory / "report" / "scaling.png").stat().st_size > 0

"""``phd-megatron bench``: it checks before it times, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phd_megatron.cli import bench, bench_attention
from phd_megatron.cli.main import main
from phd_megatron.errors import UserError

SMALL = ["attention", "--seq-length", "48", "--heads", "4", "--head-dim", "16", "--rounds", "1", "--device", "cpu"]


def test_attention_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    assert main(["bench", *SMALL, "--json", str(target)]) == 0
    report = json.loads(target.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert report["policy"] == "PHD-CSWA-2-16-32" and report["worst_error"] < 1e-5
    assert list(rows) == [
        "vanilla causal SDPA",
        "floor: 2 x vanilla",
        "PHD sdpa",
        "PHD reference",
        "dense-mask SDPA over K*s",
        "naive repetition, causal over K*s",
    ]
    floor, vanilla = rows["floor: 2 x vanilla"], rows["vanilla causal SDPA"]
    assert floor["milliseconds"] == pytest.approx(2 * vanilla["milliseconds"])
    assert floor["ratio_to_floor"] == 1.0 and vanilla["cpu_ratio_to_floor"] == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_attention, "_worst_error", lambda *_: float("nan"))
    assert bench.run(SMALL) == 1
    assert "not timed" in capsys.readouterr().out


def test_fail_above(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run([*SMALL, "--only-phd", "--chunk", "0", "--fail-above", "1e-9"]) == 1
    assert "--fail-above" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["atention"], "'attention'"),
        (["attention", "--heads", "3"], "multiple of --kv-heads=2"),
        (["attention", "--rounds", "0"], "--rounds=0"),
        (["attention", "--window", "0"], "phd_window=0"),
        (["attention", "--device", "abacus"], "abacus"),
    ],
)
def test_refusals(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        bench.run(argv)
    assert main(["bench", *argv]) == 2
    assert "error: " in capsys.readouterr().err


def test_help_lists_only_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench.BENCHES, "nothing_yet", "a measurement without a module")
    assert bench.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "attention" in printed and "nothing_yet" not in printed

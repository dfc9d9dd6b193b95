"""Sweep files: axes, labels, members, budgets, and what is said about bad ones."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.cli.main import main
from phd_megatron.errors import UserError
from phd_megatron.sweep import local
from phd_megatron.sweep.definition import Sweep, check_fields, read_sweep
from phd_megatron.sweep.local import LocalRun, unfinished
from phd_megatron.sweep.members import plan_members
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.process import member_command, member_environment
from phd_megatron.sweep.slurm import script
from phd_megatron.sweep.store import Status, Store, create, open_store

TRANSFORMER_FIELDS: dict[str, Any] = {"num_moe_experts": int, "moe_router_topk": int}

GRID = """
base:
  preset: tiny-dense
  model: {vocab_size: 257}
  data: {data_path: [DATA]}
  training: {eval_iters: 0, global_batch_size: 8, micro_batch_size: 4}
  tokens: 1.0e+5
grid:
  size:
    small: {num_layers: 2}
    large: {num_layers: 4, tokens: 2e5}
  norm_scheme: [pre, hybrid_star]
  seed: [1, 2]
baseline: {norm_scheme: pre}
"""


def read(tmp_path: Path, text: str) -> Sweep:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return read_sweep(path, TRANSFORMER_FIELDS)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    sweep = read(tmp_path, GRID)
    assert [member.name for member in sweep.members][:3] == [
        "small-pre-seed1",
        "small-pre-seed2",
        "small-hybrid_star-seed1",
    ]
    assert len(sweep.members) == 8
    assert sweep.members[-1].axes == {"size": "large", "norm_scheme": "hybrid_star", "seed": "seed2"}
    assert sweep.members[-1].values == {"num_layers": 4, "tokens": 2e5, "norm_scheme": "hybrid_star", "seed": 2}
    assert (sweep.baseline, sweep.size_axis) == ({"norm_scheme": "pre"}, "size")


def test_several_grids_are_put_together(tmp_path: Path) -> None:
    grids = """
grid:
  - {norm_scheme: [pre, hybrid], seed: [1]}
  - {norm_scheme: [pre], seed: [2, 3]}
"""
    sweep = read(tmp_path, GRID.partition("grid:")[0] + grids)
    assert [member.name for member in sweep.members] == ["pre-seed1", "hybrid-seed1", "pre-seed2", "pre-seed3"]
    assert "two members" in refusal(tmp_path, (GRID.partition("grid:")[0] + grids).replace("[2, 3]", "[1, 2]"))


def test_members_are_complete_and_share_their_data_order(tmp_path: Path) -> None:
    members, notes = plan_members(read(tmp_path, GRID), tmp_path / "out", {"lr": 1e-3}, check=False)
    small, large = members[0], members[-1]
    batch = 8 * 256
    assert small.samples * 256 == -(-100_000 // batch) * batch  # whole batches
    assert {member.config.data.data_horizon_samples for member in members} == {large.samples}
    assert {member.config.optimizer.lr for member in members} == {1e-3}
    assert small.config.training.train_iters is None  # the preset's, replaced by the tokens
    assert small.config.checkpoint.save == small.config.checkpoint.load
    assert large.plan.parameters > small.plan.parameters
    assert notes == []


def test_other_sequence_lengths_are_pointed_out(tmp_path: Path) -> None:
    text = GRID.replace("norm_scheme: [pre, hybrid_star]", "seq_length: [128, 256]").replace(
        "norm_scheme: pre", "seq_length: 128"
    )
    sweep = read(tmp_path, text)
    assert sweep.baseline == {"seq_length": "seq_length=128"}
    _, notes = plan_members(sweep, tmp_path / "out", check=False)
    assert "their batches differ" in notes[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("grid:", "gird:", ["unknown key 'gird'", "grid"]),
        ("norm_scheme: [pre, hybrid_star]", "norm_sheme: [pre]", ["unknown field 'norm_sheme'", "norm_scheme"]),
        ("seed: [1, 2]", "seed: [1, 1]", ["names a value twice"]),
        ("seed: [1, 2]", "seed: [1, x]", ["seed='x'", "an integer"]),
        ("seed: [1, 2]", "seed: 1", ["write a list"]),
        ("seed: [1, 2]", "save: [a, b]", ["save is set by the sweep"]),
        ("seed: [1, 2]", "num_layers: [2, 3]", ["num_layers is set by two axes"]),
        ("seed: [1, 2]", "seed: {a: {lr: 1.0}}", ["labelled settings need a name that is no field"]),
        ("seed: [1, 2]", "preset: [tiny-phd, tini]", ["'tini' is not known"]),
        (
            "baseline: {norm_scheme: pre}",
            "baseline: {norm_scheme: post}",
            ["'post' is not on", "hybrid_star"],
        ),
        ("baseline: {norm_scheme: pre}", "size_axis: width", ["size_axis='width' is no axis"]),
        ("baseline: {norm_scheme: pre}", "launcher: {rank: 2}", ["unknown option 'rank'", "ranks"]),
        ("baseline: {norm_scheme: pre}", "members: [{name: small-pre-seed1, lr: 1.0}]", ["two members are called"]),
        ("baseline: {norm_scheme: pre}", "members: [{name: a/b, lr: 1.0}]", ["cannot name a directory"]),
        ("  tokens: 1.0e+5", "  lr: 1.0", ["'lr'", "it belongs below `optimizer:`"]),
        ("  tokens: 1.0e+5", "  checkpoint: {save: x}", ["save is set by the sweep"]),
        ("  tokens: 1.0e+5", "  tokens: 0", ["no training budget"]),
    ],
)
def test_bad_files_are_refused_with_the_cure(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GRID
    message = refusal(tmp_path, GRID.replace(old, new))
    for word in words:
        assert word in message


def test_no_members_are_refused(tmp_path: Path) -> None:
    assert "has no members" in refusal(tmp_path, "base: {preset: tiny-dense}")


def test_a_member_that_cannot_be_is_named(tmp_path: Path) -> None:
    sweep = read(tmp_path, GRID.replace("large: {num_layers: 4,", "large: {num_attention_heads: 5,"))
    with pytest.raises(UserError, match=r"member large-pre-seed1: .*num_attention_heads=5"):
        plan_members(sweep, tmp_path / "out", check=False)


def test_a_flag_that_is_an_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--norm-scheme is also an axis"):
        plan_members(read(tmp_path, GRID), tmp_path / "out", {"norm_scheme": "post"}, check=False)
    with pytest.raises(UserError, match="exit_interval is set by the sweep"):
        check_fields({"exit_interval": 1}, "flags", {})


def test_a_misspelt_action_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from phd_megatron.cli.main import main

    assert main(["sweep", "stauts", "DIR"]) == 2
    assert "did you mean status?" in capsys.readouterr().err


def test_launcher_is_checked() -> None:
    with pytest.raises(UserError, match="parallel=0"):
        Launcher(parallel=0).check()
    with pytest.raises(UserError, match="nodes=2 with kind=local"):
        Launcher(nodes=2).check()


def test_commands_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "PHD_MEGATRON_THREADS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    alone = member_command(Path("run.yaml"), Launcher())
    assert alone[1:] == ["-m", "phd_megatron", "pretrain", "--config", "run.yaml"]
    assert "--nproc-per-node" in member_command(Path("run.yaml"), Launcher(ranks=2))
    several = member_command(Path("run.yaml"), Launcher(kind="slurm", ranks=8, nodes=2))
    assert several[0] == "srun"
    assert several[several.index("--nnodes") + 1] == "2"
    assert member_environment(Launcher(threads=3))["PHD_MEGATRON_THREADS"] == "3"
    assert member_environment(Launcher(), devices="1,2")["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "PHD_MEGATRON_THREADS" not in member_environment(Launcher())  # the user's own choice stands


def test_store_round_trip_and_what_is_left(tmp_path: Path) -> None:
    sweep = read(tmp_path, GRID)
    members, _ = plan_members(sweep, tmp_path / "out", check=False)
    created = create(tmp_path / "out", sweep, members)
    store = open_store(tmp_path / "out")
    assert store == created
    names = [entry.name for entry in store.entries]
    assert unfinished(store) == names
    states = ("finished", "diverged", "failed", "running", "stopped")
    for name, state in zip(names, states, strict=False):
        store.write_status(name, Status(state=state, starts=1))  # type: ignore[arg-type]
    assert unfinished(store) == names[2:]
    assert unfinished(store, retry_diverged=True) == names[1:]
    with pytest.raises(UserError, match="no member 'x'"):
        store.entry("x")
    with pytest.raises(UserError, match="is no sweep"):
        open_store(tmp_path)


def a_store(tmp_path: Path) -> Store:
    sweep = read(tmp_path, GRID)
    return create(tmp_path / "out", sweep, plan_members(sweep, tmp_path / "out", check=False)[0])


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    assert main(words) == 2, words
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(text in error for text in said), error


@pytest.mark.parametrize("name", ["../../outside", "..", ".", "", "/tmp/x", "a/b", "a\nb", "a\0b", 5, None, ["a"]])
def test_a_plan_names_no_place_outside_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: Any) -> None:
    store = a_store(tmp_path)
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_text())
    plan["entries"][0]["name"] = name
    path.write_text(json.dumps(plan))
    before = sorted(tmp_path.rglob("*"))
    for words in (["member", str(tmp_path / "out"), str(name) or "x"], ["status", str(tmp_path / "out")]):
        refused(capsys, ["sweep", *words], str(path), repr(name)[:20], "delete that")
    assert sorted(tmp_path.rglob("*")) == before
    plan["entries"][0]["name"] = store.entries[1].name
    path.write_text(json.dumps(plan))
    refused(capsys, ["sweep", "status", str(tmp_path / "out")], store.entries[1].name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("entries", {}), ("entries", [5]), ("title", 5), ("baseline", []), ("launcher", 1), ("size_axis", {}), ("x", 1)],
)
def test_a_plan_of_other_types_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    a_store(tmp_path)
    path = tmp_path / "out" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(capsys, ["sweep", "status", str(tmp_path / "out")], str(path), key if key != "entries" else "", "delete")


@pytest.mark.parametrize(
    "status",
    [
        *({"state": 5}, {"state": [1]}, {"state": "asleep"}, {"seconds": "x"}, {"seconds": math.nan}, {"starts": None}),
        *({"message": 5}, {"exit_code": "0"}, {"starts": True}, [1], 5, {"other": 1}),
    ],
)
def test_a_status_of_other_types_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], status: Any) -> None:
    store = a_store(tmp_path)
    path = store.home(store.entries[0].name) / "status.json"
    path.write_text(json.dumps(status))
    refused(capsys, ["sweep", "status", str(tmp_path / "out")], str(path), "delete it to start the member again")


def test_a_status_says_why_a_member_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_store(tmp_path)
    first, second, *_ = (entry.name for entry in store.entries)
    said = {"state": "failed", "message": "no room left", "exit_code": 2, "seconds": 1.0, "starts": 1}
    (store.home(first) / "status.json").write_text(json.dumps(said))
    assert main(["sweep", "status", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"{first}: no room left" in shown and not any(line.startswith(f"{second}:") for line in shown)


def test_a_metrics_file_of_other_types_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_store(tmp_path)
    name = store.entries[0].name
    line = {"iteration": [1], "lm_loss": "x", "tokens_per_second": math.nan, "consumed_samples": {}}
    (store.home(name) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["sweep", "status", str(tmp_path / "out")]) == 0
    assert name in capsys.readouterr().out


def test_slurm_script_names_members_and_gpus(tmp_path: Path) -> None:
    sweep = read(tmp_path, GRID)
    store = create(tmp_path / "out", sweep, plan_members(sweep, tmp_path / "out", check=False)[0])
    text = script(store, ["a", "b"], Launcher(kind="slurm", ranks=4, parallel=1, slurm_options=["--partition=p"]))
    for line in ("--array=0-1%1", "--gpus-per-node=4", "--partition=p", "--signal=B:TERM@300"):
        assert f"#SBATCH {line}" in text
    assert "    a\n    b\n" in text


def test_a_member_that_cannot_start_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read(tmp_path, GRID)
    store = create(tmp_path / "out", sweep, plan_members(sweep, tmp_path / "out", check=False)[0])
    name = store.entries[0].name
    (store.home(name) / "log.txt").mkdir()
    statuses = LocalRun(store, Launcher(), device="cpu").run([name])
    assert statuses[name].state == "failed"
    assert "log.txt" in statuses[name].message
    assert f"{name}: failed" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("examples/sweeps/*.yaml")), ids=lambda p: p.stem)
def test_example_sweeps_plan(path: Path, tmp_path: Path) -> None:
    from phd_megatron.model.transformer_config import transformer_field_types

    sweep = read_sweep(path, transformer_field_types())
    flags = {"data_path": ["DATA"], "vocab_size": 257} if "h100" not in path.stem else {"data_path": ["DATA"]}
    members, _ = plan_members(sweep, tmp_path, flags, check=False)
    assert sweep.baseline
    assert len({member.samples for member in members}) >= 1


def test_members_have_devices_of_their_own_or_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "choose_device", lambda name: ("cuda", "for this test"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.device_slots(Launcher(parallel=2, ranks=2), "cuda") == ["4,5", "6,7"]
    assert local.device_slots(Launcher(parallel=3, members_per_device=2), "auto") == ["4", "4", "5"]
    assert local.device_slots(Launcher(parallel=3), "cpu") == [None, None, None]
    with pytest.raises(UserError, match="5 members at once of 1 ranks, 1 to a device, need 5 CUDA devices"):
        local.device_slots(Launcher(parallel=5), "cuda")


def test_a_member_that_cannot_be_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path)
    path = store.home(store.entries[0].name) / "run.yaml"

    def broken(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(
        UserError, match=rf"{path} cannot be read \(Input/output error\); give the sweep another --output"
    ):
        a_store(tmp_path)

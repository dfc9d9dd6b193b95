"""The queue of trained models, which of them may start, and what a record says of its sources."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import evidence.queue
import pytest
import yaml
from evidence.piece import DONE, open_piece
from evidence.queue import Queue, read_queue
from evidence.rates import choose_rates, write_rates
from evidence.schedule import Load, Speed, choose, end_times, fits
from evidence.source import find_commit, sources, tree_hash
from evidence.work import Work

from phd_megatron.errors import UserError
from phd_megatron.model.transformer_config import transformer_field_types

ROOT = Path(__file__).resolve().parents[2]
NO_MUON = "megatron-core 0.19 and emerging-optimizers"
QUEUE = ROOT / "docs/results/trained/queue.yaml"

BASE = {
    "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 512, "seq_length": 64},
    "training": {"micro_batch_size": 4, "global_batch_size": 4},
}
VARIANTS = {"pre": {"norm_scheme": "pre"}, "star": {"norm_scheme": "hybrid_star"}, "other": {"norm_scheme": "post"}}
ANCHOR = {
    "name": "anchor",
    "item": 0,
    "about": "a",
    "texts": ["code"],
    "tokens": 1e4,
    "variants": ["pre"],
    "seeds": [1],
}
RATES = {
    **ANCHOR,
    **{"name": "rates", "variants": ["pre", "star"], "seeds": [9, 8]},
    "axes": {"lr": [1e-3, 2e-3]},
}
HEAD = {**ANCHOR, "name": "head", "texts": ["code", "prose"], "variants": ["pre", "star"], "rates": "chosen"}


def queue(tmp_path: Path, *sections: dict[str, object], rates: object = None, **changes: object) -> Queue:
    data = {"base": BASE, "variants": VARIANTS, "anchor": "anchor", "sections": [ANCHOR, *sections], **changes}
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(data))
    if rates is not None:
        (tmp_path / "rates.yaml").write_text(yaml.safe_dump(rates))
    return read_queue(tmp_path / "queue.yaml", {})


# ---------------------------------------------------------------- the queue


def test_experiments_come_in_order_and_seed_by_seed(tmp_path: Path) -> None:
    found = queue(tmp_path, RATES)
    assert [experiment.name for experiment in found.experiments] == [
        f"code-rates-{variant}-lr={rate}-seed{seed}"
        for seed in (9, 8)
        for variant in ("pre", "star")
        for rate in ("0.001", "0.002")
    ]
    assert [experiment.name for experiment in found.anchors("code")] == ["code-anchor-pre-seed1"]
    assert not any(experiment.waits_for for experiment in found.experiments)


def test_comparisons_wait_for_their_rates(tmp_path: Path) -> None:
    found = queue(tmp_path, HEAD, rates={"code": {"pre": {"lr": 2e-3, "lr_warmup_tokens": 1000}}})
    waiting = {experiment.name: experiment.waits_for for experiment in found.experiments}
    assert waiting == {
        "code-head-pre-seed1": None,
        "code-head-star-seed1": "a rate of star on code in rates.yaml",
        "prose-head-pre-seed1": "a rate of pre on prose in rates.yaml",
        "prose-head-star-seed1": "a rate of star on prose in rates.yaml",
    }
    members = found.plan(found.sections[1], "code", tmp_path, {"data_path": ["x"]})
    assert [(m.name, m.config.optimizer.lr, m.config.optimizer.lr_warmup_tokens) for m in members] == [
        ("pre-seed1", 2e-3, 1000)
    ]
    found = queue(tmp_path, HEAD, rates={"code": {"pre": {"lr": 4e-3}}}, rates_like={"star": "pre"}, variants=VARIANTS)
    members = found.plan(found.sections[1], "code", tmp_path, {"data_path": ["x"]})
    assert [(m.name, m.config.optimizer.lr) for m in members] == [("pre-seed1", 4e-3), ("star-seed1", 4e-3)]


def run_of(section: str, variant: str, lr: float, loss: float, state: str = "finished") -> dict[str, object]:
    """A record as far as rates are chosen from it."""
    return {
        **{"name": f"code-{section}-{variant}-lr={lr:g}-seed9", "state": state},
        **{"config": {"lr": lr, "lr_warmup_tokens": 10 if section == "short" else 100}},
        **{"steps": {"validation_loss": [9.0, None, loss, None]}},
    }


def test_a_rate_is_the_best_of_a_whole_grid_and_not_at_its_edge(tmp_path: Path) -> None:
    grid = {**RATES, "seeds": [9], "axes": {"lr": [1e-3, 2e-3, 4e-3]}}
    found = queue(tmp_path, grid, {**grid, "name": "short"}, HEAD, rates={"prose": {"pre": {"lr": 7.0}}})
    assert {run_of("rates", "pre", 1e-3, 0)["name"], run_of("short", "star", 4e-3, 0)["name"]} < {
        experiment.name for experiment in found.experiments
    }

    def chosen(*records: dict[str, object]) -> dict[str, object]:
        rates = choose_rates(found, records)
        assert rates.pop("prose") == {"pre": {"lr": 7.0}}
        return rates.get("code", {})

    best = {"lr": 2e-3, "lr_warmup_tokens": 100}
    pre = [run_of("rates", "pre", lr, loss) for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 2.5))]
    assert chosen(*pre) == {"pre": best}
    assert chosen(*pre[:2]) == chosen(*pre[1:]) == {}, "the grid is not whole"
    edge = [run_of("rates", "star", lr, loss) for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 1.9))]
    assert chosen(*pre, *edge) == {"pre": best}
    # what diverged is a neighbour, and never the best
    assert chosen(*edge[:2], run_of("rates", "star", 4e-3, 1.0, "diverged")) == {"star": best}
    # another warm-up with a better run, in a grid that is not whole and in one that is
    short = [run_of("short", "pre", lr, loss) for lr, loss in ((1e-3, 1.6), (2e-3, 1.5), (4e-3, 1.7))]
    assert chosen(*pre, *short[:2]) == {"pre": best}
    assert chosen(*pre, *short) == {"pre": {"lr": 2e-3, "lr_warmup_tokens": 10}}
    # what has been compared, and what stands in the file, stays
    compared = {**run_of("rates", "pre", 1e-3, 2.2), "name": "code-head-pre-seed1"}
    assert chosen(*pre, compared) == {"pre": {"lr": 1e-3, "lr_warmup_tokens": 100}}
    write_rates(found, choose_rates(found, pre))
    again = read_queue(tmp_path / "queue.yaml", {})
    assert choose_rates(again, [*pre, *short]) == {"prose": {"pre": {"lr": 7.0}}, "code": {"pre": best}}


def test_a_variant_that_this_version_does_not_have_blocks_itself_alone(tmp_path: Path) -> None:
    variants = {**VARIANTS, "other": {"norm_scheme": "pre", "no_such_field": 1}}
    found = queue(tmp_path, {**HEAD, "rates": "own", "variants": ["pre", "other"]}, variants=variants)
    assert list(found.blocked) == ["other"]
    assert "no_such_field" in found.blocked["other"]
    assert [experiment.name for experiment in found.experiments] == ["code-head-pre-seed1", "prose-head-pre-seed1"]


def test_what_continues_waits_for_its_start_in_the_same_piece(tmp_path: Path) -> None:
    start = {**HEAD, "name": "start", "texts": ["code"], "variants": ["pre"], "seeds": [1, 2], "rates": "own"}
    more = {**start, "name": "more", "variants": ["pre", "star"], "continues": "start pre"}
    found = queue(tmp_path, start, more)
    starts = {e.name: e.start.name for e in found.experiments if e.start is not None}
    assert starts == {
        f"code-more-{variant}-seed{seed}": f"code-start-pre-seed{seed}"
        for seed in (1, 2)
        for variant in ("pre", "star")
    }
    piece = open_piece({"PHD_EVIDENCE_WORK": str(tmp_path / "work"), "PHD_EVIDENCE_ANCHOR": "0"})
    piece = replace(piece, queue=found.path)
    work = Work(piece, found, {"code": tmp_path})

    def names() -> list[str]:
        return [experiment.name.removeprefix("code-") for experiment in work.waiting(set())]

    def done(folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"code-{name}.json").write_text("{}")

    assert names() == ["start-pre-seed1", "start-pre-seed2"]
    done(piece.work / DONE, "start-pre-seed1")
    assert names() == ["start-pre-seed2", "more-pre-seed1", "more-star-seed1"]
    member = work.prepare(found.experiments[2]).member
    assert member.config.checkpoint.finetune
    assert member.config.checkpoint.load == str(piece.work / "runs/code-start/members/pre-seed1/checkpoints")
    # An earlier piece's checkpoint is gone: the start is trained once more, as long as something continues it.
    done(found.runs, "start-pre-seed2")
    assert "start-pre-seed2" in names()
    for variant in ("pre", "star"):
        done(found.runs, f"more-{variant}-seed2")
    assert names() == ["more-pre-seed1", "more-star-seed1"]
    with pytest.raises(UserError, match="no SECTION VARIANT with seed1"):
        _ = queue(tmp_path, start, {**more, "continues": "start star"}).experiments


@pytest.mark.parametrize(
    ("sections", "changes", "part"),
    [
        ([], {"sectoins": []}, "did you mean sections"),
        ([{**HEAD, "variants": ["pree"]}], {}, "no variant 'pree'"),
        ([HEAD, HEAD], {}, "one name"),
        ([], {"anchor": "none"}, "no section"),
        ([{**HEAD, "seed": 3}], {}, "unknown option 'seed'"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, sections: list, changes: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        queue(tmp_path, *sections, **changes)


@pytest.mark.parametrize("available", [True, False])
def test_the_repositorys_queue_can_be_planned_to_its_end(
    available: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence.queue, "_has_muon", lambda: available)
    found = read_queue(QUEUE, transformer_field_types())
    assert not found.blocked
    rates = {variant: {"lr": 1e-3, "lr_warmup_tokens": 6_000_000} for variant in found.variants}
    found = replace(found, rates={text: rates for text in ("code", "prose")})
    names = [experiment.name for experiment in found.experiments]
    assert len(set(names)) == len(names) > 100
    waiting = {(e.section.name, e.waits_for) for e in found.experiments if e.waits_for}
    assert waiting == (set() if available else {("rates-muon", NO_MUON), ("muon", NO_MUON)})
    for section in found.sections if available else ():
        for member in found.plan(section, section.texts[0], tmp_path, {"data_path": ["x"]}):
            assert member.config.data.data_horizon_samples == section.fields.get("data_horizon_samples", 117_248)
            if "size" not in section.axes:
                assert member.iterations * 65_536 == pytest.approx(section.tokens, rel=3e-3)
        for pair in section.compare:
            assert {name.strip() for name in pair.split(":")} <= set(found.variants)
    tuned = {seed for section in found.sections if section.is_grid for seed in section.seeds}
    compared = {seed for section in found.sections if not section.is_grid for seed in section.seeds}
    assert tuned and compared and not tuned & compared


# ---------------------------------------------------------------- time and room


def slow_end_times(work: list[float], speed: Speed, step: float) -> list[float]:
    """The definition, in small steps of time."""
    left, ends, now = list(work), [0.0] * len(work), 0.0
    while any(value > 0 for value in left):
        at_work = [index for index, value in enumerate(left) if value > 0]
        now += step
        for index in at_work:
            left[index] -= step * speed.flops / max(len(at_work), speed.filled_by)
            if left[index] <= 0:
                ends[index] = now
    return ends


@pytest.mark.parametrize("seed", range(4))
def test_end_times_against_small_steps(seed: int) -> None:
    draw = random.Random(seed)
    work = [draw.uniform(0.1, 5.0) for _ in range(draw.randint(1, 6))]
    speed = Speed(flops=2.0, filled_by=3)
    assert end_times(work, speed) == pytest.approx(slow_end_times(work, speed, 1e-3), abs=2e-2)


def test_none_is_started_that_makes_one_not_end_in_time() -> None:
    speed = Speed(flops=1.0, filled_by=2, start_seconds=10, margin=1.0)
    assert end_times([10.0], speed) == [20.0]  # alone it has half of the GPU
    assert fits([], Load(10.0), 30.0, speed)
    assert not fits([], Load(10.0), 29.9, speed)
    assert not fits([Load(10.0)], Load(10.0), 29.9, speed)
    assert fits([Load(10.0)], Load(10.0), 30.0, speed)  # together 20 of work at 1 a second, and the start
    assert not fits([Load(19.0)], Load(2.0), 30.0, speed)  # the candidate would end, but not the other
    assert choose([Load(5.0)], [Load(20.0), Load(2.0), Load(1.0)], 30.0, speed) == 1
    assert choose([Load(5.0)], [Load(20.0)], 30.0, speed) is None
    assert not fits([Load(1.0, 60)], Load(1.0, 50), 1e9, replace(speed, memory=100))


def test_speed_is_what_runs_at_work_have_shown() -> None:
    speed = Speed(flops=10.0, filled_by=4.0)
    assert speed.seen([3.0, 3.0, 3.0, 3.0], False).flops == 12.0
    assert speed.seen([3.0, 3.0], True).flops == 6.0  # no third can be at work, so this is all there is
    assert speed.seen([2.5], False) == speed  # as assumed
    assert speed.seen([1.0], False) == speed  # it may be starting
    assert speed.seen([5.0], False) == replace(speed, filled_by=2.0)  # two such would be all
    assert speed.seen([20.0], False) == replace(speed, flops=20.0, filled_by=1.0)


def test_a_piece_is_several_commands(tmp_path: Path) -> None:
    environment = {"PHD_EVIDENCE_WORK": str(tmp_path), "PHD_EVIDENCE_SECONDS": "100", "PHD_EVIDENCE_PIECE": "300"}
    first = open_piece(environment)
    assert first.piece_end - first.command_end == pytest.approx(200, abs=1)
    (tmp_path / DONE).mkdir()
    (tmp_path / DONE / "x.json").write_text("{}")
    (tmp_path / "piece.json").write_text((tmp_path / "piece.json").read_text().replace(first.name, "mine"))
    second = open_piece(environment)
    assert (second.name, second.piece_end) == ("mine", pytest.approx(first.piece_end, abs=1e-3))
    assert (tmp_path / DONE / "x.json").exists()
    (tmp_path / "piece.json").write_text('{"name": "mine", "end": 1.0}')  # long over
    assert open_piece(environment).name != "mine"
    assert not (tmp_path / DONE / "x.json").exists()
    with pytest.raises(UserError, match="PHD_EVIDENCE_SECONDS='soon'"):
        open_piece({**environment, "PHD_EVIDENCE_SECONDS": "soon"})


# ---------------------------------------------------------------- sources


def git(root: Path, *words: str) -> str:
    identity = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": "e", "GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "e"}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null"}
    return subprocess.run(
        ["git", *words], cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_sources_have_the_names_that_git_gives_them(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    for name in ("phd_megatron/a.py", "phd_megatron/a/b.py", "phd_megatron/a-b/c.txt", "kernels/k.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    first = git(tmp_path, "rev-parse", "HEAD")
    cache = tmp_path / "phd_megatron/a/__pycache__"
    cache.mkdir()
    (cache / "b.pyc").write_bytes(b"x")
    (tmp_path / "kernels/empty").mkdir()
    assert tree_hash(tmp_path / "phd_megatron") == git(tmp_path, "rev-parse", "HEAD:phd_megatron")
    before = sources(tmp_path)
    (tmp_path / "kernels/k.py").write_text("changed")
    after = sources(tmp_path)
    assert find_commit(tmp_path, after) is None
    git(tmp_path, "commit", "-qam", "second")
    assert find_commit(tmp_path, after) == git(tmp_path, "rev-parse", "HEAD")
    assert find_commit(tmp_path, before) == first

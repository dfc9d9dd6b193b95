"""What the report of the trained models says, from records written beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from evidence.fold import fold
from evidence.queue import Queue, read_queue
from evidence.record import COLUMNS, dump
from evidence.report import write_report
from evidence.results import lasting, read_results

from phd_megatron.errors import UserError
from phd_megatron.sweep.statistics import Group

BASE = {"model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 512, "seq_length": 64}}
SECTION = {"item": 1, "texts": ["code"], "tokens": 1200.0, "variants": ["pre", "star"], "seeds": [1, 2, 3]}
DATA = {
    "base": BASE,
    "variants": {name: {"norm_scheme": "pre"} for name in ("pre", "star", "other")},
    "anchor": "anchor",
    "sections": [
        {**SECTION, "name": "anchor", "about": "The same run", "variants": ["pre"], "seeds": [1]},
        {**SECTION, "name": "rates", "about": "Rates", "seeds": [9], "axes": {"lr": [1e-3, 2e-3, 4e-3]}},
        {**SECTION, "name": "head", "about": "Both", "rates": "chosen", "baseline": "pre"},
        {**SECTION, "name": "more", "about": "More", "rates": "chosen", "variants": ["star"], "texts": ["prose"]},
        {
            **{**SECTION, "name": "controls", "about": "Controls", "rates": "chosen", "variants": ["other"]},
            "compare": ["other : star", "other : pre"],
        },
        {
            **{**SECTION, "name": "sizes", "about": "Sizes", "rates": "chosen", "seeds": [1], "baseline": "pre"},
            "axes": {"size": {name: {"tokens": 1200.0} for name in ("s", "m", "l")}},
        },
    ],
}


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(DATA))
    return read_queue(tmp_path / "queue.yaml", {})


def record(section: str, variant: str, seed: int, validation: list[float], **changes: Any) -> dict[str, Any]:
    """Twelve steps of 100 tokens; validations are spread over the end of the run, 200 tokens apart."""
    tokens = [100 * step for step in range(1, 13)]
    places = {12 - 2 * back: loss for back, loss in enumerate(reversed(validation))}
    steps: dict[str, list[Any]] = {column: [1.0] * 12 for column in COLUMNS}
    steps |= {"iteration": list(range(1, 13)), "consumed_samples": tokens, "consumed_tokens": tokens}
    steps |= {"consumed_flops": [10.0 * t for t in tokens], "lm_loss": [3.0 - step / 10 for step in range(12)]}
    steps["validation_loss"] = [places.get(step) for step in range(1, 13)]
    found = {
        "name": f"code-{section}-{variant}-seed{seed}",
        **{
            "section": section,
            "text": "code",
            "axes": {"variant": variant, "seed": f"seed{seed}"},
            "state": "finished",
        },
        **{"piece": "p1", "device": "none", "sources": {}, "commit": "0123456789", "config": {"lr": 1e-3}},
        "text_made_of": {"tokens": {"train": 600}, "manifest_sha256": "ab"},
        "plan": {"tokens": 1200, "iterations": 12, "samples": 1200, "seq_length": 64},
        "evaluations": {"valid_folders": {"loss": validation[-1] + 0.5}},
        "steps": steps,
    }
    return {**found, **changes}


def write(queue: Queue, *records: dict[str, Any]) -> None:
    for entry in records:
        path = queue.runs / f"{entry['name']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump(entry))


def pairs(early: float, end: float, noise: float = 0.001) -> list[dict[str, Any]]:
    """Both variants over three seeds; ``star`` lower by ``early`` at two thirds and by ``end`` at the end."""
    found = []
    for seed in (1, 2, 3):
        shift = noise * (seed - 2)
        found.append(record("head", "pre", seed, [2.5 + shift, 2.2, 2.0 + shift]))
        found.append(record("head", "star", seed, [2.5 - early, 2.1, 2.0 - end]))
    return found


def compared(queue: Queue) -> tuple[Group, Group]:
    (pair,) = read_results(queue).pairs(queue.sections[2], "code")
    return pair


def test_a_baseline_may_be_of_another_section_with_the_same_budget(queue: Queue, tmp_path: Path) -> None:
    write(queue, *pairs(early=0.1, end=0.1))
    write(queue, *(record("controls", "other", seed, [2.5, 2.2, 1.95]) for seed in (1, 2, 3)))
    found = list(read_results(queue).pairs(queue.sections[4], "code"))
    assert [(group.name, baseline.name) for group, baseline in found] == [("other", "star"), ("other", "pre")]
    lines = write_report(queue, tmp_path).read_text().splitlines()
    assert any(line.startswith("| code, other - star | 3 | +0.0500") for line in lines)
    assert any(line.startswith("| code, other - pre | 3 | -0.0500") for line in lines)


def test_sizes_are_compared_each_and_fitted_together(queue: Queue, tmp_path: Path) -> None:
    for name, size in (("s", 1e6), ("m", 4e6), ("l", 16e6)):
        for variant, factor in (("pre", 4.0), ("star", 3.8)):
            entry = record("sizes", variant, 1, [factor * (size / 1e6) ** -0.1])
            entry["axes"] |= {"size": name}
            entry["name"] += f"-{name}"
            entry["plan"]["non_embedding_parameters"] = size
            write(queue, entry)
    text = write_report(queue, tmp_path).read_text()
    assert "| code, star-m - pre | 1 |" in text
    law = next(line for line in text.splitlines() if line.startswith("| code, star | A N^-alpha"))
    assert law.split("|")[5].split()[0] == "0.1"
    assert (tmp_path / "scaling_sizes.svg").exists()


def test_an_empty_queue_says_that_nothing_is_known(queue: Queue, tmp_path: Path) -> None:
    text = write_report(queue, tmp_path).read_text()
    assert "No piece has been run" in text
    assert "No grid has been run" in text
    assert "Nothing is known yet of: rates (code); both (code); more (prose); controls (code); sizes (code)." in text


def test_differences_are_paired_and_say_whether_they_last(queue: Queue, tmp_path: Path) -> None:
    write(queue, *pairs(early=0.10, end=0.09))
    (tmp_path / "findings.md").write_text("What a person found.\n")
    text = write_report(queue, tmp_path).read_text()
    assert text.startswith("# Trained models\n\nWhat a person found.\n")
    # mean of 0.09 -+ 0.001; Student's t of two degrees of freedom is 4.3027, over the root of three
    half = 4.3027 * 0.001 / 3**0.5
    line = next(line for line in text.splitlines() if "star - pre" in line)
    assert f"-0.0900 ({-0.09 - half:+.4f} to {-0.09 + half:+.4f})" in line
    assert "| lower |" in line
    assert "| -0.1000 |" in line
    assert "yes: 90% of it is left" in line
    assert (tmp_path / "losses_head.svg").exists()
    assert "(losses_head.svg)" in text
    assert "| code, star (head) | 2.00 | 1.9000 | 1.9100 | 2.4100 |" in text
    assert "| 1. Both | code | 0.0012 M | 6 of 6 |" in text


def test_what_fades_and_what_was_never_there(queue: Queue) -> None:
    write(queue, *pairs(early=0.10, end=0.02))
    assert lasting(*compared(queue))[1] == "no: 20% of it is left"
    write(queue, *pairs(early=0.0001, end=0.0001))
    assert lasting(*compared(queue))[1] == "nothing is separated at two thirds"
    write(queue, *(entry | {"plan": {**entry["plan"], "tokens": 2400}} for entry in pairs(early=0.1, end=0.1)))
    assert lasting(*compared(queue)) == (None, "not known")


def test_one_seed_states_nothing(queue: Queue, tmp_path: Path) -> None:
    write(queue, *pairs(early=0.1, end=0.1)[:2])
    line = next(line for line in write_report(queue, tmp_path).read_text().splitlines() if "star - pre" in line)
    assert "one seed: no statement" in line


def test_grids_show_the_best_its_edge_and_what_diverged(queue: Queue, tmp_path: Path) -> None:
    def at(rate: float, variant: str, loss: float, **changes: Any) -> dict[str, Any]:
        name = f"code-rates-{variant}-lr={rate:g}-seed9"
        config = {"lr": rate, "lr_warmup_tokens": 24_000_000}
        return record("rates", variant, 9, [loss], config=config, **{"name": name, **changes})

    write(queue, at(1e-3, "pre", 2.2), at(2e-3, "pre", 2.1), at(4e-3, "pre", 2.3))
    write(queue, at(1e-3, "star", 2.0), at(2e-3, "star", 2.05), at(4e-3, "star", 9.0, state="diverged"))
    text = write_report(queue, tmp_path).read_text()
    assert "| code, pre, warm-up 24 M | 2.2000 | **2.1000** | 2.3000 |" in text
    assert "| code, star, warm-up 24 M | **2.0000** | 2.0500 | diverged |" in text
    edge = next(line for line in text.splitlines() if line.startswith("At the edge"))
    assert "star on code, warm-up 24 M (0.001)" in edge
    assert "pre" not in edge.removesuffix(".")


def test_anchors_have_a_file_for_each_piece(queue: Queue, tmp_path: Path) -> None:
    for piece, loss in (("p1", 2.00), ("p2", 2.02)):
        content = {"piece": piece, "records": [record("anchor", "pre", 1, [loss], piece=piece)]}
        (tmp_path / "evidence.json").write_text(json.dumps(content))
        list(fold(tmp_path / "evidence.json", queue.runs, tmp_path))
    assert sorted(path.name for path in queue.runs.iterdir()) == [
        f"code-anchor-pre-seed1-{piece}.json" for piece in ("p1", "p2")
    ]
    text = write_report(queue, tmp_path).read_text()
    assert f"standard deviation of 2 |  | {0.02 / 2**0.5:.4f} |" in text


def test_a_run_is_not_replaced_by_one_of_another_piece(queue: Queue, tmp_path: Path) -> None:
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps({"piece": "p1", "records": [record("head", "pre", 1, [2.0])]}))
    list(fold(file, queue.runs, tmp_path))
    assert list(fold(file, queue.runs, tmp_path))  # the same one again is no mistake
    file.write_text(json.dumps({"piece": "p2", "records": [record("head", "pre", 1, [1.0], piece="p2")]}))
    assert "that of p2 is left out" in "".join(fold(file, queue.runs, tmp_path))
    assert read_results(queue).trained[0].final == 2.0
    file.write_text("[]")
    with pytest.raises(UserError, match=r"is no evidence\.json"):
        list(fold(file, queue.runs, tmp_path))


def test_files_that_are_no_records_are_named(queue: Queue) -> None:
    queue.runs.mkdir()
    (queue.runs / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine\.json is no record"):
        read_results(queue)

"""``phd-megatron evaluate --copies``: the last copy's loss is the model's, the first one's that of vanilla.

Tolerance (all cases): 1e-6 relative in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.cli.evaluate import run
from phd_megatron.errors import UserError

from .conftest import TINY_MODEL, flags

pytestmark = pytest.mark.timeout(600)

TOLERANCE = 1e-6
MODELS: dict[str, dict[str, object]] = {
    "dense": {"norm-scheme": "hybrid_star", "phd-repeat": 3, "phd-window": 5, "phd-chunk": 6},
    "experts": {
        **{"norm-scheme": "pre", "phd-repeat": 2, "num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24},
        **{"moe-token-dispatcher-type": "alltoall"},
    },
}
LAYOUTS = {"dense": ("tp2", "tp2+sp", "pp2", "pp2+vpp2", "cp2", "dp2"), "experts": ("ep2", "pp2+ep1")}
ALONE = "one process"
LONE_HEAD = "lone head"
CASES = [(model, layout) for model in MODELS for layout in (ALONE, *LAYOUTS[model])] + [("dense", LONE_HEAD)]


def words(checkpoint: Path, output: Path, *more: str) -> list[str]:
    """Nine samples, so that two ranks need one without loss."""
    fixed = ("--device", "cpu", "--num-samples", "9", "--micro-batch-size", "2", "--no-verify-checkpoint")
    return ["--checkpoint", str(checkpoint), "--json", str(output), *fixed, *more]


def changed(save: Path, target: Path, old: str, new: str) -> Path:
    """The checkpoint in ``save`` with one line of its configuration written otherwise."""
    shutil.copytree(save, target)
    (path,) = target.glob("iter_*/run_config.yaml")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return target


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>`` trained on two ranks, ``<model>-vanilla`` the same parameters without PHD, and ``<case>.json``."""
    root = tmp_path_factory.mktemp("copies")
    train = []
    for name, model in MODELS.items():
        options = {
            **{"data-path": documents, "split": "90,10,0", "device": "cpu", "micro-batch-size": 2, "lr": 1e-2},
            **{"global-batch-size": 8, "train-iters": 3, "eval-iters": 0, "save": root / name},
        }
        train.append(["pretrain", *flags({**TINY_MODEL, **model, **options})])
    run_cases(2, train)
    alone, spread = [], []
    for name, model in MODELS.items():
        repeat = f"phd_repeat: {model['phd-repeat']}\n"
        vanilla = changed(root / name, root / f"{name}-vanilla", repeat, "phd_repeat: 1\n")
        alone.append(["evaluate", *words(vanilla, root / f"{name}-vanilla.json")])
        alone.append(["evaluate", *words(vanilla, root / f"{name}-vanilla--copies.json", "--copies")])
        for layout in (ALONE, *LAYOUTS[name]):
            where = () if layout == ALONE else ("--layout", layout)
            for kind in ("", "--copies"):
                output = root / f"{name}-{layout}{kind}.json"
                case = ["evaluate", *words(root / name, output, *where, *filter(None, [kind]))]
                (alone if layout == ALONE else spread).append(case)
    whole = changed(
        root / "dense", root / "dense-whole", "phd_last_layer_pruning: true", "phd_last_layer_pruning: false"
    )
    alone.append(["evaluate", *words(whole, root / "dense-whole.json", "--copies")])
    (root / "printed.txt").write_text(run_cases(1, alone))
    run_cases(2, spread)
    program = Path(__file__).parent / "evaluate_lone_head.py"
    for kind in ("", "--copies"):
        output = root / f"dense-{LONE_HEAD}{kind}.json"
        torchrun(2, program, *words(root / "dense", output, *filter(None, [kind])))
    return root


def result(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_last_copy_is_the_model_and_the_first_is_vanilla(root: Path, model: str, layout: str) -> None:
    ordinary, copies = result(root, f"{model}-{layout}"), result(root, f"{model}-{layout}--copies")
    assert "diagnostic_copy_losses" not in ordinary
    assert {name: copies[name] for name in ("tokens", "samples")} == {"tokens": 9 * 24, "samples": 9}
    losses = copies["diagnostic_copy_losses"]
    assert len(losses) == MODELS[model]["phd-repeat"]
    assert losses[-1] == copies["loss"] == pytest.approx(ordinary["loss"], rel=TOLERANCE)
    assert losses[0] == pytest.approx(result(root, f"{model}-vanilla")["loss"], rel=TOLERANCE)
    assert losses == pytest.approx(result(root, f"{model}-{ALONE}--copies")["diagnostic_copy_losses"], rel=TOLERANCE)
    assert len({round(loss, 4) for loss in losses}) == len(losses), "copies differ, or nothing is compared"


def test_a_model_without_pruning_gives_the_same(root: Path) -> None:
    expected = result(root, f"dense-{ALONE}--copies")["diagnostic_copy_losses"]
    assert result(root, "dense-whole")["diagnostic_copy_losses"] == pytest.approx(expected, rel=TOLERANCE)


def test_what_is_printed(root: Path) -> None:
    """A line a copy; of a model without PHD one."""
    printed = (root / "printed.txt").read_text()
    for name, count in ((f"dense-{ALONE}--copies", 3), ("dense-vanilla--copies", 1)):
        losses = result(root, name)["diagnostic_copy_losses"]
        assert len(losses) == count
        for number, loss in enumerate(losses, 1):
            meaning = "the model's loss" if number == count else "not trained to predict"
            place = f"diagnostic | copy {number} of {count} through the final norm and head"
            assert f"{place} | loss {loss:.6f} ({meaning})\n" in printed


def test_an_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--copies with .*last copy alone.*give the Megatron checkpoint"):
        run(["--checkpoint", str(tmp_path), "--copies"])

"""``phd-megatron evaluate``: one number for a data set, from a checkpoint in any layout and from its export."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(600)

#: float32, summed in another order
TOLERANCE = 1e-5
STEPS, VALIDATED = 3, 8
MODELS: dict[str, dict[str, object]] = {
    "dense": {"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 6},
    "experts": {
        **{"norm-scheme": "pre", "phd-repeat": 2, "num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24},
        **{"moe-token-dispatcher-type": "alltoall"},
    },
    "native": {"norm-scheme": "pre"},
    "told-apart": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 3, "phd-window": 5, "phd-chunk": 6},
        **{"phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
    },
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    **{"dense": ("tp2+sp", "cp2", "pp2+vpp2", "dp2"), "experts": ("ep2",), "native": (), "told-apart": ("cp2",)}
}


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>/save``, trained on two ranks, and ``<model>-<layout>.json`` of its evaluations."""
    root = tmp_path_factory.mktemp("evaluate")
    train, evaluate = [], []
    for name, model in MODELS.items():
        options = {
            **{"data-path": documents, "split": "90,10,0", "device": "cpu", "micro-batch-size": 2, "lr": 1e-2},
            **{"global-batch-size": VALIDATED, "train-iters": STEPS, "eval-iters": 1, "save": root / name / "save"},
            "metrics-file": root / f"{name}.jsonl",
        }
        options |= {"tensor-model-parallel-size": 2, "sequence-parallel": True}
        train.append(["pretrain", *flags({**TINY_MODEL, **model, **options})])
        evaluate += [
            [
                *("evaluate", "--checkpoint", str(root / name / "save"), "--layout", layout, "--device", "cpu"),
                *("--json", str(root / f"{name}-{layout}.json")),
            ]
            for layout in LAYOUTS[name]
        ]
    run_cases(2, train)
    run_cases(2, evaluate)
    return root


def evaluate(*words: object) -> dict[str, Any]:
    path = Path(str(words[words.index("--json") + 1]))
    done = run_program("evaluate", "--device", "cpu", *words)
    assert done.returncode == 0, done.stdout
    result: dict[str, Any] = json.loads(path.read_text())
    assert f"loss {result['loss']:.6f} | perplexity {result['perplexity']:.4f}" in done.stdout
    return result


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_every_layout_gives_the_number_of_one_process(root: Path, tmp_path: Path, model: str) -> None:
    alone = evaluate("--checkpoint", root / model / "save", "--json", tmp_path / "alone.json", "--micro-batch-size", 3)
    assert alone["samples"] % 2, "an odd number, so that two ranks need a sample without loss"
    for layout in LAYOUTS[model]:
        found = json.loads((root / f"{model}-{layout}.json").read_text())
        assert (found["samples"], found["tokens"]) == (alone["samples"], alone["tokens"])
        assert found["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)


def test_the_first_samples_are_those_of_the_runs_validation(root: Path, tmp_path: Path) -> None:
    found = evaluate(
        "--checkpoint", root / "dense" / "save", "--num-samples", VALIDATED, "--json", tmp_path / "few.json"
    )
    assert found["loss"] == pytest.approx(read_metrics(root / "dense.jsonl")[-1]["validation_loss"], rel=TOLERANCE)
    assert found["tokens"] == VALIDATED * TINY_MODEL["seq-length"]


@pytest.fixture(scope="module")
def exported(root: Path) -> dict[str, Path]:
    """Bundled code, and a class of transformers' own."""
    found = {"dense": root / "dense-hf", "native": root / "native-hf"}
    for name, output in found.items():
        done = run_program("export", "--checkpoint", root / name / "save", "--output", output, "--verify", "none")
        assert done.returncode == 0, done.stdout
    return found


@dataclass(frozen=True)
class Case:
    """Flags of an evaluation, and what it then reads: split, share of the documents, tokens of a sample."""

    model: str
    flags: list[object]
    split: str
    share: float
    length: int = TINY_MODEL["seq-length"]


CASES = {
    "default": Case("native", [], "validation", 0.1),
    "training": Case("dense", ["--subset", "train", "--num-samples", 15], "training", 0.9),
    "the very data": Case("dense", ["--data-path", "DATA", "--num-samples", 21, "--eod-mask-loss"], "validation", 0.1),
    "the same place": Case("dense", ["--data-path", "LINK"], "validation", 0.1),
    "another split": Case("dense", ["--split", "50,25,25", "--subset", "test"], "test", 0.25),
    "shorter": Case("native", ["--seq-length", 10], "validation", 0.1, 10),
    "other data": Case("dense", ["--data-path", "OTHER"], "all", 1.0),
}


@pytest.fixture(scope="module")
def numbers(root: Path, exported: dict[str, Path], documents: Path, run_cases: Any) -> Path:
    """``<case>-<checkpoint|export>.json``."""
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{documents}{suffix}", root / f"other{suffix}")
    (root / "link").symlink_to(documents.parent)
    places = {"DATA": documents, "LINK": root / "link" / documents.name, "OTHER": root / "other"}
    words = []
    for name, case in CASES.items():
        given = [str(places.get(str(word), word)) for word in case.flags]
        for kind, path, more in (
            ("checkpoint", root / case.model / "save", []),
            ("export", exported[case.model], ["--micro-batch-size", "4"]),
        ):
            where = ["--device", "cpu", "--json", str(root / f"{name}-{kind}.json")]
            words.append(["evaluate", "--checkpoint", str(path), *given, *more, *where])
    run_cases(1, words)
    return root


@pytest.mark.parametrize("name", CASES)
def test_an_export_gives_the_number_of_its_checkpoint(numbers: Path, documents: Path, name: str) -> None:
    one, two = (json.loads((numbers / f"{name}-{kind}.json").read_text()) for kind in ("checkpoint", "export"))
    assert two["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
    for key in one.keys() - {"loss", "perplexity", "seconds"}:
        assert one[key] == two[key], key
    case = CASES[name]
    tokens = Path(f"{documents}.bin").stat().st_size / 2
    assert (one["split"], one["seq_length"]) == (case.split, case.length)
    assert one["available_samples"] == pytest.approx(case.share * tokens / case.length, rel=0.05)
    if "--eod-mask-loss" in case.flags:
        assert one["tokens"] < 21 * case.length, "ends of documents carry no loss"


def test_what_is_evaluated_is_said(exported: dict[str, Path], documents: Path) -> None:
    done = run_program("evaluate", "--checkpoint", exported["native"], "--device", "cpu", "--num-samples", 3)
    line = f"on the validation split of {documents} (90 to 100 % of its documents): 3 of 103 samples of 24 tokens"
    assert line in done.stdout


def test_a_record_that_lacks_or_does_not_fit_is_refused(
    root: Path, exported: dict[str, Path], documents: Path, tmp_path: Path
) -> None:
    def refused(*words: object) -> str:
        done = run_program("evaluate", "--checkpoint", directory, "--device", "cpu", *words)
        assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
        return str(done.stdout)

    directory = tmp_path / "hf"
    shutil.copytree(exported["native"], directory)
    path = directory / "training_data.json"
    record = json.loads(path.read_text())
    assert (record["data_path"], record["split"], record["seq_length"]) == ([str(documents)], "90,10,0", 24)
    path.write_text(json.dumps({**record, "files": {str(documents): [1, 2]}}))
    assert "are not the data of its training" in refused()
    done = run_program(
        *("evaluate", "--checkpoint", directory, "--device", "cpu", "--data-path", documents, "--num-samples", 2)
    )
    assert done.returncode == 0 and "the validation split" in done.stdout, done.stdout
    path.write_text(json.dumps({**record, "seq_length": 4000}))
    assert "samples of 4000 tokens" in refused()
    path.write_text(json.dumps({**record, "data_path": ["gone"], "files": {}}))
    assert "takes its validation split from gone.bin" in refused()
    path.write_text("{")
    assert "is no record of training data" in refused()
    path.unlink()
    assert "does not say what data it was trained on; name prepared data with --data-path" in refused()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: give at least 1"),
        (
            ["--num-samples", "104"],
            "--num-samples 104: one pass over the validation split has 103 samples of 24 tokens",
        ),
        (["--subset", "test"], "gives the test split nothing"),
        (["--layout", "tp2"], "does not divide"),
        (["--seq-length", "25"], "--seq-length 25: the model was trained on 24 positions"),
        (["--seq-length", "0"], "--seq-length 0"),
    ],
)
def test_bad_input_is_refused(root: Path, words: list[str], message: str) -> None:
    done = run_program("evaluate", "--checkpoint", root / "dense" / "save", "--device", "cpu", *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stdout and "Traceback" not in done.stdout


def test_a_place_without_a_model_is_refused(tmp_path: Path) -> None:
    done = run_program("evaluate", "--checkpoint", tmp_path)
    assert done.returncode == 2 and "neither a complete checkpoint nor a config.json" in done.stdout

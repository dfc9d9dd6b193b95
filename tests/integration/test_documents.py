"""Documents kept apart, in every layout: losses, gradient norms and gradients are those of one rank.

The runs and the comparison are those of ``phd-megatron parity``; tolerance (all cases): 1e-5 relative in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phd_megatron.config.layouts import SINGLE, parse_layout
from phd_megatron.config.load import load_run_config
from phd_megatron.config.schema import RunConfig
from phd_megatron.parity.compare import FLOAT32, METRICS
from phd_megatron.parity.runs import Row, run_parity

from .conftest import TINY_MODEL, flags, read_metrics, run_program

#: of a sample of 24 tokens: many short documents, and some longer than it
SENTENCES = [f"{i} and {i * i}" if i % 7 else "lorem ipsum dolor sit amet " * 3 for i in range(900)]
KEPT_APART: dict[str, object] = {"reset-attention-mask": True, "reset-position-ids": True}
MODELS: dict[str, dict[str, object]] = {
    f"{scheme}-k{repeat}-{kind}": {"norm-scheme": scheme, "phd-repeat": repeat, "phd-window": 4, **chunk, **KEPT_APART}
    for scheme in ("pre", "hybrid_star")
    for repeat in (1, 2, 3)
    for kind, chunk in (("cswa", {"phd-chunk": 8}), ("swa", {}))
    if repeat > 1 or kind == "swa"
}
MODELS["pre-k2-positions-of-the-sample"] = {**MODELS["pre-k2-cswa"], "reset-position-ids": False}
MODELS["hybrid_star-k2-repeated-vector"] = {
    **MODELS["hybrid_star-k2-swa"],
    **{"phd-copy-positions": "repeated", "phd-copy-embedding": "vector", "eod-mask-loss": True},
}
MODELS["hybrid_star-k2-experts"] = {
    **MODELS["hybrid_star-k2-cswa"],
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 16, "moe-aux-loss-coeff": 0.01},
}
LAYOUTS = ("tp2", "tp2+sp", "pp2", "pp2+vpp2", "dp2+overlap", "tp2+sp+recompute", "tp2+sp+pp2+vpp2")
LAYOUTS += ("cp2", "cp4+p2p", "tp2+sp+cp2")
EXPERTS = ("tp2+sp", "ep2+dp2", "cp2+ep2")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentences")
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    done = run_program("prepare", "--input", directory / "text.jsonl", "--output-prefix", directory / "data")
    assert done.returncode == 0, done.stdout
    return directory / "data"


def configuration(data: Path, model: dict[str, object]) -> RunConfig:
    from phd_megatron.model.transformer_config import transformer_field_types

    options = {**TINY_MODEL, "data-path": str(data), "micro-batch-size": 2, "lr": 1e-2, "device": "cpu", **model}
    words = flags({name: value for name, value in options.items() if value is not False})
    return load_run_config(words, transformer_fields=transformer_field_types()).config


@pytest.fixture(scope="module")
def parity(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, str], Row], Path]:
    models = {
        name: (configuration(sentences, options), [parse_layout(x) for x in layouts_of(name)])
        for name, options in MODELS.items()
    }
    work = tmp_path_factory.mktemp("parity")
    found = run_parity(models, work, dict.fromkeys(models, FLOAT32), timeout=420)
    return {(row.layout, model): row for model, rows in found.items() for row in rows}, work


def layouts_of(model: str) -> tuple[str, ...]:
    return EXPERTS if "experts" in model else LAYOUTS


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "model"), [(layout, model) for model in MODELS for layout in layouts_of(model)])
def test_layout_gives_the_numbers_of_one_rank(
    parity: tuple[dict[tuple[str, str], Row], Path], layout: str, model: str
) -> None:
    row = parity[0][layout, model]
    assert row.status == "equal", f"{row.comparison}\n{row.note}"


def test_the_cases_differ(parity: tuple[dict[tuple[str, str], Row], Path], sentences: Path) -> None:
    """From each other, but for where positions begin, which RoPE cannot tell."""
    losses = {name: read_metrics(parity[1] / name / SINGLE.name / METRICS)[1]["lm_loss"] for name in MODELS}
    together = losses.pop("pre-k2-positions-of-the-sample")
    assert together == pytest.approx(losses["pre-k2-cswa"], rel=1e-6)
    assert len({f"{loss:.6f}" for loss in losses.values()}) == len(losses)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["pre-k1-swa", "hybrid_star-k3-cswa"], ids=["a model of transformers' own", "ours"])
def test_an_export_is_evaluated_as_its_checkpoint(sentences: Path, tmp_path: Path, model: str) -> None:
    """With documents kept apart as in training, and, asked for, without."""
    options = {**TINY_MODEL, "data-path": str(sentences), "lr": 1e-2, "device": "cpu", "split": "80,20,0"}
    options |= {
        "micro-batch-size": 2,
        "train-iters": 4,
        "eval-iters": 0,
        "save": str(tmp_path / "run"),
        **MODELS[model],
    }
    commands = [
        ["pretrain", *flags(options)],
        ["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "hf")],
    ]
    for place in ("run", "hf"):
        for kind, more in (("apart", []), ("together", ["--no-reset-attention-mask", "--no-reset-position-ids"])):
            target = str(tmp_path / f"{place}-{kind}.json")
            words = ["--checkpoint", str(tmp_path / place), "--device", "cpu", "--num-samples", "9", "--json", target]
            commands.append(["evaluate", *words, *more])
    for words in commands:
        done = run_program(*words)
        assert done.returncode == 0, done.stdout
    found = {path.stem: json.loads(path.read_text())["loss"] for path in tmp_path.glob("*.json")}
    assert found["hf-apart"] == pytest.approx(found["run-apart"], rel=2e-6)
    assert found["hf-together"] == pytest.approx(found["run-together"], rel=2e-6)
    assert abs(found["run-apart"] - found["run-together"]) > 1e-4

"""Copies told apart by RoPE positions and vectors on a GPU: bfloat16, Transformer Engine, FP8, CUDA graphs, generation.

``test_cuda_parity.py`` holds their gradients in float32 to those of the CPU. Every run is a process of its own, several
at a time; tolerances, relative and of every step, are those of ``test_cuda_te.py`` and ``test_cuda_graph_step.py``.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from .programs import documentation_as_bytes, program, succeeded, worst
from .test_cuda_graph_step import GRAPH, LOCAL, LOSS, MODEL, NORM, RECIPES, RECORDED, TE

CURVE, STEPS, LONG = 2e-2, 10, 100
VECTOR, REPEATED = " --phd-copy-embedding vector", " --phd-copy-positions repeated"
FORMS = {"both": REPEATED + VECTOR, "fraction": " --phd-copy-positions fraction", "vector": VECTOR}
DATA = " --seq-length 256 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --lr-warmup-iters 3 --seed 5"
DATA += " --log-interval 1 --eval-iters 0"
SHORT, CURVES = f"{DATA} --train-iters {STEPS}", f"{DATA} --train-iters {LONG}"
HAS_TE = bool(RECIPES)
RUNS = {f"{form}/local": MODEL + words + LOCAL + SHORT for form, words in FORMS.items()}
RUNS |= {"both/local graph": RUNS["both/local"] + GRAPH, "none/local": MODEL + LOCAL + SHORT}
if HAS_TE:
    RUNS |= {f"{form}/te": MODEL + words + TE + SHORT for form, words in FORMS.items()}
    RUNS |= {"both/te graph": RUNS["both/te"] + GRAPH, "curve/bf16": MODEL + FORMS["both"] + TE + CURVES}
    RUNS |= {f"curve/{name}": f"{RUNS['curve/bf16']} {options}" for name, options in RECIPES.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documentation_as_bytes(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """``runs(name)``: what became of a run; all are started at once."""
    root = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(max_workers=8) as pool:
        started = {
            name: pool.submit(
                program, "pretrain", *words.split(), "--data-path", str(corpus), metrics=root / f"{number}.jsonl"
            )
            for number, (name, words) in enumerate(RUNS.items())
        }
        yield lambda name: succeeded(started[name].result())


def assert_alike(name: str, found, expected) -> None:
    loss, norm = (worst(found.series(key), expected.series(key), STEPS) for key in ("lm_loss", "grad_norm"))
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS and norm <= NORM


@pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine")
@pytest.mark.parametrize("form", FORMS)
def test_transformer_engine_trains_the_same_model(runs, form: str) -> None:
    assert_alike(form, runs(f"{form}/te"), runs(f"{form}/local"))


@pytest.mark.parametrize("layers", ["local", *(["te"] if HAS_TE else [])])
def test_a_replayed_step_is_the_step(runs, layers: str) -> None:
    graph = runs(f"both/{layers} graph")
    assert RECORDED in graph.text
    assert_alike(f"graph, {layers}", graph, runs(f"both/{layers}"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_follows_bfloat16(runs, recipe: str) -> None:
    ends = [mean(runs(f"curve/{name}").series("lm_loss")[-20:]) for name in (recipe, "bf16")]
    print(f"{recipe}: {ends[0]:.4f}, bfloat16 {ends[1]:.4f}")
    assert abs(ends[0] / ends[1] - 1) <= CURVE
    assert ends[1] < 0.7 * runs("curve/bf16").series("lm_loss")[0], "too little was learnt to tell"


def test_the_options_are_not_ignored(runs) -> None:
    losses = {form: runs(f"{form}/local").series("lm_loss")[-1] for form in ("none", *FORMS)}
    print(losses)
    assert len(set(losses.values())) == len(losses)


def test_a_trained_model_is_exported_and_generates_alike_with_both_kernels(corpus: Path, tmp_path: Path) -> None:
    save, hf = tmp_path / "run", tmp_path / "hf"
    words = (MODEL + FORMS["both"] + LOCAL + SHORT).split()
    succeeded(program("pretrain", *words, "--data-path", str(corpus), "--save", str(save)))
    assert "verified" in succeeded(program("export", "--checkpoint", str(save), "--output", str(hf))).text
    texts = []
    for kernel in ("torch", "triton"):
        said = succeeded(
            program(
                *("generate", "--checkpoint", str(hf), "--prompt", "Every token is repeated"),
                *("--max-new-tokens", "40", "--decode-kernel", kernel),
            )
        ).text
        assert f"decode attention: {kernel}" in said
        texts.append(re.sub(r"[\d.]+ s, [\d.]+ tokens/s, decode attention: \w+", "", said))
    assert texts[0] == texts[1]

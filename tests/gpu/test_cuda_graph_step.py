"""Steps replayed as a CUDA graph against the same steps launched one by one: whole runs of ``pretrain`` on a GPU.

Every run makes 2 micro-batches a step and evaluates before and after the step that is recorded (the fourth). Every run
is a process of its own, several at a time. Kernels are the same, but some add in any order, and in half precision what
that changes grows from step to step. So tolerances, relative and of every step, are those between implementations
(``test_cuda_te.py``), and the difference between two runs without a graph is printed beside:

- ``LOSS``: of training and of evaluation;
- ``NORM``: of the gradient. A micro-batch that is left out or counted twice changes it by tens of percent;
- ``LEARNT``: by how much evaluation has to fall after the recording, so that old weights or old batches cannot pass.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.runtime.capabilities import probe

from .programs import Done, documentation_as_bytes, program, succeeded, worst

MACHINE = probe("cuda")
LOSS, NORM, LEARNT = 5e-3, 5e-2, 0.05
STEPS, HALF = 10, 6
GPU, CUDA = MACHINE.compute_capability or (0, 0), MACHINE.cuda or (0, 0)

MODEL = "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2"
MODEL += " --kv-channels 64 --norm-scheme hybrid_star --phd-repeat 2 --phd-window 5 --phd-chunk 32"
VANILLA = MODEL.replace("hybrid_star", "pre").replace("--phd-repeat 2", "--phd-repeat 1")
RUN = f" --seq-length 256 --micro-batch-size 4 --global-batch-size 8 --train-iters {STEPS} --lr 1e-3 --seed 5"
RUN += " --log-interval 1 --eval-interval 3 --eval-iters 1 --split 90,10,0"
GRAPH = " --cuda-graph-impl local --cuda-graph-scope full_iteration"
LOCAL, TE = " --bf16 --transformer-impl local", " --bf16 --transformer-impl transformer_engine"

KINDS = {"local": MODEL + LOCAL, "local vanilla": VANILLA + LOCAL, "float32": VANILLA + " --transformer-impl local"}
KINDS["watched"] = MODEL + LOCAL + " --log-layer-statistics 5"
EXPERTS = " --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-router-dtype fp32"
EXPERTS += " --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --moe-shared-expert-intermediate-size 256"
KINDS["experts"] = MODEL + LOCAL + EXPERTS
RECIPES = {}
if MACHINE.transformer_engine is not None:
    KINDS |= {"te": MODEL + TE, "te vanilla": VANILLA + TE, "te experts": MODEL + TE + EXPERTS}
    if GPU >= (8, 9):
        RECIPES |= {"delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4"}
        RECIPES |= {"tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise"}
        RECIPES |= {"edges": RECIPES["tensorwise"] + " --first-last-layers-bf16"}
    if GPU >= (9, 0) and CUDA >= (12, 9):
        RECIPES |= {"blockwise": "--fp8-format e4m3 --fp8-recipe blockwise"}
KINDS |= {name: f"{MODEL}{TE} {options}" for name, options in RECIPES.items()}
KINDS |= {f"{name} watched": f"{KINDS[name]} --log-layer-statistics 5" for name in RECIPES if name != "edges"}
REPEATED = ["local", "experts", *(name for name in ("te", "tensorwise", "delayed", "blockwise") if name in KINDS)]
RECORDED = "CUDA graph: forward and backward of 2 micro-batches recorded"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documentation_as_bytes(tmp_path_factory.mktemp("corpus"))


def in_parts(corpus: Path, directory: Path, options: str) -> Done:
    """The first steps of a graphed run, and the others from its checkpoint alone."""
    save, metrics = directory / "run", directory / "metrics.jsonl"
    words = (*options.split(), "--data-path", str(corpus), "--save", str(save), "--exit-interval", str(HALF))
    succeeded(program("pretrain", *words, metrics=metrics))
    return program("pretrain", "--load", str(save), metrics=metrics)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """``runs(name)``: what became of a run; all are started at once."""
    root = tmp_path_factory.mktemp("runs")
    options = {}
    for kind, words in KINDS.items():
        options |= {f"{kind}/eager": words + RUN, f"{kind}/graph": words + RUN + GRAPH}
        options |= {f"{kind}/again": words + RUN} if kind in REPEATED else {}
    traced = f" --profile --profile-step-start 6 --profile-step-end 8 --profile-dir {root / 'traces'}"
    options["profiled"] = KINDS["local"] + RUN + GRAPH + traced
    with ThreadPoolExecutor(max_workers=8) as pool:
        started = {
            f"{kind}/parts": pool.submit(in_parts, corpus, root / f"parts {kind}", KINDS[kind] + RUN + GRAPH)
            for kind in REPEATED
        }
        for number, (name, words) in enumerate(options.items()):
            command = ("pretrain", *words.split(), "--data-path", str(corpus))
            started[name] = pool.submit(program, *command, metrics=root / f"{number}.jsonl")
        yield lambda name: succeeded(started[name].result())


def differences(found: Done, expected: Done) -> tuple[float, float]:
    """Worst of losses and of norms; evaluations are after steps 3, 6, 9 and the last."""
    names = {"lm_loss": STEPS, "validation_loss": 4, "grad_norm": STEPS}
    loss, validation, norm = (worst(found.series(n), expected.series(n), count) for n, count in names.items())
    return max(loss, validation), norm


def assert_equal(name: str, found: Done, expected: Done) -> None:
    loss, norm = differences(found, expected)
    print(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= LOSS and norm <= NORM
    before, *_, last = expected.series("validation_loss")
    assert last < (1 - LEARNT) * before, "too little was learnt to tell"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_step(runs, kind: str) -> None:
    graph, eager = runs(f"{kind}/graph"), runs(f"{kind}/eager")
    if kind in REPEATED:
        loss, norm = differences(runs(f"{kind}/again"), eager)
        print(f"{kind}, two runs without a graph: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert RECORDED in graph.text and RECORDED not in eager.text
    assert "CUDA graph of forward and backward" in graph.text
    assert_equal(kind, graph, eager)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "experts" in kind])
def test_a_replayed_step_counts_rows(runs, kind: str) -> None:
    """Loads are counted in the graph too: as many rows as there are, and spread as without a graph."""
    graph, eager = (runs(f"{kind}/{how}").steps for how in ("graph", "eager"))
    for one, two in zip(graph, eager, strict=True):
        for layer, load in two["tokens_per_expert"].items():
            found = one["tokens_per_expert"][layer]
            assert sum(found) == sum(load) > 0
            assert max(abs(a - b) for a, b in zip(found, load, strict=True)) <= NORM * sum(load)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "watched" in kind])
def test_a_watched_step_is_not_replayed(runs, kind: str) -> None:
    """Layer statistics, of the first step and every fifth, need hooks: those after the recording are there as well."""
    graph, eager = (runs(f"{kind}/{how}").steps for how in ("graph", "eager"))
    assert [step["iteration"] for step in graph if "layer_statistics" in step] == [1, 5, 10]
    for step in (0, 4, 9):
        found, expected = (steps[step]["layer_statistics"] for steps in (graph, eager))
        for name, tolerance in (("residual_rms", LOSS), ("gradient_norm", NORM)):
            difference = worst([*found[name].values()], [*expected[name].values()], 4)
            print(f"{kind}, {name} of step {step + 1}: {difference:.1e}")
            assert difference <= tolerance


@pytest.mark.parametrize("kind", REPEATED)
def test_a_resumed_run_goes_on(runs, kind: str) -> None:
    """It makes its first steps without the graph again, and records another one."""
    parts = runs(f"{kind}/parts")
    assert RECORDED in parts.text
    names = {"lm_loss": LOSS, "grad_norm": NORM}
    for name, tolerance in names.items():
        found = worst(parts.series(name), runs(f"{kind}/eager").series(name), STEPS)
        print(f"{kind}, {name}: {found:.1e}")
        assert found <= tolerance


def test_replays_are_traced(runs) -> None:
    """The profiler starts after the recording, and sees kernels inside of the graph."""
    done = runs("profiled")
    assert RECORDED in done.text
    trace = re.search(r"traced steps 7 to 8 of rank 0: (\S+)\.pt\.trace", done.text)
    assert trace is not None, done.text
    rows = json.loads(Path(f"{trace[1]}.operations.json").read_text())["operations"]
    gemms = [row for row in rows if row["self_device_ms"] > 0 and re.search("gemm|nvjet|cutlass", row["name"].lower())]
    assert sum(row["calls"] for row in gemms) > 2 * 2 * 4 * 4  # steps, micro-batches, layers, products
    assert_equal("profiled", done, runs("local/eager"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", [kind for kind in ("local", "te", "tensorwise") if kind in KINDS])
def test_data_parallel_ranks(corpus: Path, tmp_path: Path, kind: str) -> None:
    """Gradients are reduced after the graph; two ranks with two micro-batches each."""
    words = KINDS[kind] + RUN.replace("--global-batch-size 8", "--global-batch-size 16")
    found = {}
    for name, more in (("eager", ""), ("graph", GRAPH)):
        command = ("pretrain", *(words + more).split(), "--data-path", str(corpus))
        found[name] = succeeded(program(*command, metrics=tmp_path / f"{name}.jsonl", ranks=2))
    assert RECORDED in found["graph"].text
    assert_equal(kind, found["graph"], found["eager"])

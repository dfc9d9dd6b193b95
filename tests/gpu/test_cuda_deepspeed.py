"""DeepSpeed's engine on a GPU against Megatron-Core's: stages, states and parameters on the host, both of its AdamWs.

Every run is a process of its own. Tolerances, relative and of every step: ``FLOAT32`` where nothing is rounded further,
``LOSS`` and ``NORM`` of ``test_cuda_graph_step.py`` in bfloat16.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

from .programs import Done, documentation_as_bytes, program, succeeded, worst
from .test_cuda_graph_step import LOSS, MODEL, NORM, VANILLA

FLOAT32, STEPS = 2e-5, 6
RUN = " --seq-length 256 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --seed 5 --log-interval 1 --eval-iters 0"
RUN += f" --adam-eps 1e-4 --transformer-impl local --train-iters {STEPS}"
HOST = {"device": "cpu"}
FILES = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2+states": {"stage": 2, "offload_optimizer": HOST},
    "3+states": {"stage": 3, "offload_optimizer": HOST},
    "3+all": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
}
MODELS = {"float32": VANILLA, "phd": MODEL + " --bf16"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """``runs(model, file)``: what became of a run; all are started at once. File ``own`` is Megatron-Core's engine."""
    root = tmp_path_factory.mktemp("runs")
    corpus = documentation_as_bytes(tmp_path_factory.mktemp("corpus"))

    def start(model: str, name: str) -> Done:
        home = root / f"{model}-{name.replace('+', '-')}"
        home.mkdir()
        options = MODELS[model] + RUN
        if name != "own":
            (home / "ds.json").write_text(json.dumps({"zero_optimization": FILES[name]}))
            options += f" --deepspeed --deepspeed-config {home / 'ds.json'}"
        return program("pretrain", *options.split(), "--data-path", str(corpus), metrics=home / "metrics.jsonl")

    with ThreadPoolExecutor(max_workers=7) as pool:
        started = {(model, name): pool.submit(start, model, name) for model in MODELS for name in ("own", *FILES)}
        yield lambda *which: succeeded(started[which].result())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FILES)
def test_the_same_numbers(runs, name: str, model: str) -> None:
    found, expected = runs(model, name), runs(model, "own")
    loss, norm = (worst(found.series(key), expected.series(key), STEPS) for key in ("lm_loss", "grad_norm"))
    print(f"ZeRO {name}, {model}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss <= (FLOAT32 if model == "float32" else LOSS)
    assert norm <= (10 * FLOAT32 if model == "float32" else NORM)


@pytest.mark.parametrize("name", ["1", "2+states", "3+all", "compiled"])
def test_megatrons_engine_goes_on(name: str, tmp_path: Path) -> None:
    """From a checkpoint of either engine; ``compiled``: with DeepSpeedCPUAdam, which is built first."""
    file: dict = {"zero_optimization": FILES["2+states" if name == "compiled" else name]}
    if name == "compiled":
        if shutil.which("nvcc") is None:
            pytest.skip("DeepSpeedCPUAdam is compiled, and there is no nvcc")
        file["zero_force_ds_cpu_optimizer"] = True
    corpus = documentation_as_bytes(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(file))
    series = {}
    for engine in ("own", "zero"):
        save, metrics = tmp_path / engine, tmp_path / f"{engine}.jsonl"
        words = [*(MODELS["phd"] + RUN).split(), "--data-path", str(corpus), "--save", str(save)]
        if engine == "zero":
            words += ["--deepspeed", "--deepspeed-config", str(tmp_path / "ds.json")]
        succeeded(program("pretrain", *words, "--exit-interval", "4", metrics=metrics))
        resumed = ["--load", str(save)] + (["--deepspeed", "false"] if engine == "zero" else [])
        series[engine] = succeeded(program("pretrain", *resumed, metrics=metrics))
    for key, allowed in (("lm_loss", LOSS), ("grad_norm", NORM)):
        found = worst(series["zero"].series(key), series["own"].series(key), STEPS)
        print(f"ZeRO {name}, then Megatron-Core's: {key} {found:.1e}")
        assert found <= allowed

"""On a GPU the real program gives the numbers it gives on the CPU, with torch alone and with Transformer Engine.

The CPU run also shows that the CPU backend serves a torch that has CUDA, beside Transformer Engine where it is
installed; "cuda" runs as if it were not. Tolerances, relative as in
``tests/integration/test_layout_parity.py``: 1e-4 for local float32 layers (sums in another order), 5e-3 for
Transformer Engine's, whose float32 products run in TF32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.training.observers.gradient_dump import load_gradients

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "pre-k1": ("pre", 1, ()),
    "post-k2": ("post", 2, ()),
    "hybrid_star-k2": ("hybrid_star", 2, ()),
    "hybrid-k3": ("hybrid", 3, ()),
    "told-apart-k2": ("hybrid_star", 2, ("--phd-copy-positions", "repeated", "--phd-copy-embedding", "vector")),
    "told-apart-k3": ("pre", 3, ("--phd-copy-positions", "fraction", "--phd-copy-embedding", "vector")),
}
DEVICES = {"cpu": ["--device", "cpu"], "cuda": ["--device", "cuda", "--transformer-impl", "local"]}
if importlib.util.find_spec("transformer_engine"):
    DEVICES["te"] = ["--device", "cuda", "--transformer-impl", "transformer_engine"]
TOLERANCES = {"cuda": 1e-4, "te": 5e-3}
SIZES = {"num-layers": 3, "hidden-size": 64, "ffn-hidden-size": 96, "num-attention-heads": 4, "num-query-groups": 2}
SIZES |= {"seq-length": 48, "phd-window": 5, "phd-chunk": 8, "micro-batch-size": 2, "global-batch-size": 4}
SIZES |= {"train-iters": 3, "lr": "1e-2", "eval-iters": 0, "log-interval": 1}
SHAPE = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
WITHOUT_TE = "import runpy, sys; sys.modules['transformer_engine'] = None; sys.argv.pop(0); "
WITHOUT_TE += "runpy.run_path(sys.argv[0], run_name='__main__')"
RUN_CASES = str(ROOT / "tests" / "integration" / "run_cases.py")


def program(*words: str, timeout: float = 300) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


def run_cases(device: str, cases: list[list[str]], path: Path) -> str:
    """Several commands on one of DEVICES, in one process."""
    path.write_text(json.dumps([[*case, *DEVICES[device]] for case in cases]))
    return program(*(["-c", WITHOUT_TE] if device == "cuda" else []), RUN_CASES, str(path))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "text.txt").write_text("\n".join(f"{i} squared is {i * i}" for i in range(3000)))
    prefix = directory / "data"
    program(
        "-m",
        "phd_megatron",
        "prepare",
        "--input",
        str(directory),
        "--output-prefix",
        str(prefix),
        "--tokenizer",
        "byte",
    )
    return prefix


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The models of the tests that were selected, on every device."""
    root = tmp_path_factory.mktemp("cuda")
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    wanted = {item.callspec.params.get("model") for item in items}
    with ThreadPoolExecutor(max_workers=len(DEVICES)) as pool:
        started = []
        for device in DEVICES:
            cases = []
            for name, (scheme, repeat, further) in MODELS.items():
                if name not in wanted:
                    continue
                out = root / device / name
                cases.append(
                    [
                        *("pretrain", *SHAPE, "--data-path", str(corpus)),
                        *("--norm-scheme", scheme, "--phd-repeat", str(repeat), *further),
                        *("--metrics-file", str(out / "metrics.jsonl"), "--dump-gradients-dir", str(out / "gradients")),
                    ]
                )
            started.append(pool.submit(run_cases, device, cases, root / f"{device}.json"))
        for each in started:
            each.result()
    return root


@pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"])
@pytest.mark.parametrize("model", MODELS)
def test_device_gives_the_numbers_of_the_cpu(results: Path, device: str, model: str) -> None:
    tolerance = TOLERANCES[device]
    runs = [
        [json.loads(line) for line in (results / where / model / "metrics.jsonl").read_text().splitlines()]
        for where in ("cpu", device)
    ]
    for one, two in zip(*runs, strict=True):
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=tolerance)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * tolerance)
    expected, found = (
        load_gradients(results / where / model / "gradients" / "iter_0000001") for where in ("cpu", device)
    )
    assert expected.keys() == found.keys()
    total = torch.stack([g.double().norm() for g in expected.values()]).norm()
    errors = {
        key: float((found[key] - gradient).double().norm() / max(gradient.double().norm(), 1e-3 * total))
        for key, gradient in expected.items()
    }
    worst = max(errors, key=errors.__getitem__)
    print(f"{device} {model}: worst {worst} {errors[worst]:.1e}")
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


def test_a_run_moves_between_devices(corpus: Path, tmp_path: Path) -> None:
    """Checkpoints of the CPU and of a GPU, with either Adam, continue on the other."""
    base = ["pretrain", *SHAPE, "--train-iters", "8", "--data-path", str(corpus), "--phd-repeat", "2"]
    whole, parts, save = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "run"
    run_cases("cpu", [[*base, "--metrics-file", str(whole)]], tmp_path / "whole.json")
    base += ["--save", str(save), "--load", str(save), "--metrics-file", str(parts), "--exit-interval", "2"]
    best = "te" if "te" in DEVICES else "cuda"
    for number, device in enumerate(("cpu", best, "cuda", "cpu")):
        run_cases(device, [base], tmp_path / f"{number}.json")
    losses = [[json.loads(line)["lm_loss"] for line in path.read_text().splitlines()] for path in (whole, parts)]
    print("whole, moved:", *losses)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCES["te"])


def test_bf16_run_resumes_and_exports(corpus: Path, tmp_path: Path) -> None:
    """bf16 with the best available layers: train, stop, resume, export, generate, all on this device."""
    save = tmp_path / "run"
    base = ["-m", "phd_megatron", "pretrain", *SHAPE, "--bf16", "--norm-scheme", "hybrid_star", "--phd-repeat", "2"]
    base += ["--data-path", str(corpus), "--save", str(save), "--train-iters", "6"]
    whole = tmp_path / "whole.jsonl"
    parts = tmp_path / "parts.jsonl"
    program(*base[:-4], "--train-iters", "6", "--metrics-file", str(whole))
    program(*base, "--metrics-file", str(parts), "--exit-interval", "3")
    program("-m", "phd_megatron", "pretrain", "--load", str(save), "--metrics-file", str(parts))
    losses = [[json.loads(line)["lm_loss"] for line in path.read_text().splitlines()] for path in (whole, parts)]
    assert len(losses[1]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    program("-m", "phd_megatron", "export", "--checkpoint", str(save), "--output", str(tmp_path / "hf"))
    text = program(
        *("-m", "phd_megatron", "generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "12 squared"),
        *("--max-new-tokens", "8"),
    )
    assert "12 squared" in text

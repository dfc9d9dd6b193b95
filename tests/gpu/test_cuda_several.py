"""On several GPUs, over NCCL: FP8 under layouts, saves in the background, resharding, and a rank that is killed.

Whole runs of ``pretrain`` under torchrun. Tolerances, all relative:

- ``FP8_LOSS``, ``FP8_NORM``: of each of six steps, a layout against one GPU with the same recipe. A shard has scales of
  its own, so the numbers are not those of one rank; a shard that is left out changes a norm by tens of percent;
- ``LOSS``, ``NORM``: of float32 steps after a resume under another layout, against a run on one GPU that was never
  interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from phd_megatron.runtime.capabilities import probe

from .programs import ROOT, Done, documentation_as_bytes, program, succeeded, worst

FP8_LOSS, FP8_NORM = 1e-2, 1e-1
LOSS, NORM = 1e-5, 1e-4
STEPS, HALF = 6, 3

MODEL = "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2"
MODEL += " --kv-channels 64 --norm-scheme hybrid_star --phd-repeat 2 --phd-window 5 --phd-chunk 32"
RUN = f" --seq-length 256 --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --lr 1e-3 --seed 5"
RUN += " --log-interval 1 --eval-iters 0"
EXPERTS = " --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-token-dispatcher-type alltoall"

MACHINE = probe("cuda")
GPU, CUDA = MACHINE.compute_capability or (0, 0), MACHINE.cuda or (0, 0)
RECIPES = {}
if MACHINE.transformer_engine is not None and GPU >= (8, 9):
    RECIPES |= {"delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4"}
    RECIPES |= {"tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise"}
    if GPU >= (9, 0) and CUDA >= (12, 9):
        RECIPES |= {"blockwise": "--fp8-format e4m3 --fp8-recipe blockwise"}
FP8_LAYOUTS = {
    "tp2+sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "dp2+overlap": "--overlap-grad-reduce --overlap-param-gather",
}
#: layout -> options that say all of it: a load takes from the checkpoint what is not given
ALONE = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 --no-sequence-parallel"
)
LAYOUTS = {
    "single": (1, ALONE),
    "tp2+sp": (2, ALONE.replace("--tensor-model-parallel-size 1", "--tensor-model-parallel-size 2").replace("no-", "")),
    "pp2": (2, ALONE.replace("--pipeline-model-parallel-size 1", "--pipeline-model-parallel-size 2")),
    "cp2": (2, ALONE.replace("--context-parallel-size 1", "--context-parallel-size 2")),
    "dp2": (2, ALONE),
}
RESHARDS = [("tp2+sp", "single"), ("single", "tp2+sp"), ("dp2", "pp2"), ("pp2", "cp2"), ("cp2", "dp2")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documentation_as_bytes(tmp_path_factory.mktemp("corpus"))


def pretrain(corpus: Path, options: str, metrics: Path, ranks: int = 1) -> Done:
    return succeeded(program("pretrain", *options.split(), "--data-path", str(corpus), metrics=metrics, ranks=ranks))


def assert_near(name: str, found: Done, expected: Done, loss: float, norm: float) -> None:
    by_loss, by_norm = (worst(found.series(n), expected.series(n), STEPS) for n in ("lm_loss", "grad_norm"))
    print(f"{name}: loss {by_loss:.1e}, gradient norm {by_norm:.1e}")
    assert by_loss <= loss and by_norm <= norm


@pytest.mark.parametrize("layout", FP8_LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_under_layouts(corpus: Path, tmp_path: Path, recipe: str, layout: str) -> None:
    words = f"{MODEL}{RUN} --bf16 --transformer-impl transformer_engine {RECIPES[recipe]}"
    alone = pretrain(corpus, words, tmp_path / "alone.jsonl")
    found = pretrain(corpus, f"{words} {FP8_LAYOUTS[layout]}", tmp_path / "layout.jsonl", ranks=2)
    assert_near(f"{recipe}, {layout}", found, alone, FP8_LOSS, FP8_NORM)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize(("saved", "loaded"), RESHARDS)
def test_a_checkpoint_goes_on_under_another_layout(
    corpus: Path, tmp_path: Path, saved: str, loaded: str, kind: str
) -> None:
    words = f"{MODEL}{RUN} --transformer-impl local" + EXPERTS * (kind == "experts")
    whole = pretrain(corpus, words, tmp_path / "whole.jsonl")
    ranks, options = LAYOUTS[saved]
    first = f"{words} {options} --save {tmp_path / 'run'} --async-save --save-interval 2 --exit-interval {HALF}"
    metrics = tmp_path / "parts.jsonl"
    pretrain(corpus, first, metrics, ranks)
    ranks, options = LAYOUTS[loaded]
    found = succeeded(
        program("pretrain", "--load", str(tmp_path / "run"), *options.split(), metrics=metrics, ranks=ranks)
    )
    assert_near(f"{kind}, {saved} -> {loaded}", found, whole, LOSS, NORM)


def test_a_killed_rank_is_started_again(corpus: Path, tmp_path: Path) -> None:
    """MAX_RESTARTS=1: the other rank does not wait in NCCL for the dead one; the numbers are the undisturbed ones."""
    words = f"{MODEL}{RUN.replace(f'--train-iters {STEPS}', '--train-iters 60')} --transformer-impl local"
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    run = [*words.split(), "--data-path", str(corpus), "--save", str(tmp_path / "run"), "--save-interval", "2"]
    command = ["bash", str(ROOT / "launch_scripts/pretrain_single_node.sh"), *run, "--metrics-file", str(metrics)]
    variables = {**os.environ, "NPROC": "2", "MAX_RESTARTS": "1", "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=variables, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while not re.search(r"(?s)iteration +\d+/.*saved checkpoint", log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.05)
        os.kill(_second_rank(str(metrics)), signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(200) == 0, log.read_text()[-6000:]
        print(f"from the kill to the end of the run: {time.monotonic() - killed:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert len(re.findall("training from iteration", said)) == 2 and "has died" in said
    again = Done(0, said, tuple(_steps(metrics)))
    undisturbed = pretrain(corpus, words, tmp_path / "whole.jsonl", ranks=2)
    by_loss = worst(again.series("lm_loss"), undisturbed.series("lm_loss"), 60)
    print(f"loss {by_loss:.1e}")
    assert by_loss <= LOSS


def _steps(metrics: Path) -> list[dict]:
    """The last line of each iteration: those after the newest checkpoint were made twice."""
    found = {line["iteration"]: line for line in map(json.loads, metrics.read_text().splitlines())}
    return [found[iteration] for iteration in sorted(found)]


def _second_rank(word: str) -> int:
    """Process that has RANK=1 in its environment and this word in its command."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"RANK=1" in (path / "environ").read_bytes().split(b"\0") and word in (path / "cmdline").read_text():
                return int(path.name)
    raise AssertionError("no process is rank 1")

"""Starting a run: refusals come as messages before anything waits for a rank that never comes."""

import subprocess
import sys

START = """
import os, sys
from phd_megatron.config.schema import ParallelConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime
config = {"rank": os.environ.get("RANK") if "differ" in sys.argv else 0}
try:
    with Runtime.start(ParallelConfig(device="cpu", tensor_model_parallel_size=int(sys.argv[1])), config=config) as run:
        run.log(f"OK {run.backend} {run.dims.dp} {run.device}")
except UserError as error:
    print("REFUSED", error, flush=True)
    raise SystemExit(2)
"""


def script(tmp_path):
    path = tmp_path / "start.py"
    path.write_text(START)
    return path


def test_two_worlds_of_one_share_a_host(tmp_path):
    command = [sys.executable, str(script(tmp_path)), "1"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=400)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert all("OK gloo 1 cpu" in output and "1 rank: DP 1" in output for output in outputs)


def test_two_ranks(torchrun, tmp_path):
    output = torchrun(2, script(tmp_path), "2").stdout
    assert "OK gloo 1 cpu" in output
    assert "2 ranks: TP 2, DP 1" in output


def test_layout_that_does_not_fit_the_world(torchrun, tmp_path):
    done = torchrun(2, script(tmp_path), "4", check=False, timeout=300)
    assert done.returncode != 0
    assert "REFUSED tensor 4 x pipeline 1 x context 1 = 4 does not divide world size 2" in done.stdout


def test_ranks_with_different_configurations(torchrun, tmp_path):
    done = torchrun(2, script(tmp_path), "1", "differ", check=False, timeout=300)
    assert done.returncode != 0
    assert "REFUSED rank 1 (" in done.stdout
    assert 'rank: "1" here, "0" on rank 0' in done.stdout

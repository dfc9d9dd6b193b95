"""Initial weights, experts and routers included, are the same bit for bit in every layout."""

from __future__ import annotations

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("initial_weights.py")
TP = "tensor_model_parallel_size=2,sequence_parallel=1"
VPP = "pipeline_model_parallel_size=2,virtual_pipeline_model_parallel_size=2"
EP = "expert_model_parallel_size=2"
LAYOUTS = {
    1: [""],
    2: ["", EP, VPP, TP, f"{TP},expert_tensor_parallel_size=1", f"{TP},{EP},expert_tensor_parallel_size=1"],
    4: [f"{TP},{EP}", f"pipeline_model_parallel_size=2,{EP}"],
}


def test_initial_weights_do_not_depend_on_the_layout(torchrun) -> None:
    digests = []
    for ranks, layouts in LAYOUTS.items():
        output = torchrun(ranks, SCRIPT, *(layout or "," for layout in layouts)).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("DIGESTS "))
        digests += json.loads(line.removeprefix("DIGESTS "))
    assert len(digests) == 9 and len(set(digests)) == 1

"""Initial weights, experts and routers included, are the same bit for bit in every layout."""

from __future__ import annotations

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("initial_weights.py")
TP = "tensor_model_parallel_size=2,sequence_parallel=1"
VPP = "pipeline_model_parallel_size=2,virtual_pipeline_model_parallel_size=2"
EP = "expert_model_parallel_size=2"
DEEPNORM = "norm_scheme=deepnorm"  # scales parts of a matrix
LAYOUTS = {
    1: ["", DEEPNORM],
    2: ["", EP, VPP, TP, f"{TP},expert_tensor_parallel_size=1", f"{TP},{EP},expert_tensor_parallel_size=1"],
    4: [f"{TP},{EP}", f"pipeline_model_parallel_size=2,{EP}", f"{TP},{EP},{DEEPNORM}"],
}


def test_initial_weights_do_not_depend_on_the_layout(torchrun) -> None:
    digests: dict[bool, list[str]] = {True: [], False: []}
    for ranks, layouts in LAYOUTS.items():
        output = torchrun(ranks, SCRIPT, *(layout or "," for layout in layouts)).stdout
        (line,) = (line for line in output.splitlines() if line.startswith("DIGESTS "))
        for layout, digest in zip(layouts, json.loads(line.removeprefix("DIGESTS ")), strict=True):
            digests[DEEPNORM in layout].append(digest)
    assert len(digests[False]) == 9 and len(digests[True]) == 2
    assert len(set(digests[False])) == len(set(digests[True])) == 1 and digests[False][0] != digests[True][0]

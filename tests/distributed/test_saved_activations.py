"""Activations of experts that the plan expects of a rank, against those of real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("saved_activations.py")
TP = "tensor_model_parallel_size=2,sequence_parallel=1"
LAYOUTS = {"EP": "expert_model_parallel_size=2", "ETP = TP": TP, "ETP = 1": f"{TP},expert_tensor_parallel_size=1"}


def test_activations_of_experts_over_ranks(torchrun) -> None:
    output = torchrun(2, SCRIPT, *LAYOUTS.values()).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("BYTES "))
    for layout, (kept, planned) in zip(LAYOUTS, json.loads(line.removeprefix("BYTES ")), strict=True):
        # What silu gives is kept too on a CPU: 4 bytes, 2 layers, rows of both copies, 4 experts of 256 for each.
        silu = 4 * 2 * (2 * 4 * 256) * 4 * 256 // (1 if layout == "EP" else 2)
        assert planned == pytest.approx(kept - silu, rel=0.04), layout

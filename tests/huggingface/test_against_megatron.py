"""Exports of Megatron-Core models give those models' logits; the relative error is below 1e-5 in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from phd_megatron.norm.schemes import NORM_SCHEMES


def rows(program: str, directory: Path) -> list[tuple[str, str, float]]:
    command = [sys.executable, str(Path(__file__).with_name(program)), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert {name: error for name, _, error in found if not error < 1e-5} == {}
    return found


def native(found: list[tuple[str, str, float]]) -> dict[str, str]:
    return {name: cls for name, cls, _ in found if cls != "PHDForCausalLM"}


def test_logits_of_exported_checkpoints(tmp_path):
    found = rows("megatron_parity.py", tmp_path)
    assert len(found) == 19
    classes = {"pre K=1": "LlamaForCausalLM", "pre_qk K=1": "Qwen3ForCausalLM", "olmo2 K=1": "Olmo2ForCausalLM"}
    assert native(found) == classes


def test_logits_of_every_norm_scheme_in_memory(tmp_path):
    found = rows("scheme_parity.py", tmp_path)
    assert {name for name, *_ in found} >= {f"{scheme} K=2 RMSNorm" for scheme in NORM_SCHEMES}
    assert native(found) == {
        "pre K=1 RMSNorm": "LlamaForCausalLM",
        "pre_qk K=1 RMSNorm": "Qwen3ForCausalLM",
        "olmo2 K=1 RMSNorm": "Olmo2ForCausalLM",
    }

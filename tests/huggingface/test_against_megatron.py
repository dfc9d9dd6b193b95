"""Exports of checkpoints that Megatron-Core models saved give those models' logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("megatron_parity.py")


def test_logits_of_every_scheme_and_repeat(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    errors = {name: error for name, _, error in rows}
    classes = {name: cls for name, cls, _ in rows}
    assert len(errors) == 19
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
    native = {name: cls for name, cls in classes.items() if cls != "PHDForCausalLM"}
    assert native == {"pre K=1": "LlamaForCausalLM", "pre_qk K=1": "Qwen3ForCausalLM", "olmo2 K=1": "Olmo2ForCausalLM"}

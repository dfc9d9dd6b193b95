"""Exports of checkpoints that Megatron-Core models saved give those models' logits, and `export` sees when not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phd_megatron.huggingface import bundle_files
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.verify import VerificationError

PROGRAM = Path(__file__).with_name("megatron_parity.py")
NATIVE = {
    "pre K=1": "LlamaForCausalLM",
    "pre_qk K=1": "Qwen3ForCausalLM",
    "experts as Mixtral": "MixtralForCausalLM",
    "experts as Qwen3": "Qwen3MoeForCausalLM",
    "experts as Qwen3, softmax over all": "Qwen3MoeForCausalLM",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Name -> number, class and error of each case, in a directory with ``<number>`` and ``<number>-hf``."""
    root = tmp_path_factory.mktemp("megatron")
    done = subprocess.run([sys.executable, str(PROGRAM), str(root)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return root, {name: (number, cls, error) for number, (name, cls, error) in enumerate(lines)}


def test_logits_of_every_scheme_repeat_and_router(rows):
    _, cases = rows
    assert len(cases) == 24
    assert {name: error for name, (_, _, error) in cases.items() if not error < 1e-5} == {}
    assert {name: cls for name, (_, cls, _) in cases.items() if cls != "PHDForCausalLM"} == NATIVE


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("hybrid_star K=2", "bfloat16"), ("experts as Mixtral", "auto"), ("experts hybrid_star K=2", "bfloat16")],
)
def test_full_verification(rows, tmp_path, name, dtype):
    root, cases = rows
    assert export_checkpoint(root / str(cases[name][0]), tmp_path / "hf", dtype=dtype).verified == "full"


def test_a_layer_that_computes_something_else_is_named(rows, tmp_path, monkeypatch):
    """Every tensor is right, but the second layer of the exported code scales its residual."""
    root, cases = rows
    code = bundle_files.bundle_files()["modeling_phd.py"].read_text()
    good = "        hidden = residual + self.self_attn(normed, rows, cache, self.layer_index)\n"
    assert good in code
    (tmp_path / "modeling_phd.py").write_text(
        code.replace(good, good + "        hidden = hidden * (1 + 1e-3 * (self.layer_index == 1))\n")
    )
    files = {**bundle_files.bundle_files(), "modeling_phd.py": tmp_path / "modeling_phd.py"}
    monkeypatch.setattr(bundle_files, "bundle_files", lambda: files)
    with pytest.raises(VerificationError, match=r"layer 1 is the first whose output differs, by \d"):
        export_checkpoint(root / str(cases["pre K=2"][0]), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()

"""Exports of checkpoints that Megatron-Core models saved give those models' logits, and `export` sees when not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phd_megatron.cli.main import main
from phd_megatron.huggingface import bundle_files
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.verify import VerificationError
from phd_megatron.norm.schemes import NORM_SCHEMES

from .test_export import works_alone

NATIVE = {
    "pre K=1": "LlamaForCausalLM",
    "pre_qk K=1": "Qwen3ForCausalLM",
    "olmo2 K=1": "Olmo2ForCausalLM",
    "experts as Mixtral": "MixtralForCausalLM",
    "experts as Qwen3": "Qwen3MoeForCausalLM",
    "experts as Qwen3, softmax over all": "Qwen3MoeForCausalLM",
    "experts as OLMoE": "OlmoeForCausalLM",
    "Llama 3.1's scaling": "LlamaForCausalLM",
    "yarn as Qwen3": "Qwen3ForCausalLM",
}


def run_cases(program, root):
    """Name -> number, class and relative error of each case of a program."""
    command = [sys.executable, str(Path(__file__).with_name(program)), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (number, cls, error) for number, (name, cls, error) in enumerate(lines)}


def wrong(cases):
    return {name: error for name, (_, _, error) in cases.items() if not error < 1e-5}


def native(cases):
    return {name: cls for name, (_, cls, _) in cases.items() if cls != "PHDForCausalLM"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A directory with ``<number>`` and ``<number>-hf`` of the cases, and the cases."""
    root = tmp_path_factory.mktemp("megatron")
    return root, run_cases("megatron_parity.py", root)


def test_logits_of_exported_checkpoints(rows):
    _, cases = rows
    assert len(cases) == 33
    assert wrong(cases) == {}
    assert native(cases) == NATIVE


def test_logits_of_every_norm_scheme_in_memory(tmp_path):
    cases = run_cases("scheme_parity.py", tmp_path)
    assert cases.keys() >= {f"{scheme} K=2 RMSNorm" for scheme in NORM_SCHEMES}
    assert wrong(cases) == {}
    assert native(cases) == {f"{name} RMSNorm": NATIVE[name] for name in ("pre K=1", "pre_qk K=1", "olmo2 K=1")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("hybrid_star K=2", "bfloat16"),
        ("hybrid_star K=3, repeated and vector", "bfloat16"),
        ("experts as Mixtral", "auto"),
        ("experts hybrid_star K=2", "bfloat16"),
    ],
)
def test_full_verification(rows, tmp_path, name, dtype):
    root, cases = rows
    assert export_checkpoint(root / str(cases[name][0]), tmp_path / "hf", dtype=dtype).verified == "full"


def test_experts_work_where_this_package_does_not_exist(rows, tmp_path):
    root, cases = rows
    export_checkpoint(root / str(cases["experts hybrid_star K=2"][0]), tmp_path / "hf", verify="none")
    works_alone(tmp_path)


@pytest.mark.parametrize("name", ["experts hybrid_star", "experts hybrid_star K=2", "experts in groups K=3"])
def test_our_own_exports_with_experts_come_back(rows, tmp_path, name):
    root, cases = rows
    export_checkpoint(root / str(cases[name][0]), tmp_path / "hf", verify="none")
    words = ["--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
    assert main(["import", *words]) == 0
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="tensors")
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("hf", "again")]
    assert configs[0] == configs[1]
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("hf", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_layer_that_computes_something_else_is_named(rows, tmp_path, monkeypatch):
    """Every tensor is right, but the second layer of the exported code scales its residual."""
    root, cases = rows
    code = bundle_files.bundle_files()["modeling_phd.py"].read_text()
    good = "        hidden = join(residual, output, norms, self.attention_output_layernorm)\n"
    assert good in code
    (tmp_path / "modeling_phd.py").write_text(
        code.replace(good, good + "        hidden = hidden * (1 + 1e-3 * (self.layer_index == 1))\n")
    )
    files = {**bundle_files.bundle_files(), "modeling_phd.py": tmp_path / "modeling_phd.py"}
    monkeypatch.setattr(bundle_files, "bundle_files", lambda: files)
    with pytest.raises(VerificationError, match=r"layer 1 is the first whose output differs, by \d"):
        export_checkpoint(root / str(cases["pre K=2"][0]), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()

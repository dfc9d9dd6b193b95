"""Weights of 8 bits by torchao: exactly the model whose matrices are those that the 8 bits stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phd_megatron.huggingface.bundle_files import write_bundle
from tests.other_programs.served import EXPERTS, export

FIELDS = {"norm_scheme": "hybrid_star", "phd_repeat": 3, "phd_window": 4, "phd_chunk": 8}
MODELS: dict[str, dict[str, Any]] = {
    "dense": FIELDS,
    "vanilla": FIELDS | {"phd_repeat": 1, "norm_scheme": "pre_qk"},
    "experts": FIELDS | EXPERTS | {"shared_expert_intermediate_size": 24},
}


@pytest.mark.parametrize("bits", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.quick if name == "dense" else ()) for name in MODELS]
)
@torch.no_grad()
def test_weights_of_8_bits(tmp_path: Path, name: str, bits: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    exact = export(tmp_path, MODELS[name])
    write_bundle(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        trust_remote_code=True,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(getattr(quantization, bits)()),
    )
    changed = 0
    for path, module in small.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            own = exact.get_submodule(path).weight
            assert isinstance(own, torch.Tensor)
            rounded = module.weight.dequantize()
            assert 0 < float((rounded - own).norm() / own.norm()) < 0.05
            own.copy_(rounded)
            changed += 1
    linear = sum(isinstance(module, nn.Linear) for module in exact.modules())
    assert changed == linear - 1  # the head, tied to the embedding, keeps its own
    tokens = torch.randint(61, (2, 19))
    torch.testing.assert_close(small(tokens).logits, exact(tokens).logits, rtol=1e-4, atol=1e-4)
    words: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found, expected = (model.generate(tokens, **words) for model in (small, exact))
    assert torch.equal(found, expected)

"""ONNX Runtime gives an export's logits, for any length. Float32, 1e-4 of their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.other_programs.served import EXPERTS, SIZES, export

MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {"phd_repeat": 1},
    "SWA": {"phd_repeat": 2, "phd_window": 5, "norm_scheme": "hybrid_star"},
    "CSWA, vectors and fractions": {
        **{"phd_repeat": 3, "phd_window": 4, "phd_chunk": 8, "norm_scheme": "hybrid_star"},
        **{"phd_copy_embedding": "vector", "phd_copy_positions": "fraction"},
    },
    "experts": {"phd_repeat": 2, "phd_window": 4, "phd_chunk": 8, **EXPERTS},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.quick if "CSWA" in name else ()) for name in MODELS]
)
@torch.no_grad()
def test_onnx(tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = export(tmp_path / "model", MODELS[name])
    words: dict[str, Any] = {"attention_mask": torch.ones(2, 19, dtype=torch.long), "use_cache": False}
    either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        model,
        (torch.randint(61, (2, 19)),),
        kwargs=words,
        dynamic_shapes={"input_ids": either, "attention_mask": either, "use_cache": None},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for batch, length in ((2, 19), (3, 7), (1, 40), (2, 3)):
        tokens = torch.randint(SIZES["vocab_size"], (batch, length))
        mask = torch.ones_like(tokens)
        mask[0, :2] = 0
        given = dict(zip(names, (tokens.numpy(), mask.numpy()), strict=True))
        found = torch.from_numpy(session.run(None, given)[0])
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)

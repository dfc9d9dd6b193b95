"""Torch's operators in place of apex's extension: the products, and whole models whose gradients are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.runtime import weight_gradient
from phd_megatron.runtime.context import Runtime
from phd_megatron.runtime.weight_gradient import wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32

VOCAB = 50
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "wide", "out"), [(37, 24, 40), (1, 1, 3), (64, 7, 1)])
def test_products(rows: int, wide: int, out: int, dtype: torch.dtype) -> None:
    inputs, grad = torch.randn(rows, wide).to(dtype), torch.randn(rows, out).to(dtype)
    before = torch.randn(out, wide)
    expected = before.double() + grad.double().t() @ inputs.double()
    found = before.clone()
    wgrad_gemm_accum_fp32(inputs, grad, found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found = before.to(dtype)
    wgrad_gemm_accum_fp16(inputs, grad, found)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def gradients(fused: bool, bf16: bool, **model: object) -> dict[str, torch.Tensor]:
    """What is in the gradient buffers after two micro-batches."""
    from phd_megatron.model.build import build_model
    from phd_megatron.training.optimizer import let_go, wrap_data_parallel

    values = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "seq_length": 16}
    run = RunConfig(model=ModelConfig(**values | {"make_vocab_size_divisible_by": 16, **model}))
    run.model.transformer = {**run.model.transformer, "gradient_accumulation_fusion": fused}
    run.training.train_iters, run.training.bf16 = 3, bf16
    resolve(run)
    (wrapped,) = wrap_data_parallel(build_model(run, VOCAB, torch.device("cpu")), run)
    wrapped.zero_grad_buffer()
    tokens = torch.randint(VOCAB, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    for piece in tokens:
        words = {"input_ids": piece[:, :-1], "labels": piece[:, 1:], "position_ids": torch.arange(16).expand(2, -1)}
        wrapped(**words, attention_mask=None).mean().backward()
    found = {name: parameter.main_grad.clone() for name, parameter in wrapped.named_parameters()}
    let_go([wrapped])
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {"phd_repeat": 2, "phd_window": 3, "phd_chunk": 8, "norm_scheme": "hybrid_star"},
        {"untie_embeddings_and_output_weights": True, "norm_scheme": "pre"},
        {"transformer": EXPERTS, "moe_experts_backend": "sequential", "phd_repeat": 2},
    ],
    ids=["tied", "untied", "experts"],
)
def test_models(runtime: Runtime, model: dict[str, object], bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def seen(inputs: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        shapes.append(main_grad.shape)
        wgrad_gemm_accum_fp32(inputs, grad, main_grad)

    monkeypatch.setattr(weight_gradient, "wgrad_gemm_accum_fp32", seen)
    plain, fused = (gradients(way, bf16, **model) for way in (False, True))
    assert plain.keys() == fused.keys() and any("output_layer" in name or "embedding" in name for name in plain)
    layers = 2 * (2 + (2 * 4 if "transformer" in model else 2)) + 1  # linear ones of two blocks, and the head
    assert len(shapes) == 2 * layers and (64, 32) in shapes  # micro-batches
    for name, gradient in fused.items():
        assert gradient.norm() > 0, name
        tolerance = 2e-2 if bf16 else 1e-6  # a bfloat16 gradient is rounded before it is added; a fused one never is
        assert (gradient - plain[name]).norm() <= tolerance * plain[name].norm(), name

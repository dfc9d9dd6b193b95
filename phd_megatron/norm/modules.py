"""RMSNorm and LayerNorm with the constructor Megatron-Core's layer specs call.

Megatron-Core's own torch norm refuses sequence parallelism and its fused one needs apex, so the local (TE-free) model
uses these. Plain torch; the statistics are computed in float32 whatever the input's type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormConfig(Protocol):
    """What a norm reads of a configuration; Megatron-Core passes its own."""

    params_dtype: torch.dtype
    sequence_parallel: bool


class _RMSNormFunction(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` that saves the input and one number a row.

    Composed of separate operations it would keep several tensors of the input's size; on CPU this is 1.3 to 1.7 times
    as fast, forward and backward.
    """

    @staticmethod
    def forward(ctx: torch.autograd.Function, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.to(_compute_dtype(hidden.dtype))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.size(-1))
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        width = hidden.size(-1)
        rows, grad, scale = (x.to(scale.dtype).reshape(-1, x.size(-1)) for x in (hidden, grad_output, scale))
        wide_weight = weight.to(scale.dtype)
        # With n = x * scale: dweight = sum(g * n) and dx = scale * (g * w - n * mean(g * w * n)). Both sums start from
        # g * x, so the normed tensor is never formed.
        product = grad * rows  # [rows, d]
        mean = torch.mv(product, wide_weight)[:, None].mul_(scale.pow(3)).div_(width)
        grad_weight = torch.mv(product.T, scale[:, 0])
        grad_hidden = (grad * wide_weight).mul_(scale).addcmul_(rows, mean, value=-1)
        return grad_hidden.view(hidden.shape).to(hidden.dtype), grad_weight.to(weight.dtype), None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, ``[..., d]`` to ``[..., d]``, ``weight`` of shape ``[d]``."""
    if hidden.is_cuda:
        return F.rms_norm(hidden, (hidden.size(-1),), weight, eps)  # one fused kernel there
    return _RMSNormFunction.apply(hidden, weight, eps)


class RMSNorm(nn.Module):
    """RMSNorm with a weight and no bias.

    Args:
        config: type of the parameters, and whether each rank norms its share of the tokens.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: NormConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank norms its share of the tokens: Megatron-Core then sums the gradients.
        mark([self.weight], sequence_parallel=config.sequence_parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias; arguments as :class:`RMSNorm`."""

    def __init__(self, config: NormConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark(self.parameters(), sequence_parallel=config.sequence_parallel)


def mark(parameters: Iterable[nn.Parameter], **marks: bool) -> None:
    """Set attributes by which Megatron-Core, or this package, knows what to do with a parameter's gradient."""
    for parameter in parameters:
        for name, value in marks.items():
            setattr(parameter, name, value)


def norm_class(normalization: str) -> type[nn.Module]:
    """The module for ``normalization`` (``RMSNorm`` or ``LayerNorm``)."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]


def sum_gradient_over_tensor_parallel(norm: nn.Module) -> nn.Module:
    """Mark a per-head norm: its weight is shared by all heads, and each tensor-parallel rank sees only its own.

    So the gradient of a rank is partial, with and without sequence parallelism. The mark makes
    :func:`phd_megatron.model.gradients.finalize_model_grads` sum it over the group exactly once; the sequence-parallel
    mark is taken away so that Megatron-Core does not sum it a second time.
    """
    mark(norm.parameters(), sequence_parallel=False, sum_gradient_over_tensor_parallel=True)
    return norm

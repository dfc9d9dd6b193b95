"""SwiGLU (arXiv 2002.05202) as one differentiable function: one Triton kernel each way on a GPU, torch elsewhere.

Both ways write both halves of the input's gradient in place instead of joining two tensors.
:func:`swiglu_reference` is the definition. :func:`weighted_swiglu` multiplies each row by a weight as well, the
router's of an expert, and :func:`weighted_swiglu_reference` is its definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.kernels.triton_support import runs_on_gpu


def swiglu(gate_and_up: Tensor) -> Tensor:
    """``[..., 2f]``, gate first, to ``silu(gate) * up`` of ``[..., f]``."""
    if runs_on_gpu(gate_and_up.device, gate_and_up.dtype):
        return swiglu_triton(gate_and_up)
    return _SwiGLU.apply(gate_and_up)


def swiglu_triton(gate_and_up: Tensor) -> Tensor:
    """The same in Triton: computed in float32, rounded once."""
    return _TritonSwiGLU.apply(gate_and_up)


def swiglu_reference(gate_and_up: Tensor) -> Tensor:
    """The same through ordinary operations."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """``[rows, 2f]`` and ``[rows]`` to ``weights * silu(gate) * up``, ``[rows, f]`` in the type of the first."""
    if runs_on_gpu(gate_and_up.device, gate_and_up.dtype):
        return weighted_swiglu_triton(gate_and_up, weights)
    return _WeightedSwiGLU.apply(gate_and_up, weights)


def weighted_swiglu_triton(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """The same in Triton: computed in float32, rounded once."""
    return _TritonWeightedSwiGLU.apply(gate_and_up, weights)


def weighted_swiglu_reference(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """The same through ordinary operations."""
    return (swiglu_reference(gate_and_up) * weights.unsqueeze(-1)).to(gate_and_up.dtype)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    shape: torch.Size


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        return _gradient(gate_and_up, activated, grad)


def _gradient(gate_and_up: Tensor, activated: Tensor, grad: Tensor) -> Tensor:
    """Of ``gate_and_up``, where ``activated`` is ``silu(gate)`` and ``grad`` the gradient of ``activated * up``."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_and_up)
    gate_grad, up_grad = out.chunk(2, dim=-1)
    torch.mul(activated, grad, out=up_grad)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
    return out


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, gate_and_up: Tensor, weights: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated, weights)
        return (activated * up * weights.unsqueeze(-1)).to(gate_and_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_and_up, activated, weights = ctx.saved_tensors
        up = gate_and_up.chunk(2, dim=-1)[1]
        wide = torch.promote_types(grad.dtype, weights.dtype)
        weights_grad = (grad.to(wide) * activated * up).sum(-1).to(weights.dtype)
        weighted = (grad * weights.unsqueeze(-1)).to(grad.dtype)
        return _gradient(gate_and_up, activated, weighted), weights_grad


class _TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, gate_and_up: Tensor) -> Tensor:
        from .swiglu_kernels import BLOCK, swiglu_forward_kernel

        rows = gate_and_up.contiguous().flatten(0, -2)
        columns = rows.size(1) // 2
        out = torch.empty(rows.size(0), columns, dtype=rows.dtype, device=rows.device)
        if rows.size(0):  # an expert may have no token
            swiglu_forward_kernel[(rows.size(0), -(-columns // BLOCK))](rows, out, columns, rows.stride(0), BLOCK=BLOCK)
        ctx.save_for_backward(rows)
        ctx.shape = gate_and_up.shape
        return out.view(*gate_and_up.shape[:-1], columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> Tensor:
        from .swiglu_kernels import BLOCK, swiglu_backward_kernel

        (rows,) = ctx.saved_tensors
        columns, out = rows.size(1) // 2, torch.empty_like(rows)
        if rows.size(0):
            swiglu_backward_kernel[(rows.size(0), -(-columns // BLOCK))](
                grad.contiguous(), rows, out, columns, rows.stride(0), BLOCK=BLOCK
            )
        return out.view(ctx.shape)


class _TritonWeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, gate_and_up: Tensor, weights: Tensor) -> Tensor:
        from .swiglu_kernels import BLOCK, weighted_swiglu_forward_kernel

        rows, weights = gate_and_up.contiguous(), weights.contiguous()
        columns = rows.size(1) // 2
        out = rows.new_empty(rows.size(0), columns)
        if rows.size(0):
            grid = (rows.size(0), -(-columns // BLOCK))
            weighted_swiglu_forward_kernel[grid](rows, weights, out, columns, BLOCK=BLOCK)
        ctx.save_for_backward(rows, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, Tensor]:
        from .swiglu_kernels import BLOCK, weighted_swiglu_backward_kernel

        rows, weights = ctx.saved_tensors
        out, weights_grad = torch.empty_like(rows), torch.empty_like(weights)
        if rows.size(0):
            weighted_swiglu_backward_kernel[(rows.size(0),)](
                grad.contiguous(), rows, weights, out, weights_grad, rows.size(1) // 2, BLOCK=BLOCK
            )
        return out, weights_grad

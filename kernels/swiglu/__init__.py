"""SwiGLU (arXiv 2002.05202) as one differentiable function.

The backward writes both halves of the input's gradient in place instead of joining two tensors.
:func:`swiglu_reference` is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate_and_up: Tensor) -> Tensor:
    """``[..., 2f]``, gate first, to ``silu(gate) * up`` of ``[..., f]``."""
    return _SwiGLU.apply(gate_and_up)


def swiglu_reference(gate_and_up: Tensor) -> Tensor:
    """The same through ordinary operations."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_and_up)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(activated, grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out

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


BLOCK_ELEMENTS = 2**17


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
        activated = torch.empty_like(gate_and_up[..., : gate_and_up.size(-1) // 2])
        out = torch.empty_like(activated)
        for (gate, up), kept, result in zip(_blocks(gate_and_up, True), _blocks(activated), _blocks(out), strict=True):
            torch.mul(torch.ops.aten.silu.out(gate, out=kept), up, out=result)
        ctx.save_for_backward(gate_and_up, activated)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        out = torch.empty(gate_and_up.shape, dtype=gate_and_up.dtype, device=gate_and_up.device)
        grad = grad.contiguous()
        parts = (_blocks(gate_and_up, True), _blocks(out, True), _blocks(activated), _blocks(grad))
        for (gate, up), (gate_grad, up_grad), kept, g in zip(*parts, strict=True):
            torch.mul(kept, g, out=up_grad)
            torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=gate_grad)
        return out


def _blocks(x: Tensor, halves: bool = False) -> Any:
    """Rows of ``x`` in blocks whose operands stay in a core's cache; one block on a GPU. Pairs of column halves if asked."""
    rows = x.reshape(-1, x.size(-1))
    width = x.size(-1) if halves else 2 * x.size(-1)
    size = rows.size(0) if x.is_cuda else max(1, BLOCK_ELEMENTS // width)
    for block in rows.split(size):
        yield block.chunk(2, dim=-1) if halves else block

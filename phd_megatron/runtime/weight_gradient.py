"""Weight gradients that a product adds to the gradient buffer itself, with torch's operators.

Megatron-Core's own linear layers, of which the head is one, do so by an extension of apex, and by nothing else. Where
that is not installed, :mod:`.mcore_fixes` gives them this module instead, which has its two functions. Without them a
product first writes the gradient of a whole weight, and another kernel adds it.

``rows`` are the tokens of a micro-batch that a rank computes, times K.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add ``grad_output^T total_input`` to ``main_grad``, as apex's extension of this name.

    Args:
        total_input: ``[rows, in]``.
        grad_output: ``[rows, out]``, of the same type.
        main_grad: ``[out, in]`` float32, changed in place.
    """
    gradient = grad_output.t()
    if total_input.dtype not in _HALF:
        main_grad.addmm_(gradient, total_input)
    elif total_input.is_cuda and problem() is None:
        torch.ops.aten.addmm.dtype_out(main_grad, gradient, total_input, torch.float32, out=main_grad)
    else:
        main_grad.addmm_(gradient.float(), total_input.float())


def wgrad_gemm_accum_fp16(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same for a ``main_grad`` of the type of the others (``accumulate_allreduce_grads_in_fp32=False``)."""
    main_grad.addmm_(grad_output.t(), total_input)


def problem() -> str | None:
    """Why torch cannot add a half-precision product to float32 on a GPU, or None where it can."""
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return f"torch {torch.__version__} has no addmm that adds to another type"
    return None

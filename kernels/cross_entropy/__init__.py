"""Cross-entropy over a vocabulary that tensor-parallel ranks share, without float32 logits.

Megatron-Core's own casts the logits to float32 and keeps several copies: for 100 thousand tokens of vocabulary they are
the largest tensors of a step. Here one kernel reads the half-precision logits once, and the backward overwrites them
with their gradient. All sums are in float32. :func:`cross_entropy_reference` is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Losses, float32, in the shape of ``labels``.

    Args:
        logits: ``[..., V / ranks]``, this rank's part of the vocabulary, contiguous. The backward writes their gradient
            over them: nothing else may read them then. Logits of -inf (padding of the vocabulary) have gradient 0.
        labels: ``[...]`` int64 token ids.
        group: the ranks that share the vocabulary, in the order of their parts; None for one.

    Raises:
        ValueError: if shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape or not logits.is_contiguous():
        raise ValueError(
            f"logits {tuple(logits.shape)} (contiguous: {logits.is_contiguous()}) and labels {tuple(labels.shape)}: "
            "contiguous logits with one more dimension than labels are needed"
        )
    return _CrossEntropy.apply(logits, labels, group)


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, over a whole vocabulary."""
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # logits, labels, log-sum-exp
    first: int  # of this rank's part of the vocabulary


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, logits: Tensor, labels: Tensor, group: ProcessGroup | None) -> Tensor:
        from .cross_entropy_kernels import BLOCK, WARPS, cross_entropy_statistics_kernel

        columns, rows = logits.size(-1), labels.numel()
        first = 0 if group is None else torch.distributed.get_rank(group) * columns
        labels = labels.contiguous()
        top, total, target = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        cross_entropy_statistics_kernel[(rows,)](
            logits, labels, top, total, target, first, columns, BLOCK=BLOCK, num_warps=WARPS
        )
        if group is not None and group.size() > 1:
            peak = top.clone()
            all_reduce(peak, ReduceOp.MAX, group)
            # A part of padding alone has maximum -inf and sum 0.
            both = torch.stack([total * (top - peak).exp(), target])
            all_reduce(both, group=group)
            top, (total, target) = peak, both
        ctx.save_for_backward(logits, labels, total.log() + top)
        ctx.first = first
        return (total.log() + (top - target)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        from .cross_entropy_kernels import BLOCK, WARPS, cross_entropy_gradient_kernel

        logits, labels, lse = ctx.saved_tensors
        columns = logits.size(-1)
        logits = logits.detach()
        cross_entropy_gradient_kernel[(labels.numel(), -(-columns // BLOCK))](
            *(logits, labels, lse, grad.to(torch.float32).contiguous(), ctx.first, columns),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return logits, None, None

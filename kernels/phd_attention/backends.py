"""The implementations of PHD attention, one row each: where it is, where it can run, and what is so about it.

Whoever treats backends differently asks for a fact of the row and never looks into a backend's name. A backend's files
are named after it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from phd_megatron.kernels.triton_support import triton_problem
from phd_megatron.phd.kv_policy import KVPolicy


class Backend(NamedTuple):
    """One implementation.

    Attributes:
        about: in a few words.
        attend: ``module:function`` over whole sequences, imported when it is first called.
        context_parallel: the same over ranks, or None.
        tail: the last tokens of a document over all of it, which it takes where documents are kept apart over ranks.
        problem: ``(device, dtype, head_dim)`` to the reason why it cannot run there, or None.
        vendor_kernel: part (a) is whatever operator :func:`.causal.causal_kernel` finds.
        triton: it has Triton kernels of its own, which are interpreted where there is no GPU.
        fused_norms: models that ask for it also norm and turn q, k and v in a Triton kernel
            (:mod:`phd_megatron.kernels.qkv_norm_rope`).
        dense_mask: it keeps a score for every pair of rows, so long sequences need much memory.
        variants: options of ``attend`` that are worth a measurement of their own.
    """

    about: str
    attend: str
    context_parallel: str | None
    tail: str | None
    problem: Callable[[torch.device, torch.dtype, int], str | None]
    vendor_kernel: bool = False
    triton: bool = False
    fused_norms: bool = False
    dense_mask: bool = False
    variants: tuple[Mapping[str, bool], ...] = ()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, **options: float | bool | None
    ) -> Tensor:
        return load(self.attend)(query, key, value, policy, **options)


@cache
def load(name: str) -> Callable[..., Tensor]:
    """The function that a row names, such as ``sdpa:sdpa_attention``."""
    module, function = name.split(":")
    found: Callable[..., Tensor] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    return found


WIDEST_TRITON = 256  # head dimension


def _anywhere(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    return None


def _triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if head_dim > WIDEST_TRITON:
        return f"its tiles hold head dimensions up to {WIDEST_TRITON}, not {head_dim}"
    return triton_problem(device, dtype)


def _flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"FlexAttention has no backward on {device.type}"
    return None if dtype.itemsize <= 4 else f"FlexAttention does not compute in {str(dtype).removeprefix('torch.')}"


BACKENDS = {
    "reference": Backend(
        about="dense mask, exact and slow",
        attend="reference:reference_attention",
        context_parallel="reference_context_parallel:reference_context_parallel",
        tail="reference_context_parallel:reference_tail",
        problem=_anywhere,
        dense_mask=True,
    ),
    "sdpa": Backend(
        about="the vendor's causal kernel and a local part in torch",
        attend="sdpa:sdpa_attention",
        context_parallel="sdpa_context_parallel:sdpa_context_parallel",
        tail="sdpa_tail:sdpa_tail",
        problem=_anywhere,
        vendor_kernel=True,
    ),
    "flex": Backend(
        about="FlexAttention with a block mask",
        attend="flex:flex_attention",
        context_parallel=None,
        tail=None,
        problem=_flex,
        variants=({"token_major": True}, {"flash": True}),
    ),
    "triton": Backend(
        about="one fused kernel",
        attend="triton:triton_attention",
        context_parallel="triton_context_parallel:triton_context_parallel",
        tail="triton_context_parallel:triton_tail",
        problem=_triton,
        triton=True,
        fused_norms=True,
        variants=({"deterministic": False},),
    ),
    "sdpa_triton": Backend(
        about="the vendor's causal kernel for each copy, and one Triton kernel for the hidden window and the merge",
        attend="sdpa_triton:sdpa_triton_attention",
        context_parallel="sdpa_triton_context_parallel:sdpa_triton_context_parallel",
        tail="sdpa_triton_context_parallel:sdpa_triton_tail",
        problem=_triton,
        vendor_kernel=True,
        triton=True,
        fused_norms=True,
    ),
}

# `auto` takes the first that can run: the quickest that has been measured on a machine of its kind
# (docs/benchmarks.md). On a GPU `triton` alone is slower than what the vendor's kernel leaves.
AUTOMATIC = {"cuda": ("sdpa_triton", "sdpa"), "cpu": ("sdpa",)}

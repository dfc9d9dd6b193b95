"""PHD attention: one function, several implementations, one rule that chooses.

``phd_attention`` is what the model calls. ``reference`` is the definition as a dense mask; ``sdpa`` runs the same
softmax as plain causal attention over the originals plus a small local part. Import it as
``phd_megatron.kernels.phd_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.phd.kv_policy import KVPolicy

from .causal import causal_kernel
from .context_parallel import reference_context_parallel, sdpa_context_parallel
from .exchange import COMM_TYPES, ContextParallel
from .reference import reference_attention
from .sdpa import sdpa_attention

BACKENDS = {"reference": reference_attention, "sdpa": sdpa_attention}
CONTEXT_PARALLEL = {"reference": reference_context_parallel, "sdpa": sdpa_context_parallel}

__all__ = [
    "BACKENDS",
    "COMM_TYPES",
    "CONTEXT_PARALLEL",
    "ContextParallel",
    "attention_backends",
    "choose_backend",
    "phd_attention",
]


def phd_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    *,
    scale: float | None = None,
    backend: str = "auto",
    query_copies: int | None = None,
    context: ContextParallel | None = None,
) -> Tensor:
    """Attention of the last ``Kq`` copies of every token over all ``K`` copies, as ``policy`` allows (Eq. 2).

    Args:
        query: ``[Kq, s, b, heads, d]``. ``Kq`` is ``K``, or less where only the last copies' outputs are wanted
            (1 in the last decoder layer).
        key, value: ``[K, s, b, groups, d]``, originals first; any strides. Head ``h`` uses group
            ``h // (heads / groups)``. Positions are ``0..s-1``.
        policy: repeat, window and chunk.
        scale: factor on the scores, default ``d ** -0.5``.
        backend: ``auto`` or a name of :data:`BACKENDS`.
        query_copies: ``Kq``, if the caller wants it checked.
        context: the ranks that share the sequence, where there are several. ``s`` is this rank's part then: the two
            slices of ``policy.context_parallel_slices``, one after the other.

    Returns:
        ``[Kq, s, b, heads, d]``.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or the policy does not fit the slices.
        UserError: if the backend is unknown.
    """
    _check(query, key, value, policy, query_copies)
    if backend == "auto" or backend not in BACKENDS:
        backend, _ = choose_backend(query.device, query.dtype, query.size(-1), backend=backend)
    if context is not None and context.size > 1:
        return CONTEXT_PARALLEL[backend](query, key, value, policy, context, scale=scale)
    return BACKENDS[backend](query, key, value, policy, scale=scale)


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 64, *, backend: str = "auto"
) -> tuple[str, str]:
    """The implementation that runs here and the reason, in words.

    Raises:
        UserError: if ``backend`` is no name of an implementation.
    """
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise UserError(f"phd_attention_backend={backend!r} is not an implementation; choose one of {names}")
    name = "sdpa" if backend == "auto" else backend
    if name == "reference":
        return name, "asked for: dense mask, exact and slow"
    why = causal_kernel(torch.device(device), dtype, head_dim)[1]
    return name, ("asked for" if backend == name else "the quickest built for this machine") + f"; {why}"


def attention_backends(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 64
) -> list[tuple[str, bool, str]]:
    """Rows for ``doctor``: implementation, whether ``auto`` takes it here, and what it runs on."""
    chosen, _ = choose_backend(device, dtype, head_dim)
    return [(name, name == chosen, choose_backend(device, dtype, head_dim, backend=name)[1]) for name in BACKENDS]


def _check(query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, query_copies: int | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 5 or key.dim() != 5:
        raise ValueError(f"{shapes}: attention takes [copies, s, b, heads, d]; split the copies from the rows first")
    if key.shape != value.shape or query.shape[1:3] != key.shape[1:3] or query.size(4) != key.size(4):
        raise ValueError(f"{shapes}: length, batch and head dimension must agree, and key and value in everything")
    if key.size(0) != policy.repeat or not 1 <= query.size(0) <= policy.repeat:
        raise ValueError(f"{shapes}: {policy.name} has {policy.repeat} copies of keys, and as many of queries or fewer")
    if query_copies is not None and query.size(0) != query_copies:
        raise ValueError(f"{shapes}: query_copies={query_copies}, so query must be the last {query_copies} copies")
    if query.size(3) % key.size(3):
        raise ValueError(f"{shapes}: query heads must be a multiple of the key-value groups")
    if query.numel() == 0:
        raise ValueError(f"{shapes}: there is nothing to attend from; pass at least one token and one sequence")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"query, key, value are {kinds}: they must agree; cast them before attention")

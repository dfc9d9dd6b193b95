"""PHD attention: one function, several implementations, one rule that chooses.

``phd_attention`` is what the model calls; import it as ``phd_megatron.kernels.phd_attention``. Implementations:

- ``reference``: the definition as a dense mask;
- ``sdpa``: the same softmax as plain causal attention over the originals, by the vendor's kernel, plus a small local
  part in plain torch;
- ``triton``: everything in one fused kernel; ``sdpa_triton``: the vendor's kernel, and Triton for the local part;
- ``flex``: FlexAttention with a block mask.

What is so about each is a row of :data:`BACKENDS`.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.phd.documents import document_lengths
from phd_megatron.phd.kv_policy import KVPolicy

from .backends import AUTOMATIC, BACKENDS, load
from .by_document import attend_documents
from .by_document_context_parallel import attend_documents_over_ranks
from .causal import causal_kernel
from .exchange import COMM_TYPES, ContextParallel

__all__ = [
    "BACKENDS",
    "COMM_TYPES",
    "ContextParallel",
    "choose_backend",
    "phd_attention",
]

_log = logging.getLogger(__name__)


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
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of the last ``Kq`` copies of every token over all ``K`` copies, as ``policy`` allows (Eq. 2).

    Args:
        query: ``[Kq, s, b, heads, d]``. ``Kq`` is ``K``, or less where only the last copies' outputs are wanted
            (1 in the last decoder layer).
        key, value: ``[K, s, b, groups, d]``, originals first; any strides but 1 in the last dimension, as for query.
            Head ``h`` uses group ``h // (heads / groups)``. Positions are ``0..s-1``.
        policy: repeat, window and chunk.
        scale: factor on the scores, default ``d ** -0.5``.
        backend: ``auto`` or a name of :data:`BACKENDS`.
        query_copies: ``Kq``, if the caller wants it checked.
        context: the ranks that share the sequence, where there are several. ``s`` is this rank's part then: the two
            slices of ``policy.context_parallel_slices``, one after the other.
        starts: ``[b, s]`` on the host, where the document of each token begins (:mod:`phd_megatron.phd.documents`): it
            sees nothing of others. None is one document, whatever lies in the sequence. With ``context`` this rank's
            tokens', and positions in the whole sequence.

    Returns:
        ``[Kq, s, b, heads, d]``.

    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit together, or the policy does not fit the slices.
        UserError: if the backend is unknown, or cannot run here.
    """
    _check(query, key, value, policy, query_copies, starts)
    name = _choose(query.device.type, query.device.index, query.dtype, query.size(-1), backend)[0]
    if context is None or context.size == 1:
        if starts is not None:
            lengths = [document_lengths(sample) for sample in starts]
            return attend_documents(BACKENDS[name].__call__, query, key, value, policy, lengths, scale)
        return BACKENDS[name](query, key, value, policy, scale=scale)
    row = BACKENDS[name]
    if row.context_parallel is None or row.tail is None:
        able = ", ".join(other for other, entry in BACKENDS.items() if entry.context_parallel)
        raise UserError(
            f"phd_attention_backend={name!r} has no form for context_parallel_size={context.size}; use one of {able}"
        )
    if starts is None:
        return load(row.context_parallel)(query, key, value, policy, context, scale=scale)
    whole = row.__call__
    return attend_documents_over_ranks(whole, load(row.tail), query, key, value, policy, starts, context, scale)


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, *, backend: str = "auto"
) -> tuple[str, str]:
    """The implementation that runs here and the reason, in words.

    Raises:
        UserError: if ``backend`` is no name of an implementation, or one that cannot run here.
    """
    device = torch.device(device)
    return _choose(device.type, device.index, dtype, head_dim, backend)


@lru_cache(maxsize=64)
def _choose(kind: str, index: int | None, dtype: torch.dtype, head_dim: int, backend: str) -> tuple[str, str]:
    """:func:`choose_backend`, which says in the log once what it picked and why."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise UserError(f"phd_attention_backend={backend!r} is not an implementation; choose one of {names}")
    able = AUTOMATIC.get(kind, ("sdpa",)) if backend == "auto" else (backend,)
    problems = {name: BACKENDS[name].problem(device, dtype, head_dim) for name in able}
    name = next((name for name, problem in problems.items() if problem is None), able[-1])
    problem = problems[name]
    if problem is not None:
        raise UserError(f"phd_attention_backend={name!r} cannot run here: {problem}; use auto, or one that can")
    reason = f"asked for: {BACKENDS[name].about}"
    if backend == "auto":
        reason = "the quickest that has been measured on this kind of machine"
        for other, why in problems.items():
            if why is not None:
                reason += f" but {other}, which cannot run: {why}"
    if BACKENDS[name].vendor_kernel:
        try:
            reason += f"; {causal_kernel(device, dtype, head_dim)[1]}"
        except ValueError as error:
            raise UserError(str(error)) from error
    _log.info("PHD attention on %s in %s, head dimension %d: %s, %s", device, dtype, head_dim, name, reason)
    return name, reason


def _check(
    query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, query_copies: int | None, starts: Tensor | None
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 5 or key.dim() != 5:
        raise ValueError(f"{shapes}: attention takes [copies, s, b, heads, d]; split the copies from the rows first")
    if key.shape != value.shape or query.shape[1:3] != key.shape[1:3] or query.size(4) != key.size(4):
        raise ValueError(f"{shapes}: length, batch and head dimension must agree, and key and value in everything")
    if key.size(0) != policy.repeat or not 1 <= query.size(0) <= policy.repeat:
        raise ValueError(f"{shapes}: {policy.name} has {policy.repeat} copies of keys, and as many of queries or fewer")
    if query_copies is not None and query.size(0) != query_copies:
        raise ValueError(f"{shapes}: query_copies={query_copies}, so query must be the last {query_copies} copies")
    if starts is not None and starts.shape != (query.size(2), query.size(1)):
        raise ValueError(f"{shapes}: documents {tuple(starts.shape)} must be [b, s]")
    if query.size(3) % key.size(3):
        raise ValueError(f"{shapes}: query heads must be a multiple of the key-value groups")
    if any(x.size(-1) > 1 and x.stride(-1) != 1 for x in (query, key, value)):
        strides = ", ".join(str(x.stride(-1)) for x in (query, key, value))
        raise ValueError(
            f"the last dimensions have strides {strides}: kernels read dense rows; pass .contiguous() ones"
        )
    if query.numel() == 0:
        raise ValueError(f"{shapes}: there is nothing to attend from; pass at least one token and one sequence")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"query, key, value are {kinds}: they must agree; cast them before attention")

"""Context parallelism as in :mod:`.sdpa_context_parallel`; the hidden window is computed by :mod:`.window` (Triton)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

from .exchange import ContextParallel
from .sdpa_context_parallel import attend_over_ranks
from .sdpa_tail import attend_tail
from .window import Window


def sdpa_triton_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    *,
    scale: float | None = None,
) -> Tensor:
    """This rank's queries over the whole sequence. Shapes and errors as :func:`sdpa_context_parallel`'s."""
    return attend_over_ranks(query, key, value, policy, context, scale, TritonWindow)


def sdpa_triton_tail(
    query: Tensor, originals: Tensor, hidden: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """The last tokens of a document over all of it. Shapes as :func:`.reference_context_parallel.reference_tail`'s."""
    return attend_tail(query, originals, hidden, policy, scale, TritonWindow)


class TritonWindow(NamedTuple):
    """:class:`.sdpa_context_parallel.SliceWindow` in Triton."""

    policy: KVPolicy
    scale: float
    start: int
    halo: int

    @property
    def _window(self) -> Window:
        return Window(self.policy, self.scale, self.start, self.start - self.halo)

    def merge(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        out, lse = _queries(out), _queries(lse)
        self._window.forward(_queries(query), _keys(key), _keys(value), list(out), list(lse), out, lse)

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        into, (key_grad, value_grad) = _queries(query_grad), (torch.empty_like(x) for x in (key, value))
        self._window.backward(
            *(_queries(grad), _queries(query), _keys(key), _keys(value), _queries(out), _queries(lse)),
            *(list(into), into, _keys(key_grad), _keys(value_grad)),
        )
        return key_grad, value_grad


def _queries(x: Tensor) -> Tensor:
    """``[G, rows, J, r, ...]`` as ``[J, rows, G, 1, r, ...]``."""
    return x.movedim(2, 0).transpose(1, 2).unsqueeze(3)


def _keys(x: Tensor) -> Tensor:
    """``[G, rows, K - 1, d]`` as ``[K - 1, rows, G, 1, d]``."""
    return x.permute(2, 1, 0, 3).unsqueeze(3)

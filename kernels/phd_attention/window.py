"""Launches of the hidden window's Triton kernels: they end what a vendor's kernel began (backend ``sdpa_triton``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from phd_megatron.kernels.triton_support import block_of, precision
from phd_megatron.phd.kv_policy import KVPolicy

from .window_kernels import entries_of_a_tile, window_backward_kernel, window_forward_kernel


class Window(NamedTuple):
    """One slice of the sequence: ``start`` is its first query's position, ``hidden_start`` its first hidden key's.

    Tensors have the ``J`` hidden copies of queries, ``[J, s, b, groups, ratio, d]`` or, for log-sum-exps, without the
    last dimension, and the ``K - 1`` hidden keys, ``[K - 1, rows, b, groups, d]``; any strides but 1 in ``d``.
    """

    policy: KVPolicy
    scale: float
    start: int = 0
    hidden_start: int = 0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Tensor], part_lses: Sequence[Tensor],
        out: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        """Write ``out`` and ``lse`` of all keys, given those of the originals, ``parts``, one tensor for each copy."""
        copies, length, batch, groups, ratio, _ = query.shape
        window_forward_kernel[_query_grid(length * copies * ratio, batch * groups)](
            *(query, key, value, tuple(parts), tuple(part_lses), out, lse),
            *(query.stride()[:5], key.stride()[:4], value.stride()[:4], _common(parts), _common(part_lses)),
            *(out.stride()[:5], lse.stride()[:5]),
            *(self.scale, groups, length, self.start, self.hidden_start),
            **self._constants(query),
        )

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        parts: Sequence[Tensor], query_grad: Tensor, key_grad: Tensor, value_grad: Tensor,
    ) -> None:  # fmt: skip
        """Write the gradients; ``parts`` is dq of the originals, ``out`` and ``lse`` are those of all keys."""
        _, length, batch, groups, _, _ = query.shape
        hidden, rows = key.size(0), key.size(1)

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return -(
                -rows * hidden // entries_of_a_tile(hidden, self.policy.chunk or 0, meta["BLOCK_N"])
            ), batch * groups

        window_backward_kernel[grid](
            *(query, grad, out, lse, key, value, tuple(parts), query_grad, key_grad, value_grad),
            *(query.stride()[:5], grad.stride()[:5], out.stride()[:5], lse.stride()[:5]),
            *(key.stride()[:4], value.stride()[:4], _common(parts), query_grad.stride()[:5]),
            *(key_grad.stride()[:4], value_grad.stride()[:4]),
            *(self.scale, groups, length, self.start, self.hidden_start, rows),
            **self._constants(query),
        )

    def _constants(self, query: Tensor) -> dict[str, int | str]:
        copies, width = query.size(0), query.size(5)
        return {
            "COPIES": copies,
            "RATIO": query.size(4),
            "HIDDEN": self.policy.repeat - 1,
            "FIRST_COPY": self.policy.repeat - copies + 1,
            "WINDOW": self.policy.window,
            "CHUNK": self.policy.chunk or 0,
            "D": width,
            "BLOCK_D": block_of(width),
            "PRECISION": precision(query.dtype),
        }


def _query_grid(rows: int, bundles: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    return lambda meta: (-(-rows // meta["BLOCK_M"]), bundles)


def _common(parts: Sequence[Tensor]) -> tuple[int, ...]:
    """Strides that all parts have, behind a 0 for the copy."""
    found = {x.stride()[:4] for x in parts}
    if len(found) != 1:
        raise ValueError(f"the parts of one call have different strides {sorted(found)}")
    return 0, *found.pop()

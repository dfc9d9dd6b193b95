"""The Triton decode kernel in an exported model's generation, which by itself needs torch and transformers alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.kernels.decode_attention import decode_attention, decode_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from phd_megatron.huggingface.bundle.rows_phd import LayerRows


def decode_kernel_problem(model: PreTrainedModel) -> str | None:
    """Why the kernel cannot serve this model where it is, or None where it can."""
    if type(model).__module__.rpartition(".")[2] != "modeling_phd":
        return f"{type(model).__name__} has no PHD cache"
    return decode_problem(model.device, model.dtype, model.config.head_dim)


def takes_decode_kernel(model: PreTrainedModel, asked: str) -> bool:
    """Whether ``--decode-kernel`` ``asked`` means the kernel here; ``auto`` takes it on a GPU where it can run."""
    return asked == "triton" or (
        asked == "auto" and model.device.type == "cuda" and decode_kernel_problem(model) is None
    )


@contextmanager
def decode_kernel(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, steps of one token of this model attend through the Triton kernel.

    Raises:
        UserError: with :func:`decode_kernel_problem`.
    """
    problem = decode_kernel_problem(model)
    if problem is not None:
        raise UserError(f"--decode-kernel=triton cannot run here: {problem}; use --decode-kernel=torch")
    package = type(model).__module__.rpartition(".")[0]
    steps = importlib.import_module(f"{package}.rows_phd").StepRows
    steps.decode = staticmethod(_attend)
    try:
        yield
    finally:
        steps.decode = None


def _attend(rows: LayerRows, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``LayerRows.attend`` for one new slot: ``[b, heads, Kq, d]`` over the cache's layout to ``[b, Kq, heads, d]``."""
    step, cached = rows.step, rows.step.cache_step
    assert cached is not None  # of a step over a cache
    copies = step.policy.repeat - 1
    entries = copies * cached.hidden_positions.size(1)

    def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = x[:, :, :entries].unflatten(2, (copies, -1)) if copies else None
        return x[:, :, entries:], hidden

    (key, hidden_key), (value, hidden_value) = split(keys), split(values)
    out = decode_attention(
        query.permute(2, 0, 1, 3),
        step.positions[:, 0],
        key,
        value,
        cached.positions,
        hidden_key,
        hidden_value,
        cached.hidden_positions if copies else None,
        step.policy,
    )
    return out.transpose(0, 1)
